"""bulkheadctl against a whole daemon: every command in words and in JSON; errors are sentences."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import pytest

from tests.support import machine
from tests.support.daemon import REPO, Node, wait_for
from tests.support.images import Served, served

COUNT = 'i=0; while true; do echo "out $i"; echo "err $i" >&2; i=$((i+1)); sleep 0.05; done'
REFUSED, USAGE, UNREACHABLE = 1, 2, 3


@dataclass
class World:
    """A node with one running container, and the words that reach it."""

    node: Node
    images: Served
    pod_file: str
    container_file: str
    pod: str = ""
    container: str = ""

    def __call__(self, *words: str) -> str:
        return self.node.ctl(*words).stdout

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "-o", "json"))

    def fails(self, *words: str) -> tuple[int, str]:
        done = self.node.ctl(*words, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr.removeprefix("bulkheadctl: ").rstrip("\n")


@pytest.fixture(scope="module")
def ctl() -> Iterator[World]:
    machine.enter()
    with served(larger_files=100) as images, Node(registries=images.registries_conf, bridge="bhctl0") as node:
        pod = {
            "metadata": {"name": "shown", "namespace": "tests", "uid": "u"},
            "log_directory": str(node.logs),
            "labels": {"app": "shown"},
        }
        container = {
            "metadata": {"name": "counter"},
            "image": {"image": images.busybox},
            "command": ["sh", "-c", COUNT],
            "log_path": "counter.log",
        }
        (node.root / "pod.json").write_text(json.dumps(pod))
        (node.root / "container.json").write_text(json.dumps(container))
        world = World(node, images, str(node.root / "pod.json"), str(node.root / "container.json"))
        world("pull", images.busybox)
        world.pod = world("runp", world.pod_file).strip()
        world.container = world("create", world.pod, world.container_file, world.pod_file).strip()
        assert world("start", world.container).strip() == world.container
        yield world
        world("stop", "--grace", "0", world.container)
        world("rm", world.container)
        world("stopp", world.pod)
        assert world("rmp", world.pod) == f"Removed sandbox {world.pod}\n"
        assert world("pods", "-q") == world("ps", "-a", "-q") == ""


def test_tables_name_what_json_tells_whole(ctl: World) -> None:
    tables = {
        "version": "RuntimeName:        bulkhead",
        "status": "RuntimeReady  True",
        "info": "NetworkReady  True",
        "pods": "shown",
        "ps": ctl.images.busybox,
        "images": "busybox",
        "imagefsinfo": str(ctl.node.state),
        "workers": "supervisor",
    }
    for command, expected in tables.items():
        assert expected in ctl(command)
        assert json.dumps(ctl.json(command))
    assert ctl.json("version")["runtimeName"] == "bulkhead"
    assert ctl.json("pods", "--label", "app=shown")[0]["id"] == ctl.pod
    assert ctl.json("pods", "--label", "app=other") == []
    assert ctl.json("ps", "-p", ctl.pod[:8])[0]["id"] == ctl.container
    assert ctl.json("ps", "--state", "exited") == []


def test_ids_alone_are_one_a_line_and_none_is_no_line(ctl: World) -> None:
    assert ctl("pods", "-q") == f"{ctl.pod}\n"
    assert ctl("ps", "-q") == f"{ctl.container}\n"
    assert ctl("ps", "-q", "--state", "exited") == ""


def test_everything_about_one_thing_is_json(ctl: World) -> None:
    pod = json.loads(ctl("inspectp", ctl.pod[:10]))
    assert pod["status"]["network"]["ip"]
    container = json.loads(ctl("inspect", ctl.container))
    assert container["status"]["logPath"] == str(ctl.node.logs / "counter.log")
    assert json.loads(ctl("inspecti", ctl.images.busybox))["image"]["repoTags"] == [ctl.images.busybox]


def test_what_containers_use_is_told(ctl: World) -> None:
    head, row = ctl("stats").splitlines()
    assert head.split()[:2] == ["CONTAINER", "ID"]
    assert row.split()[:2] == [ctl.container[:13], "counter"]
    (one,) = ctl.json("stats", "-p", ctl.pod)
    assert int(one["cpu"]["usageCoreNanoSeconds"]["value"]) > 0
    assert ctl.json("stats", "--pod", "other") == ctl.json("stats", "other") == []


def test_events_are_told_as_they_come(ctl: World) -> None:
    sandbox = json.loads(Path(ctl.pod_file).read_text())
    sandbox["metadata"] = {"name": "watched", "namespace": "tests", "uid": "w"}
    (ctl.node.root / "watched.json").write_text(json.dumps(sandbox))
    command = [
        sys.executable,
        "-m",
        "supervisor.cli.bulkheadctl",
        "-r",
        str(ctl.node.socket),
        "events",
        "-n",
        "4",
    ]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as follower:
        time.sleep(1.0)  # the stream is open when the first event is made
        pod = ctl("runp", str(ctl.node.root / "watched.json")).strip()
        ctl("rmp", "--force", pod)
        told, _ = follower.communicate(timeout=20)
    assert follower.returncode == 0
    lines = [line.split() for line in told.splitlines()]
    kinds = ["created", "started", "stopped", "deleted"]
    assert [line[1:] for line in lines] == [[kind, "pod", pod[:13], "tests/watched"] for kind in kinds]
    assert all(line[0].startswith("20") for line in lines)
    assert ctl.fails("events", "-n", "-1")[0] == USAGE


def test_shells_are_told_what_there_is(ctl: World) -> None:
    assert ctl("complete", "pods") == f"{ctl.pod[:13]}\ttests/shown\n"
    assert ctl("complete", "containers") == f"{ctl.container[:13]}\tcounter of tests/shown, running\n"
    assert ctl("complete", "images").partition("\t")[0] == ctl.images.busybox
    nobody = ctl.node.ctl("-r", f"{ctl.node.root}/none.sock", "complete", "pods", check=False)
    assert (nobody.returncode, nobody.stdout, nobody.stderr) == (UNREACHABLE, "", "")


def test_workers_are_told_with_what_they_use_and_what_holds_in_them(ctl: World) -> None:
    told = {worker["kind"]: worker for worker in ctl.json("workers")}
    assert {"supervisor", "cri", "image", "storage", "network", "stream", "ops", "monitor"} <= told.keys()
    use = told["cri"]["usage"]
    assert use["pss"] > 0 < use["descriptors"]
    assert told["cri"]["uid"] != 0
    assert json.loads(ctl("workers", "--json"))[0]["kind"] == "supervisor"
    held = [line.split() for line in ctl("workers", "--sandbox").splitlines()]
    assert ["cri", "capabilities", "none"] in held


def test_a_worker_is_restarted_by_its_kind(ctl: World) -> None:
    before = ctl.node.pids("storage")
    assert ctl("restart", "storage") == "storage: restarted\n"
    assert ctl.node.pids("storage") != before
    assert ctl.fails("restart", "nothing")[0] == REFUSED


def test_exec_passes_output_and_code_on(ctl: World) -> None:
    done = ctl.node.ctl(
        "exec", "--sync", ctl.container, "sh", "-c", "echo o; echo e >&2; exit 7", check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "o\n", "e\n")
    code, sentence = ctl.fails("exec", "-s", "--timeout", "1", ctl.container, "sleep", "60")
    assert (code, sentence) == (REFUSED, "command timed out after 1 s (DEADLINE_EXCEEDED)")
    assert ctl.fails("exec", ctl.container) == (USAGE, "exec needs a command")


def test_logs_are_shown_cut_and_followed_over_a_restart_of_cri(ctl: World) -> None:
    wait_for(lambda: "out 5" in ctl("logs", ctl.container), "it logs")
    assert len(ctl("logs", "--tail", "4", ctl.container).splitlines()) <= 4
    assert "T" in ctl("logs", "--timestamps", "--tail", "40", ctl.container).split(" ")[0]
    command = [sys.executable, "-m", "supervisor.cli.bulkheadctl", "-r", str(ctl.node.socket)]
    command += ["logs", "-f", ctl.container]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"out 0\n"
        ctl.node.kill_worker("cri")
        seen = 0
        end = time.monotonic() + 2
        while time.monotonic() < end:
            number = int(follower.stdout.readline().split()[1])
            assert number == seen + 1
            seen = number
        follower.terminate()
    ctl.node.wait_ready()


def test_a_pull_draws_a_bar_where_somebody_watches(ctl: World) -> None:
    code, drawn = in_terminal(ctl, "pull", ctl.images.larger)
    assert code == 0
    assert "larger:1" in drawn
    assert len(set(re.findall(r"  ([0-9a-f]{13}) ", drawn))) == 4  # a bar for each layer
    assert "━" in drawn
    assert "Image is up to date for sha256:" in drawn
    assert "\x1b" not in ctl("pull", ctl.images.larger)
    assert ctl("rmi", ctl.images.larger) == f"Deleted: {ctl.images.larger}\n"


def test_a_narrow_terminal_cuts_no_pid(ctl: World) -> None:
    (pid,) = ctl.node.pids("supervisor")
    _, drawn = in_terminal(ctl, "workers")
    assert f" {pid} " in drawn


def in_terminal(ctl: World, *words: str) -> tuple[int, str]:
    """Run bulkheadctl on a terminal of 80 columns; return its exit code and what it drew."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPO)
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        command = [sys.executable, "-m", "supervisor.cli.bulkheadctl", "-r", str(ctl.node.socket)]
        command += ["--run-root", str(ctl.node.run_root), *words]
        os.execve(sys.executable, command, environment)
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        drawn = b"".join(iter(lambda: _part(screen), b""))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), drawn.decode()


