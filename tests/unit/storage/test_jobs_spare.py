"""A spare child takes the next job; whatever cannot be told to it is forked for, and nobody can tell."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ipc.errors import Code, RemoteError
from ipc.loop import Loop
from ipc.messages.storage import PodSetup
from workers import jobs_spare
from workers.jobs import Jobs


def look(body: PodSetup, shared: object, number: int) -> list[Any]:
    """What a child sees."""
    return [os.getpid(), body.hostname, body.resolv_conf, shared == SHARED, number]


def refuse(_why: str) -> None:
    raise RemoteError(Code.NOT_FOUND, "not here", reason="Because")


SHARED = ("made before the fork",)
BODY = PodSetup(pod_id="p", hostname="h", resolv_conf=b"\xff")


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def jobs(loop: Loop) -> Iterator[Jobs]:
    made = Jobs(loop)
    made.keep_spare(lambda: SHARED)
    assert outcome(loop, lambda done: made.start(os.getpid, on_done=done))
    assert len(spares()) == 1
    yield made
    made.kill_all()
    for _ in range(50):
        loop.turn(0.01)
    assert spares() == []


def spares() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(pid) for pid in file.read().split()]


def outcome(loop: Loop, start: Callable[[Callable[[Any], object]], object]) -> Any:
    found: list[Any] = []
    start(found.append)
    while not found:
        loop.turn(5)
    loop.turn(0)
    return found[0]


def test_the_spare_child_runs_the_job_and_another_one_follows(loop: Loop, jobs: Jobs) -> None:
    for number in range(3):
        (spare,) = spares()
        seen = outcome(loop, lambda done: jobs.start(look, BODY, jobs.shared, 7, on_done=done))
        assert seen == [spare, "h", b"\xff", True, 7]
        assert spares() != [spare], number


def test_an_error_of_a_told_job_is_its_outcome(loop: Loop, jobs: Jobs) -> None:
    error = outcome(loop, lambda done: jobs.start(refuse, "x", on_done=done))
    assert (error.code, error.text, error.reason) == (Code.NOT_FOUND, "not here", "Because")


def test_what_cannot_be_told_is_forked_for(loop: Loop, jobs: Jobs) -> None:
    (spare,) = spares()
    read_fd, write_fd = os.pipe()
    forked = [
        outcome(loop, lambda done: jobs.start(lambda: [os.getpid()][0], on_done=done)),
        outcome(loop, lambda done: jobs.start(os.getpid, on_done=done, fds=[write_fd])),
    ]
    assert spare not in forked
    assert spares() == [spare]
    assert jobs_spare.tell(refuse, ["x" * jobs_spare.LIMIT], None) is None
    assert jobs_spare.tell(refuse, [object()], None) is None
    for fd in (read_fd, write_fd):
        os.close(fd)


def test_a_spare_child_that_died_is_no_loss(loop: Loop, jobs: Jobs) -> None:
    (spare,) = spares()
    os.kill(spare, signal.SIGKILL)
    os.waitid(os.P_PID, spare, os.WEXITED | os.WNOWAIT)
    assert outcome(loop, lambda done: jobs.start(os.getpid, on_done=done)) != spare
    loop.turn(0)
    assert len(spares()) == 1


def test_a_told_job_can_be_killed_and_renewing_replaces_the_spare_child(loop: Loop, jobs: Jobs) -> None:
    why = RemoteError(Code.CANCELLED, "no more")

    def start(done: Callable[[Any], object]) -> None:
        jobs.start(signal.pause, on_done=done).kill(why)

    assert outcome(loop, start) is why
    (before,) = spares()
    jobs.renew_spare()
    loop.turn(0)
    assert before not in outcome_pids(loop, jobs)


def test_a_spare_child_does_not_stay_for_ever(loop: Loop) -> None:
    jobs = Jobs(loop)
    jobs.keep_spare(seconds=0.05)
    assert outcome(loop, lambda done: jobs.start(os.getpid, on_done=done))
    assert len(spares()) == 1
    for _ in range(20):
        loop.turn(0.02)
    assert spares() == []
    jobs.kill_all()


def outcome_pids(loop: Loop, jobs: Jobs) -> list[int]:
    return [outcome(loop, lambda done: jobs.start(os.getpid, on_done=done)) for _ in range(2)]
