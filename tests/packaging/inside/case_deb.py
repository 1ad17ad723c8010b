"""The life of the Debian package, in the order of the file: install, restart, kill, upgrade, downgrade,
purge refused, remove, install again, purge.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.cri import api_pb2 as pb
from supervisor.settings import FIXED_UIDS
from tests.packaging.inside.node import (
    LIBRARY,
    InstalledNode,
    Survivor,
    attempt,
    restarted,
    run,
    upgraded,
    wait_for,
)
from tests.support import packages
from tests.support.docs import Command, commands
from tests.support.images import served

FIRST, SECOND = str(packages.package("deb1")), str(packages.package("deb2"))
CONFIGURATION = Path("/etc/bulkhead/bulkhead.toml")
UNIT = {
    "Type": "notify",
    "NotifyAccess": "main",
    "KillMode": "process",
    "Delegate": "yes",
    "WatchdogUSec": "1min",
    "Restart": "always",
    "OOMPolicy": "continue",
    "OOMScoreAdjust": "-999",
    "TasksMax": "infinity",
    "RuntimeDirectoryPreserve": "yes",
}


@pytest.fixture(scope="session")
def node() -> Iterator[InstalledNode]:
    with served(larger_files=1) as images:
        found = InstalledNode("systemd", images)
        found.configure()
        run("dpkg", "--install", FIRST)
        found.pull()
        yield found


@pytest.fixture(scope="session")
def survivor(node: InstalledNode) -> Survivor:
    return Survivor(node)


def case_an_installation_is_a_service_that_is_ready(node: InstalledNode) -> None:
    assert node.active()
    assert "ready" in node.property("StatusText")
    assert {name: node.property(name) for name in UNIT} == UNIT
    assert "kubelet.service" in node.property("Before")
    for kind in FIXED_UIDS:
        assert pwd.getpwnam(f"bulkhead-{kind}").pw_uid < 1000
    assert {worker.uid for worker in node.workers() if worker.kind == "cri"} == {
        pwd.getpwnam("bulkhead-cri").pw_uid
    }
    assert run("bulkheadctl", "version").startswith("Version:")
    assert run("bulkhead", "version").startswith("bulkhead 1.")


def case_the_journal_has_priorities_and_fields(node: InstalledNode, survivor: Survivor) -> None:
    words = ("journalctl", "--unit", "bulkhead", "--output", "json", "--no-pager")
    entries = [
        json.loads(line) for line in run(*words, f"BULKHEAD_CONTAINER={survivor.container_id}").splitlines()
    ]
    assert {entry["PRIORITY"] for entry in entries} == {"6"}
    assert {entry["BULKHEAD_WORKER"] for entry in entries} >= {"cri", "supervisor"}
    started = next(entry for entry in entries if entry.get("BULKHEAD_RPC") == "StartContainer")
    assert (started["BULKHEAD_CODE"], started["_SYSTEMD_UNIT"]) == ("ok", "bulkhead.service")
    assert float(started["BULKHEAD_MS"]) > 0
    assert run(*words, "--priority", "warning")
    wait_for(lambda: "1 pods, 1 containers running" in node.property("StatusText"), "the status has counts")


def case_no_module_of_ours_is_found_by_others(node: InstalledNode) -> None:
    for name in ("supervisor", "workers", "ipc", "grpc", "msgspec"):
        done = attempt("/usr/bin/python3", "-I", "-c", f"import {name}")
        assert "ModuleNotFoundError" in done.stderr, name
    done = attempt("bulkhead", "version", PYTHONPATH="/nonexistent", PYTHONHOME="/nonexistent")
    assert done.returncode == 0, "the environment reaches the launcher"


def case_a_restart_leaves_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    restarted(node, "systemctl", "restart", "bulkhead")
    survivor.check()


def case_a_kill_of_the_whole_service_leaves_containers_running(
    node: InstalledNode, survivor: Survivor
) -> None:
    restarted(node, "systemctl", "kill", "-s", "KILL", "bulkhead")
    survivor.check()


def case_a_kill_of_the_service_and_a_monitor_together_loses_nothing(node: InstalledNode) -> None:
    """systemd has kept what the monitor's successor needs."""
    other = Survivor(node)
    assert int(node.property("NFileDescriptorStore")) >= 1
    directory = Path("/run/bulkhead/monitors") / other.container_id
    monitor = (directory / "lock").read_text().split()[0]
    restarted(node, "sh", "-c", f"systemctl kill -s KILL bulkhead && kill -KILL {monitor}")
    node.wait_answering()
    wait_for(lambda: (directory / "lock").read_text().split()[0] != monitor, "a successor")
    assert node.pid(other.container_id) == other.pid
    wait_for(lambda: any("may be missing here" in line for line in other.lines()), "it says so")
    had = len(other.lines())
    wait_for(lambda: len(other.lines()) > had + 2, "it logs on")
    numbers = [int(line) for line in other.lines() if line.isdigit()]
    assert numbers == sorted(set(numbers))
    assert "output_lost" not in json.loads((directory / "state.json").read_text())
    kept = int(node.property("NFileDescriptorStore"))
    node.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=other.pod_id), timeout=60)
    node.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=other.pod_id), timeout=60)
    wait_for(lambda: int(node.property("NFileDescriptorStore")) == kept - 1, "what nobody needs is not kept")


