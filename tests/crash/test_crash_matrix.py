"""Every process killed, idle and in the middle of every operation: nothing that runs may notice.

The witness is checked after each kill; lists and states must be exact; nothing may be left behind. The death
of a leaf worker is invisible to the client but for latency, so its operations must succeed at once; when cri
or the supervisor die, the client tries again with the same arguments, as a kubelet does.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ipc.cri import api_pb2 as cri
from tests.crash.crash_world import OPERATIONS, Operation, World, witnessed
from tests.support.daemon import Node, wait_for
from tests.support.images import served

LEAVES = ("image", "storage", "network", "ops")
FRONT = ("cri", "supervisor")
#: Seconds from the start of an operation to the kill; the long form walks through more of them.
MOMENTS = (0.0, 0.004, 0.015, 0.05, 0.12) if os.environ.get("BULKHEAD_CRASH") == "long" else (0.006, 0.04)
CONFIG = "[restart]\nfailed_deaths = 10000\nmax_delay = 1.0\nreset_after = 1.0\n[timeouts]\nping = 1.0\n"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with (
        served() as images,
        Node(config=CONFIG, registries=images.registries_conf, bridge="bhcrash0") as node,
    ):
        world = World(node, images.busybox, images.larger)
        world.wake("image")
        with witnessed(world):
            yield world


def settle(world: World) -> None:
    """Wait until what a death interrupted is cleaned up: only the witness may be left."""
    wait_for(lambda: only_the_witness(world), "everything but the witness is cleaned up", 20)


def only_the_witness(world: World) -> bool:
    mine = (world.witness, world.witness_pod)
    return not [
        left for left in world.node.leftovers() if not any(one in left for one in mine) and is_extra(left)
    ]


def is_extra(left: str) -> bool:
    """The witness's own address and link carry no id; there is one of each."""
    return not left.startswith(("address ", "link "))


def networks(world: World) -> tuple[int, int]:
    left = world.node.leftovers()
    return sum(one.startswith("address ") for one in left), sum(one.startswith("link ") for one in left)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("victim", [*LEAVES, *FRONT])
def test_nothing_that_runs_notices_the_death_of(
    world: World, victim: str, operation: Operation, moment: float
) -> None:
    subject = operation.prepare(world)
    world.wake(victim)
    result = act_under_fire(world, operation, subject, victim, moment)
    operation.check(world, subject, result)
    world.check_witness()
    operation.undo(world, subject, result)
    settle(world)
    assert networks(world) == (1, 1)


def act_under_fire(world: World, operation: Operation, subject: str, victim: str, moment: float) -> object:
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(
            lambda: (
                world.patient(lambda: operation.act(world, subject))
                if victim in FRONT
                else operation.act(world, subject)
            )
        )
        time.sleep(moment)
        world.kill(victim)
        result = acting.result(90)
    world.recovered()
    return result


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
