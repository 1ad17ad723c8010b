"""A child that stays takes one job after another; what cannot be told to it is forked for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import Code, RemoteError
from ipc.loop import Loop
from ipc.messages.storage import PodSetup
from workers import jobs_told
from workers.jobs import SPARE, Job, Jobs


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
    made.let_stay(lambda: SHARED)
    assert outcome(loop, lambda done: made.start(os.getpid, on_done=done)) == spares()[0]
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


def go_astray(path: str) -> int:
    """A job that leaves its process elsewhere."""
    os.chdir(path)
    return os.getpid()


def test_one_child_runs_one_job_after_another(loop: Loop, jobs: Jobs) -> None:
    (child,) = spares()
    for _ in range(3):
        seen = outcome(loop, lambda done: jobs.start(look, BODY, jobs.shared, 7, on_done=done))
        assert seen == [child, "h", b"\xff", True, 7]
        assert spares() == [child]
        assert Path(f"/proc/{child}/comm").read_text().strip() == SPARE


def test_jobs_at_once_have_a_child_each_and_not_all_of_them_stay(loop: Loop, jobs: Jobs) -> None:
    found: list[int] = []
    for _ in range(4):
        jobs.start(os.getpid, on_done=found.append)
    while len(found) < 4:
        loop.turn(5)
    assert len(set(found)) == 4
    eventually_spares(loop, 2)


def test_a_child_that_refused_a_job_or_stands_elsewhere_ends(loop: Loop, jobs: Jobs) -> None:
    (child,) = spares()
    error = outcome(loop, lambda done: jobs.start(refuse, "x", on_done=done))
    assert (error.code, error.text, error.reason) == (Code.NOT_FOUND, "not here", "Because")
    assert spares() == []
    second = outcome(loop, lambda done: jobs.start(go_astray, "/tmp", on_done=done))
    assert second != child
    assert spares() == []


def test_what_cannot_be_told_is_forked_for(loop: Loop, jobs: Jobs) -> None:
    (child,) = spares()
    read_fd, write_fd = os.pipe()
    forked = [
        outcome(loop, lambda done: jobs.start(lambda: [os.getpid()][0], on_done=done)),
        outcome(loop, lambda done: jobs.start(os.getpid, on_done=done, fds=[write_fd])),
    ]
    assert child not in forked
    assert spares() == [child]
    assert jobs_told.tell(refuse, ["x" * jobs_told.LIMIT], None) is None
    assert jobs_told.tell(refuse, [object()], None) is None
    for fd in (read_fd, write_fd):
        os.close(fd)


def test_a_child_that_died_while_it_waited_is_no_loss(loop: Loop, jobs: Jobs) -> None:
    (child,) = spares()
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert outcome(loop, lambda done: jobs.start(os.getpid, on_done=done)) != child


def test_a_told_job_can_be_killed_and_its_child_with_it(loop: Loop, jobs: Jobs) -> None:
    (child,) = spares()
    why = RemoteError(Code.CANCELLED, "no more")

    def start(done: Callable[[Any], object]) -> None:
        jobs.start(signal.pause, on_done=done).kill(why)

    assert outcome(loop, start) is why
    assert child not in spares()


def test_a_job_that_is_killed_late_takes_no_other_job_along(loop: Loop, jobs: Jobs) -> None:
    (child,) = spares()
    started: list[Job] = []
    assert outcome(loop, lambda done: started.append(jobs.start(os.getpid, on_done=done))) == child
    started[0].kill(RemoteError(Code.CANCELLED, "too late"))
    assert outcome(loop, lambda done: jobs.start(os.getpid, on_done=done)) == child


def test_after_a_reload_other_children_take_the_jobs(loop: Loop, jobs: Jobs) -> None:
    (before,) = spares()
    found: list[int] = []
    jobs.start(os.getpid, on_done=found.append)
    jobs.renew()  # while it is at work: it may finish
    assert outcome(loop, lambda done: jobs.start(os.getpid, on_done=done)) != before
    while not found:
        loop.turn(5)
    assert found == [before]
    eventually_spares(loop, 1)


def test_a_child_does_not_stay_for_ever(loop: Loop) -> None:
    jobs = Jobs(loop)
    jobs.let_stay(seconds=0.05)
    assert outcome(loop, lambda done: jobs.start(os.getpid, on_done=done)) == spares()[0]
    eventually_spares(loop, 0)
    jobs.kill_all()


def test_a_child_ends_after_so_many_jobs(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.jobs.MOST_JOBS", 2)
    jobs = Jobs(loop)
    jobs.let_stay()
    pids = [outcome(loop, lambda done: jobs.start(os.getpid, on_done=done)) for _ in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]
    jobs.kill_all()
    eventually_spares(loop, 0)


def eventually_spares(loop: Loop, count: int) -> None:
    end = time.monotonic() + 5
    while len(spares()) != count and time.monotonic() < end:
        loop.turn(0.01)
    assert len(spares()) == count