def case_an_upgrade_leaves_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    CONFIGURATION.write_text(CONFIGURATION.read_text() + '\nlog_level = "debug"\n')
    old = node.tree()
    run("dpkg", "--unpack", SECOND)
    assert not (LIBRARY / old).exists()
    (storage,) = (worker.pid for worker in node.workers() if worker.kind == "storage")
    os.kill(storage, signal.SIGKILL)  # its tree is gone, but not for those who know where to look
    wait_for(lambda: ready_storage(node) not in {0, storage}, "storage is back")
    upgraded(node, survivor, ("dpkg", "--configure", "bulkhead"))
    assert (LIBRARY / "current").readlink() == Path(node.tree())
    assert node.tree() == old.removesuffix("-1") + "-2"
    assert not (LIBRARY / old).exists()
    assert 'log_level = "debug"' in CONFIGURATION.read_text()
    survivor.check()
    check_nothing_was_written_into_the_package()


def ready_storage(node: InstalledNode) -> int:
    found = [worker for worker in node.workers() if worker.kind == "storage" and worker.state == "ready"]
    return found[0].pid if found else 0


def check_nothing_was_written_into_the_package() -> None:
    changed = [line.split()[-1] for line in attempt("dpkg", "--verify", "bulkhead").stdout.splitlines()]
    # man pages and documents are excluded from the test's root file system
    assert [path for path in changed if not path.startswith("/usr/share/")] == [str(CONFIGURATION)]
    listed = set(run("dpkg", "--listfiles", "bulkhead").splitlines())
    assert {str(path) for path in LIBRARY.rglob("*")} - listed == {str(LIBRARY / "current")}


def case_a_downgrade_leaves_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    upgraded(node, survivor, ("dpkg", "--install", FIRST))
    assert node.tree().endswith("-1")
    survivor.check()


def case_a_purge_refuses_while_containers_run(node: InstalledNode, survivor: Survivor) -> None:
    done = attempt("dpkg", "--purge", "bulkhead")
    assert done.returncode != 0
    assert "1 containers run" in done.stderr
    assert "BULKHEAD_PURGE=force" in done.stderr
    assert CONFIGURATION.exists()
    wait_for(node.active, "the service is up")
    survivor.check()


def case_a_removal_leaves_containers_and_configuration(node: InstalledNode, survivor: Survivor) -> None:
    done = attempt("dpkg", "--remove", "bulkhead")
    assert done.returncode == 0, done.stderr
    assert "1 containers run on" in done.stderr
    assert not LIBRARY.exists()
    assert CONFIGURATION.exists()
    survivor.check_process()
    # the purge of a package that is removed cannot be refused any earlier; it touches nothing of the
    # containers
    done = attempt("dpkg", "--purge", "bulkhead")
    assert done.returncode != 0
    assert "containers run" in done.stderr
    survivor.check_process()


def case_a_new_installation_takes_containers_over(node: InstalledNode, survivor: Survivor) -> None:
    run("dpkg", "--install", FIRST)
    survivor.check()
    node.stop_container(survivor.container_id)
    assert node.ended(survivor.container_id).exit_code == 137


