"""The life of the Debian package, in the order of the file: install, restart, kill, upgrade, downgrade,
purge refused, remove, install again, purge.
"""

from __future__ import annotations

import json
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.settings import FIXED_UIDS
from tests.packaging.inside.node import LIBRARY, InstalledNode, Survivor, attempt, restarted, run, wait_for
from tests.support import packages
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


def case_an_upgrade_leaves_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    CONFIGURATION.write_text(CONFIGURATION.read_text() + '\nlog_level = "debug"\n')
    old = node.tree()
    restarted(node, "dpkg", "--install", SECOND)
    assert (LIBRARY / "current").readlink() == Path(node.tree())
    assert node.tree() == old.removesuffix("-1") + "-2"
    assert not (LIBRARY / old).exists()
    assert 'log_level = "debug"' in CONFIGURATION.read_text()
    survivor.check()
    check_nothing_was_written_into_the_package()


def check_nothing_was_written_into_the_package() -> None:
    changed = [line.split()[-1] for line in attempt("dpkg", "--verify", "bulkhead").stdout.splitlines()]
    # man pages and documents are excluded from the test's root file system
    assert [path for path in changed if not path.startswith("/usr/share/")] == [str(CONFIGURATION)]
    listed = set(run("dpkg", "--listfiles", "bulkhead").splitlines())
    assert {str(path) for path in LIBRARY.rglob("*")} - listed == {str(LIBRARY / "current")}


def case_a_downgrade_leaves_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    restarted(node, "dpkg", "--install", FIRST)
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


def case_a_forced_purge_leaves_nothing(node: InstalledNode) -> None:
    node.running("", ["sleep", "1000"])
    done = attempt("dpkg", "--purge", "bulkhead", BULKHEAD_PURGE="force")
    assert done.returncode == 0, done.stderr
    for path in ("/run/bulkhead", "/var/lib/bulkhead", "/usr/lib/bulkhead", "/etc/default/bulkhead"):
        assert not Path(path).exists(), path
    # what an administrator has put there is not the package's
    left = [path for path in Path("/etc/bulkhead").rglob("*") if path.is_file()]
    assert left == [Path("/etc/bulkhead/bulkhead.toml.d/10-test.toml")]
    assert node.settled_leftovers() == []
    assert attempt("dpkg", "--status", "bulkhead").returncode != 0
    assert "bulkhead" not in run("systemctl", "list-unit-files", "--no-pager")
