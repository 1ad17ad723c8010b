"""Every process killed, idle and in the middle of every operation: nothing that runs may notice.

The witness is checked after each kill; lists and states must be exact; nothing may be left behind. The death
of a leaf worker is invisible to the client but for latency, so its operations must succeed at once; when cri
or the supervisor die, the client tries again with the same arguments, as a kubelet does.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from ipc.cri import api_pb2 as cri
from tests.crash.blows import Blow, settle, steps_of, strike
from tests.crash.crash_world import World
from tests.crash.matrix import spread
from tests.crash.operations import OPERATIONS, Operation
from tests.crash.victims import VICTIMS
from tests.crash.worlds import world_of_its_own
from tests.support.daemon import wait_for

#: In which operation a kind is stopped, if not in CreateContainer.
STILL = {"image": "pull", "network": "RunPodSandbox", "network job": "RunPodSandbox"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_its_own() as world:
        yield world


#: Every other cell of the matrix, and one blow in each, where `make test-crash` strikes a dozen times in all.
CELLS = [
    (place, victim, operation)
    for place, (victim, operation) in enumerate(itertools.product(VICTIMS, OPERATIONS))
    if place % 2
]


@pytest.mark.parametrize(
    ("place", "victim", "operation"), CELLS, ids=lambda one: getattr(one, "name", None) or str(one)
)
def test_nothing_that_runs_notices_the_death_of(
    world: World, place: int, victim: str, operation: Operation
) -> None:
    steps = steps_of(world, operation, victim)
    for step in spread(steps, 1, (place % 8) / 8):
        number = signal.SIGSEGV if place % 3 else signal.SIGKILL
        strike(world, operation, Blow(victim, number, step))


@pytest.mark.parametrize("victim", VICTIMS)
def test_nothing_that_runs_notices_that_one_stands_still(world: World, victim: str) -> None:
    operation = next(one for one in OPERATIONS if one.name == STILL.get(victim, "CreateContainer"))
    steps = spread(steps_of(world, operation, victim), 3, 0.2)
    blows = [Blow(victim, signal.SIGSTOP, step) for step in steps]
    struck = any(strike(world, operation, blow, stop_seconds=1.0) for blow in blows)  # a step may not come
    assert struck or not blows


def test_after_the_death_of_cri_the_socket_answers_within_a_second(world: World) -> None:
    time.sleep(1.5)  # the floor between two crashes has passed
    world.node.kill_worker("cri")
    start = time.monotonic()
    wait_for(world.node.answers, "cri answers again", 10)
    took = time.monotonic() - start
    world.check_witness()
    assert took < 1.0


def test_after_the_death_of_the_supervisor_everything_answers_within_two_seconds(world: World) -> None:
    world.node.kill()
    assert world.node.start() < 2.0
    world.check_witness()


def test_a_container_that_ends_while_cri_and_supervisor_are_dead_is_known_exactly(world: World) -> None:
    subject = world.run_pod("ends")
    container = world.create(subject, "ends", ["sh", "-c", "sleep 0.6; exit 7"])
    world.start(container)
    world.node.kill()
    time.sleep(0.8)
    world.node.start()
    status = world.node.runtime.ContainerStatus(
        cri.ContainerStatusRequest(container_id=container), timeout=10
    ).status
    assert status.exit_code == 7
    assert status.finished_at > status.started_at > 0
    world.stop_pod(subject)
    world.remove_pod(subject)


def test_a_burst_of_deaths_of_every_worker_at_once_is_survived(world: World) -> None:
    threads = [
        threading.Thread(target=world.node.kill_worker, args=(kind,))
        for kind in ("cri", "storage", "network")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pod = world.patient(lambda: world.run_pod("burst"))
    world.recovered()
    world.check_witness()
    world.stop_pod(pod)
    world.remove_pod(pod)
    settle(world)