class Reader:
    """Somebody who types what the documents say. PODs and CONTAINERs are those that he made last."""

    def __init__(self, node: InstalledNode, directory: Path) -> None:
        self.node = node
        self.directory = directory
        self.known = {"IMAGE": node.images.busybox, "docker.io/library/busybox:latest": node.images.busybox}
        pod = {
            "metadata": {"name": "read", "namespace": "docs", "uid": "u"},
            "log_directory": "/var/log/pods/read",
        }
        container = {
            "metadata": {"name": "c"},
            "image": {"image": node.images.busybox},
            "command": ["sleep", "1000"],
            "log_path": "c.log",
        }
        (directory / "pod.json").write_text(json.dumps(pod))
        (directory / "container.json").write_text(json.dumps(container))

    def types(self, command: Command) -> None:
        """Run one command as it stands there. Raises AssertionError if it fails."""
        words = [
            self.known.get(word.rpartition("=")[2], word) if "=" not in word else word
            for word in command.words
        ]
        words = [word.replace("=CONTAINER", f"={self.known.get('CONTAINER', '')}") for word in words]
        endless = "--watch" in words or ("-f" in words and "logs" in words) or "events" in words
        done = subprocess.run(
            ["timeout", "2" if endless else "90", *words],
            cwd=self.directory,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        # info says by its code that this machine has no memory controller
        expected = {124} if endless else {0, 1} if words[1] == "info" else {0}
        assert done.returncode in expected, f"{command.place}: {words}: {done.stdout}{done.stderr}"
        for made, name in (("runp", "POD"), ("create", "CONTAINER")):
            if words[1] == made:
                self.known[name] = done.stdout.strip()


def case_every_command_of_the_documents_runs(node: InstalledNode, tmp_path: Path) -> None:
    os.makedirs("/etc/crio", exist_ok=True)
    Path("/etc/crio/crio.conf").write_text('[crio.runtime]\nlog_level = "info"\n')
    reader = Reader(node, tmp_path)
    found = [one for one in commands("bulkhead", "bulkheadctl", "systemctl", "journalctl") if one.block]
    assert len(found) > 40
    last = [one for one in found if "rmp" in one.words]
    wipes = [one for one in found if "wipe" in one.words]  # for a service that is stopped
    for command in [one for one in found if one not in last + wipes and "serve" not in one.words] + last:
        reader.types(command)
        time.sleep(1.1 if "bundle" in command.words else 0)  # its default name has the second in it
        node.wait_answering()
    run("systemctl", "stop", "bulkhead")
    for command in wipes:
        reader.types(command)
    run("systemctl", "start", "bulkhead")
    node.wait_answering()
    node.pull()


def case_the_init_script_serves_a_host_without_systemd(node: InstalledNode) -> None:
    script = str(packages.REPO / "packaging/common/init/bulkhead")
    run("systemctl", "stop", "bulkhead")
    assert attempt(script, "status").returncode == 3
    run(script, "start")
    node.wait_answering()
    _, container_id = node.running("", ["sleep", "1000"])
    pid = node.pid(container_id)
    assert "is running" in run(script, "status")
    run(script, "reload")
    before = run(script, "status")
    run(script, "upgrade")
    assert run(script, "status") == before
    assert node.pid(container_id) == pid
    run(script, "restart")
    node.wait_answering()
    assert node.pid(container_id) == pid
    assert "configuration reloaded" in Path("/var/log/bulkhead.log").read_text()
    run(script, "stop")
    assert attempt(script, "status").returncode == 3
    assert Path(f"/proc/{pid}").exists()
    run("systemctl", "start", "bulkhead")
    assert node.pid(container_id) == pid


def case_a_forced_purge_leaves_nothing(node: InstalledNode) -> None:
    """Wherever state is, by file or by flag; what lies beside it is not the package's."""
    run("bulkheadctl", "rmp", "--all", "--force")
    run("systemctl", "stop", "bulkhead")
    beside = Path("/var/lib/elsewhere/beside")
    beside.parent.mkdir()
    beside.touch()
    moved = Path("/etc/bulkhead/bulkhead.toml.d/20-root.toml")
    moved.write_text('root = "/var/lib/elsewhere"\n')
    with Path("/etc/default/bulkhead").open("a") as file:
        file.write('BULKHEAD_OPTIONS="--run-root /run/elsewhere --listen /run/bulkhead/bulkhead.sock"\n')
    run("systemctl", "start", "bulkhead")
    node.wait_answering()
    node.pull()
    node.running("", ["sleep", "1000"])
    assert Path("/var/lib/elsewhere/layers").exists()
    assert len(list(Path("/run/elsewhere/monitors").iterdir())) == 1
    assert "1 containers run" in attempt("dpkg", "--purge", "bulkhead").stderr
    done = attempt("dpkg", "--purge", "bulkhead", BULKHEAD_PURGE="force")
    assert done.returncode == 0, done.stderr
    gone = (
        "/run/bulkhead",
        "/var/lib/bulkhead",
        "/usr/lib/bulkhead",
        "/etc/default/bulkhead",
        "/run/elsewhere",
    )
    assert [path for path in gone if Path(path).exists()] == []
    assert list(beside.parent.iterdir()) == [beside]
    # what an administrator has put there is not the package's
    left = [path for path in Path("/etc/bulkhead").rglob("*") if path.is_file()]
    assert sorted(path.name for path in left) == ["10-test.toml", "20-root.toml"]
    moved.unlink()
    run("systemctl", "stop", "bulkhead-*.slice")  # of this instance's pods; that of the usual one stays, too
    assert node.settled_leftovers() == []
    assert attempt("dpkg", "--status", "bulkhead").returncode != 0
    assert "bulkhead" not in run("systemctl", "list-unit-files", "--no-pager")
