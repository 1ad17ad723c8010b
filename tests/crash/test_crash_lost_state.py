"""cri is killed, its state gone, broken or of another release: pods run on and are known as they were."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.cri import api_pb2 as cri
from tests.crash.crash_world import SLEEP, World, witnessed
from tests.support.daemon import Node, alive, wait_for
from tests.support.images import served

Harm = Callable[[Path], None]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    config = "[restart]\nfailed_deaths = 10000\nmax_delay = 1.0\nreset_after = 1.0\n"
    with (
        served(larger_files=1) as images,
        Node(config=config, registries=images.registries_conf, bridge="bhlost0") as node,
    ):
        world = World(node, images.busybox, images.larger)
        world.wake("image")
        with witnessed(world):
            yield world


def remove(directory: Path) -> None:
    for path in directory.glob("state.db*"):
        path.unlink()


def scribble(directory: Path) -> None:
    for path in directory.glob("state.db*"):
        path.write_bytes(b"\xa5" * 8192)


def later_schema(directory: Path) -> None:
    with sqlite3.connect(directory / "state.db") as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")


def remove_all(directory: Path) -> None:
    """Pods must come from their containers' monitors."""
    remove(directory)
    for path in (directory / "pods").iterdir():
        path.unlink()


def listing(world: World, *pods: str) -> list[Any]:
    """Everything that clients see."""
    runtime = world.node.runtime
    found: list[Any] = [runtime.ListPodSandbox(cri.ListPodSandboxRequest(), timeout=10).items]
    for pod in pods:
        request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod)
        found.append(runtime.PodSandboxStatus(request, timeout=10).status)
    containers = runtime.ListContainers(cri.ListContainersRequest(), timeout=10).containers
    statuses = [cri.ContainerStatusRequest(container_id=one.id, verbose=True) for one in containers]
    return [*found, containers, *(runtime.ContainerStatus(one, timeout=10) for one in statuses)]


def harmed(world: World, harm: Harm) -> None:
    """Kill cri and do the harm, while the supervisor stands still and starts no other."""
    daemon = world.node.daemon
    assert daemon is not None
    [before] = world.node.pids("cri")
    daemon.send_signal(signal.SIGSTOP)
    try:
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: not alive(before), "cri is dead")
        harm(world.node.run_root / "cri")
    finally:
        daemon.send_signal(signal.SIGCONT)
    wait_for(lambda: [pid for pid in world.node.pids("cri") if pid != before], "cri runs again")
    world.recovered()


@pytest.mark.parametrize("harm", [remove, scribble, later_schema, remove_all])
def test_a_lost_state_is_made_again(world: World, harm: Harm) -> None:
    name = world.fresh("lost")
    pod = world.run_pod(name)
    empty_name = world.fresh("empty")
    pods = [pod] if harm is remove_all else [pod, world.run_pod(empty_name)]
    created, ended = world.create(pod, name, SLEEP, "created"), world.create(pod, name, ["false"], "ended")
    world.start(ended)
    wait_for(lambda: world.state(ended) == cri.CONTAINER_EXITED, "false ends")
    before = listing(world, *pods)
    harmed(world, harm)
    assert listing(world, *pods) == before
    world.check_witness()
    assert world.run_pod(name) == pod
    assert world.create(pod, name, SLEEP, "created") == created
    world.start(created)
    assert world.state(created) == cri.CONTAINER_RUNNING
    assert exec_says(world, created) == b"hello\n"
    if harm is not remove_all:
        assert world.run_pod(empty_name) == pods[1]
    wait_for(lambda: only_the_witness_and(world, created, ended, *pods), "what is known stays")
    for one in pods:
        world.stop_pod(one)
        world.remove_pod(one)
    wait_for(lambda: only_the_witness_and(world), "nothing else stays")


def test_a_file_that_was_set_aside_can_be_looked_at_and_the_log_says_so(world: World) -> None:
    harmed(world, scribble)
    directory = world.node.run_root / "cri"
    assert (directory / "state.db.damaged").read_bytes().startswith(b"\xa5")
    log = (world.node.root / "daemon.log").read_text()
    assert "the state is damaged and set aside" in log
    assert "the state has gaps and is made again" in log
    world.check_witness()


def exec_says(world: World, container: str) -> bytes:
    """Exec needs the container's OCI spec."""
    request = cri.ExecSyncRequest(container_id=container, cmd=["echo", "hello"], timeout=20)
    stdout: bytes = world.node.runtime.ExecSync(request, timeout=30).stdout
    return stdout


def only_the_witness_and(world: World, *others: str) -> bool:
    mine = (world.witness, world.witness_pod, *others)
    extra = [left for left in world.node.leftovers() if not left.startswith(("address ", "link "))]
    return all(any(one in left for one in mine) for left in extra)
