"""Runs in: the tests, as root. What docs/sandbox.md says is what /proc says of a whole daemon."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc import capabilities
from ipc.messages.supervisor import WorkerState
from supervisor.sandbox.namespaces import FLAGS
from supervisor.sandbox.page import WORKERS
from supervisor.sandbox.spec import Sandbox
from supervisor.table import TABLE
from tests.crash.crash_world import World
from tests.crash.worlds import world_of_its_own

KINDS = [entry.kind for entry in WORKERS]
LISTENING = "0A"  # the state of a TCP socket in /proc/net/tcp
OWN_MOUNTS = {"/"}  # the root of a view


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_its_own("bhlive0") as world:
        for kind in KINDS:
            world.wake(kind)
        yield world


@pytest.fixture
def workers(world: World) -> dict[str, WorkerState]:
    return {one.kind: one for one in world.node.workers() if one.kind in KINDS and one.pid}


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def namespaces(pid: int) -> dict[str, str]:
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in FLAGS}


def held(pid: int) -> set[str]:
    """Capabilities that a process has or can take."""
    fields = status(pid)
    mask = 0
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        mask |= int(fields[name], 16)
    return set(capabilities.from_mask(mask))


def declared(kind: str) -> Sandbox:
    sandbox = TABLE[kind].sandbox
    assert sandbox is not None
    return sandbox


@pytest.mark.parametrize("kind", KINDS)
def test_ids_capabilities_namespaces_and_filters_are_as_declared(
    world: World, workers: dict[str, WorkerState], kind: str
) -> None:
    worker, sandbox = workers[kind], declared(kind)
    report = worker.sandbox
    assert report is not None
    fields = status(worker.pid)
    assert set(fields["Uid"].split()) == {str(worker.uid)} == {str(report.uid)}
    assert set(fields["Gid"].split()) == {str(report.gid)}
    assert (worker.uid == 0) == (TABLE[kind].user == "root")
    assert fields["Groups"] == ""
    assert held(worker.pid) == set(sandbox.capabilities) == set(report.capabilities)
    assert set(capabilities.from_mask(int(fields["CapBnd"], 16))) == set(sandbox.capabilities)
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert world.node.daemon is not None
    ours, theirs = namespaces(world.node.daemon.pid), namespaces(worker.pid)
    assert {name for name in ours if ours[name] != theirs[name]} == set(sandbox.namespaces)
    assert (report.landlock > 0) == sandbox.landlock


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_mounted_is_the_view_and_nothing_else(
    world: World, workers: dict[str, WorkerState], kind: str
) -> None:
    sandbox = declared(kind)
    if not sandbox.view:
        return  # the host's mounts, by the namespace above
    pid = workers[kind].pid
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    options = {words[4]: set(words[5].split(",")) for words in mounts}
    binds = {bind.path.replace("{run_root}", str(world.node.run_root)): bind for bind in sandbox.view}
    templates = [path for path in binds if "{" in path]  # paths of the configuration
    trees = tuple(f"{path}/" for path, bind in binds.items() if bind.tree)
    own = str(world.node.root)
    for path, flags in options.items():
        known = path in binds or path in OWN_MOUNTS or path.startswith(trees)
        assert known or (templates and path.startswith(own)), path
        if path != "/" and not path.startswith("/dev/"):
            assert {"nosuid", "nodev", "noexec"} <= flags, (path, flags)
        if path in binds and not binds[path].writable:
            assert "ro" in flags, path
    # what is there is what leads to a mount, and nothing besides
    reachable = {f"/{name}" for name in os.listdir(f"/proc/{pid}/root")}
    assert reachable <= {f"/{path.split('/')[1]}" for path in options if path != "/"}


def sockets_of(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed just now
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
            found |= {match.group(1)} if match else set()
    return found


def internet_sockets(pids: list[int]) -> dict[str, str]:
    """Every IP socket of the namespaces that these processes are in: inode, and its state."""
    found: dict[str, str] = {}
    for pid in pids:
        for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                found[words[9]] = words[3] if table.startswith("tcp") else table
    return found


def test_who_holds_a_network_socket_holds_no_capability(
    world: World, workers: dict[str, WorkerState]
) -> None:
    """But for the supervisor's listening ones, from which it neither accepts nor reads."""
    assert world.node.daemon is not None
    supervisor = world.node.daemon.pid
    monitors = world.node.pids("monitor")
    everybody = {one.pid: one.kind for one in workers.values()} | {supervisor: "supervisor"}
    everybody |= dict.fromkeys([*monitors, *world.node.pids("nursery")], "monitor")
    address = listening_port(supervisor)
    with socket.create_connection(("127.0.0.1", address), timeout=10) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")  # stream reads it and waits for more
        known = internet_sockets(list(everybody))
        for pid, kind in everybody.items():
            mine = {known[inode] for inode in sockets_of(pid) if inode in known}
            if kind == "supervisor":
                assert mine == {LISTENING}
            elif kind in TABLE and TABLE[kind].network:
                assert held(pid) == set()
            else:
                assert mine == set(), f"{kind} has {mine}"
        stream = {known[inode] for inode in sockets_of(workers["stream"].pid) if inode in known}
        assert stream > {LISTENING}


def listening_port(pid: int) -> int:
    """The port of the stream server, from the supervisor's own descriptors."""
    mine = sockets_of(pid)
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[9] in mine and words[3] == LISTENING:
            return int(words[1].split(":")[1], 16)
    raise AssertionError("the supervisor listens on no port")