def _part(screen: RawIOBase) -> bytes:
    try:
        return screen.read(65536) or b""
    except OSError:  # EIO: the other side is closed
        return b""


def test_errors_are_sentences_with_a_code(ctl: World) -> None:
    gone = "127.0.0.1:1/gone:1"
    code, sentence = ctl.fails("pull", gone)
    assert code == REFUSED
    assert sentence.startswith("RegistryUnavailable")
    for command in ("inspect", "inspectp", "start", "logs"):
        code, sentence = ctl.fails(command, "nothing")
        assert code == REFUSED
        assert sentence.endswith("has the id nothing (NOT_FOUND)")
    for command in ("inspecti", "rmi"):
        assert ctl.fails(command, "nothing") == (REFUSED, "no such image: nothing")
    assert ctl.fails("rmi", ctl.images.busybox)[0] == REFUSED
    assert ctl.fails("runp", "--runtime", "none", ctl.pod_file)[0] == REFUSED


def test_one_of_several_that_fails_is_told_beside_the_others(ctl: World) -> None:
    done = ctl.node.ctl("rmi", "nothing", "nothing-else", check=False)
    assert done.returncode == REFUSED
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"bulkheadctl: {name}: no such image: {name}" for name in ("nothing", "nothing-else")
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["runp", "/no/such.json"],
        ["stop", "--grace", "-1", "x"],
        ["exec", "--timeout", "soon", "x", "true"],
        ["pull"],
        ["ps", "-o", "xml"],
    ],
)
def test_wrong_usage_is_told_before_anything_is_asked(ctl: World, words: list[str], tmp_path: Path) -> None:
    assert ctl.fails(*words)[0] == USAGE
    unreachable = ctl.node.ctl("-r", str(tmp_path / "none.sock"), "version", check=False)
    assert unreachable.returncode == UNREACHABLE
    assert unreachable.stderr == (
        f"bulkheadctl: no runtime answers at {tmp_path}/none.sock: No such file or directory\n"
    )
