"""The supervisor and monitors die together: what the kernel and the service manager have is taken up."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.cri import api_pb2 as cri
from tests.crash.crash_world import COUNTER, SLEEP, World
from tests.crash.worlds import world_of_its_own
from tests.support.daemon import alive, wait_for
from tests.support.service_manager import ServiceManager

#: It minds no SIGPIPE, and what it cannot write it says again.
PATIENT = "trap '' PIPE; i=0; while true; do echo $i 2>/dev/null && i=$((i+1)); sleep 0.01; done"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_its_own("bhboth0") as world:
        yield world


@pytest.fixture
def manager(world: World, tmp_path: Path) -> Iterator[ServiceManager]:
    """The daemon is a service of somebody who keeps descriptors."""
    with ServiceManager(tmp_path) as manager:
        world.node.stop()
        world.node.manager = manager
        world.node.start()
        yield manager
        world.node.manager = None


def record(world: World, container: str, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((world.node.run_root / "monitors" / container / name).read_text())
    return found


def monitor_pid(world: World, container: str) -> int:
    return int((world.node.run_root / "monitors" / container / "lock").read_text().split()[0])


def running(world: World, name: str, command: list[str], *, tty: bool = False) -> tuple[str, str]:
    pod = world.run_pod(world.fresh(name))
    container = world.create(pod, name, command, tty=tty)
    world.start(container)
    return pod, container


def die_together(world: World, *containers: str, meanwhile: float = 0.0) -> None:
    """Kill the supervisor, then these monitors, so that nobody succeeds them; start the next one."""
    monitors = [monitor_pid(world, container) for container in containers]
    world.node.kill()
    for pid in monitors:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in monitors), "they are dead")
    time.sleep(meanwhile)
    world.node.start()
    wait_for(
        lambda: all(record(world, one, "state.json").get("successions") for one in containers), "successors"
    )
    world.recovered()


def status(world: World, container: str) -> cri.ContainerStatus:
    request = cri.ContainerStatusRequest(container_id=container)
    return world.node.runtime.ContainerStatus(request, timeout=10).status


def texts(world: World, container: str) -> list[str]:
    lines = Path(status(world, container).log_path).read_text().splitlines()
    return [line.split(" ", 3)[3] for line in lines]


def ended(world: World, container: str) -> cri.ContainerStatus:
    wait_for(lambda: world.state(container) == cri.CONTAINER_EXITED, "it ends")
    return status(world, container)


def test_with_a_service_manager_that_keeps_descriptors_nothing_is_lost(
    world: World, manager: ServiceManager
) -> None:
    pod, container = running(world, "kept", ["sh", "-c", f"({COUNTER}) & sleep 3; exit 9"])
    other, terminal = running(world, "terminal", ["sh", "-c", COUNTER], tty=True)
    wait_for(
        lambda: {f"vault.{one}" for one in (container, terminal, world.witness)} <= set(manager.kept), "kept"
    )
    die_together(world, container, terminal, world.witness)
    world.check_witness()
    assert ended(world, container).exit_code == 9
    before = len(texts(world, terminal))
    wait_for(lambda: len(texts(world, terminal)) > before + 5, "the terminal goes on")
    assert "output_lost" not in record(world, terminal, "state.json")
    for one in (pod, other):
        world.stop_pod(one)
        world.remove_pod(one)
    wait_for(lambda: set(manager.kept) == {f"vault.{world.witness}"}, "what nobody needs is not kept")
    world.node.stop()  # a stop in order keeps them too: systemd gives them back if it was a restart
    world.node.start()
    monitor = monitor_pid(world, world.witness)
    os.kill(monitor, signal.SIGKILL)
    wait_for(lambda: monitor_pid(world, world.witness) != monitor, "a successor")
    world.check_witness()


def test_without_one_pipes_are_opened_again_and_an_end_is_known_when_it_has_come(world: World) -> None:
    pod, container = running(world, "pipes", ["sh", "-c", PATIENT])
    wait_for(lambda: len(texts(world, container)) > 5, "it logs")
    init = world.pid_of(container)
    die_together(world, container, meanwhile=0.3)
    assert alive(init)
    assert world.state(container) == cri.CONTAINER_RUNNING
    before = len(texts(world, container))
    wait_for(lambda: len(texts(world, container)) > before + 5, "it goes on")
    found = texts(world, container)
    numbers = [int(text) for text in found if text.isdigit()]
    assert numbers == sorted(set(numbers))
    assert any("bytes may be missing here" in text for text in found)
    request = cri.ExecSyncRequest(container_id=container, cmd=["echo", "hello"], timeout=20)
    assert world.node.runtime.ExecSync(request, timeout=30).stdout == b"hello\n"
    world.stop(container, grace=0)
    assert (ended(world, container).exit_code, alive(init)) == (137, False)
    assert status(world, container).message == ""
    world.stop_pod(pod)
    world.remove_pod(pod)
    wait_for(lambda: not [left for left in world.node.leftovers() if container in left], "nothing is left")


def test_without_one_what_cannot_be_known_is_said_to_be_unknown(world: World) -> None:
    pod, terminal = running(
        world, "hung-up", ["sh", "-c", "trap '' HUP; while :; do sleep 1; done"], tty=True
    )
    name = world.fresh("gone")
    other = world.run_pod(name)
    gone = world.create(other, name, SLEEP)
    world.start(gone)
    init = world.pid_of(gone)
    monitors = [monitor_pid(world, one) for one in (terminal, gone)]
    world.node.kill()
    for pid in [*monitors, init]:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (*monitors, init)), "reaped by others")
    world.node.start()
    world.recovered()
    found = ended(world, gone)
    assert (found.exit_code, found.reason) == (-1, "Error")
    assert "unknown" in str(record(world, gone, "exit.json")["message"])
    assert world.state(terminal) == cri.CONTAINER_RUNNING
    assert texts(world, terminal)[-1].endswith("its output is lost")
    world.stop(terminal, grace=0)
    assert ended(world, terminal).exit_code == 137
    assert "output was lost" in str(record(world, terminal, "exit.json")["message"])
    for one in (pod, other):
        world.stop_pod(one)
        world.remove_pod(one)
