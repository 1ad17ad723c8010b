"""A monitor dies: its successor is there at once; the container, its log and its end are what they were."""

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
from workers.monitor.heir import UNSURE

SUCCESSION_SECONDS = 0.1
UNSURE_NOTE = f"up to {UNSURE} bytes may be missing".encode()
FLOOD = "i=0; while [ $i -lt 200000 ]; do echo $i; i=$((i+1)); done; sleep 1000"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_its_own("bhmons0") as world:
        yield world


def monitor_of(world: World, container: str) -> int:
    """The pid of a container's monitor, 0 without one."""
    states = world.node.workers()
    return next((one.pid for one in states if one.name == f"monitor {container}"), 0)


def behead(world: World, container: str, number: int = signal.SIGKILL) -> float:
    """Kill a container's monitor; return the seconds until another one holds its lock."""
    path = world.node.run_root / "monitors" / container / "lock"
    before, seen = path.read_text().split()[0], successions(world, container)
    start = time.monotonic()
    os.kill(int(before), number)
    wait_for(lambda: path.read_text().split()[:1] not in ([], [before]), "a successor")
    took = time.monotonic() - start
    wait_for(lambda: successions(world, container) > seen, "it has taken up")
    return took


def successions(world: World, container: str) -> int:
    """How many monitors of a container have died, as the last one noted it."""
    path = world.node.run_root / "monitors" / container / "state.json"
    found: int = json.loads(path.read_text()).get("successions", 0)
    return found


def running(world: World, script: str, pod_name: str = "") -> tuple[str, str]:
    """A pod and a container that runs a script."""
    name = pod_name or world.fresh("mon")
    pod = world.run_pod(name)
    container = world.create(pod, name, ["sh", "-c", script])
    world.start(container)
    return pod, container


def remove(world: World, pod: str) -> None:
    world.stop_pod(pod)
    world.remove_pod(pod)


def status(world: World, container: str) -> cri.ContainerStatus:
    request = cri.ContainerStatusRequest(container_id=container)
    return world.node.runtime.ContainerStatus(request, timeout=10).status


def log_of(world: World, container: str) -> list[bytes]:
    return Path(status(world, container).log_path).read_bytes().split(b"\n")[:-1]


def notes_of(world: World) -> list[bytes]:
    return [line for line in log_of(world, world.witness) if b" [bulkhead] " in line]


def exec_says(world: World, container: str) -> bytes:
    request = cri.ExecSyncRequest(container_id=container, cmd=["echo", "hello"], timeout=20)
    stdout: bytes = world.node.runtime.ExecSync(request, timeout=30).stdout
    return stdout


def test_a_successor_is_there_at_once_and_everything_goes_on(world: World) -> None:
    pid = world.witness_pid
    took = []
    for deaths, number in enumerate((signal.SIGKILL, signal.SIGSEGV), 1):
        took.append(behead(world, world.witness, number))
        said = 2 * deaths
        wait_for(lambda: len(notes_of(world)) == said, "each of two streams says it")  # noqa: B023 - at once
    assert min(took) < SUCCESSION_SECONDS
    world.check_witness()  # the same process, every number once
    assert world.witness_pid == pid
    assert exec_says(world, world.witness) == b"hello\n"
    notes = notes_of(world)
    assert all(line.split(b" ", 3)[2] == b"F" and UNSURE_NOTE in line for line in notes)
    state = json.loads((world.node.run_root / "monitors" / world.witness / "state.json").read_text())
    assert (state["successions"], state["log_bytes_unsure"]) == (2, 4 * UNSURE)
    row = next(one for one in world.node.workers() if one.name == f"monitor {world.witness}")
    assert row.restarts == 2


@pytest.mark.parametrize("code", [7, 0, 137])
def test_an_exit_code_is_exact_though_the_monitor_has_died(world: World, code: int) -> None:
    pod, container = running(world, "sleep 1000" if code == 137 else f"sleep 0.5; exit {code}")
    behead(world, container)
    if code == 137:
        time.sleep(0.4)
        os.kill(world.pid_of(container), signal.SIGKILL)
    wait_for(lambda: world.state(container) == cri.CONTAINER_EXITED, "it ends")
    found = status(world, container)
    assert found.exit_code == code
    assert found.finished_at - found.started_at > 400_000_000
    record = json.loads((world.node.run_root / "monitors" / container / "exit.json").read_text())
    assert record["log_bytes_unsure"] == 2 * UNSURE
    remove(world, pod)
    wait_for(lambda: not [left for left in world.node.leftovers() if container in left], "nothing is left")


def test_an_end_for_want_of_memory_is_known_and_a_terminal_stays_open(world: World) -> None:
    name = world.fresh("memory")
    pod = world.run_pod(name)
    eater = "sleep 0.5; exec dd if=/dev/zero of=/dev/null bs=100M"
    container = world.create(pod, name, ["sh", "-c", eater], memory=32 << 20)
    terminal = world.create(pod, name, ["sh", "-c", COUNTER], "terminal", tty=True)
    for one in (container, terminal):
        world.start(one)
        behead(world, one)
    wait_for(lambda: world.state(container) == cri.CONTAINER_EXITED, "it is killed")
    assert (status(world, container).exit_code, status(world, container).reason) == (137, "OOMKilled")
    before = len(log_of(world, terminal))
    wait_for(lambda: len(log_of(world, terminal)) > before + 5, "the terminal goes on")
    assert world.state(terminal) == cri.CONTAINER_RUNNING
    remove(world, pod)


def test_a_flood_is_logged_in_order_and_what_is_missing_is_told(world: World) -> None:
    pod, container = running(world, FLOOD)
    for _ in range(3):
        time.sleep(0.05)
        behead(world, container)
    wait_for(lambda: log_of(world, container)[-1].endswith(b" F 199999"), "the flood ends", 60)
    texts = [line.split(b" ", 3)[3] for line in log_of(world, container) if b" stdout " in line]
    notes = sum(text.startswith(b"[bulkhead]") for text in texts)
    numbers = [int(text) for text in texts if text.isdigit()]
    missing = sum(len(f"{number}\n") for number in set(range(200_000)) - set(numbers))
    assert 1 <= notes <= 3  # a successor that dies before it says so is spoken for by the next
    assert numbers == sorted(set(numbers))
    assert missing <= 3 * UNSURE
    remove(world, pod)


def test_a_monitor_that_was_started_by_an_earlier_supervisor_has_a_successor_too(world: World) -> None:
    pod, container = running(world, f"({COUNTER}) & sleep 2; exit 9")
    world.node.kill()
    world.node.start()
    time.sleep(0.3)
    behead(world, container)
    behead(world, world.witness)
    world.recovered()
    world.check_witness()
    wait_for(lambda: world.state(container) == cri.CONTAINER_EXITED, "it ends")
    assert status(world, container).exit_code == 9
    remove(world, pod)


def test_a_stop_that_loses_its_monitor_is_finished(world: World) -> None:
    pod, container = running(world, "sleep 1000")
    wait_for(lambda: monitor_of(world, container), "its monitor")
    behead(world, container)
    world.stop(container, grace=1)
    assert world.state(container) == cri.CONTAINER_EXITED
    assert status(world, container).exit_code == 137
    remove(world, pod)


def test_a_created_container_can_be_started_and_one_that_ended_stays_as_it_was(world: World) -> None:
    name = world.fresh("created")
    pod = world.run_pod(name)
    container = world.create(pod, name, SLEEP)
    behead(world, container)
    world.start(container)
    init = world.pid_of(container)
    assert alive(init)
    for _ in range(3):  # the last waits
        behead(world, container)
    assert alive(init)
    assert world.state(container) == cri.CONTAINER_RUNNING
    remove(world, pod)
    assert not alive(init)
