"""Runs in: the tests. What strikes a process at a step of an operation, and how the operation goes on.

A step is a system call of the victim: a message it sends or takes, a change of a file system or a database,
a fork, a namespace. Strace counts them first, and then strikes at one of them (tests/support/faults.py), so
every phase of an operation is somebody's last one. A victim that does little in an operation is struck at
moments that are spread over it, one that comes with it at moments of its short life.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.crash import victims
from tests.crash.crash_world import World
from tests.crash.operations import Operation
from tests.crash.victims import VICTIMS
from tests.support.daemon import alive, wait_for
from tests.support.faults import CHANGES, Strace

STEPS = f"{CHANGES},sendmsg,recvmsg,clone,unshare,setns,wait4,waitid,pidfd_send_signal"
STOP_SECONDS, SETTLE_SECONDS = 10.0, 20.0
MOMENTS = 6  # into which an operation, or a short life, is cut
SOON = 0.01  # seconds from the beginning of an operation
BIRTH = "birth"  # instead of a system call
FAILED = object()  # what a failed operation gave


@dataclass(frozen=True)
class Step:
    """A moment of an operation: the `nth` of a system call or birth, and then `delay` seconds more."""

    call: str = ""
    nth: int = 0
    delay: float = 0.0


@dataclass(frozen=True)
class Blow:
    """What is done to a victim, and when."""

    victim: str
    signal: signal.Signals
    step: Step = Step()

    def at_another_moment(self) -> Blow:
        """The same blow when its step does not come: what was done once need not be done again."""
        return replace(self, step=Step(BIRTH) if self.step.call == BIRTH else Step(delay=SOON))

    def __str__(self) -> str:
        step = self.step
        return f"{self.signal.name} for {self.victim} at {step.call} {step.nth} + {step.delay * 1000:.0f} ms"


@dataclass
class Tally:
    """A cell of the table: how often one kind was struck in one operation."""

    blows: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, blow: Blow) -> None:
        """A blow that went home."""
        self.blows[blow.signal.name] = self.blows.get(blow.signal.name, 0) + 1


# -- looking on -----------------------------------------------------------------------------------------


def steps_of(world: World, operation: Operation, victim: str) -> list[Step]:
    """The steps that the victim takes in an operation that nobody disturbs; none if it has no part in it."""
    subject = operation.prepare(world)
    victims.wake(world, victim)
    with victims.present(world, victim, subject) as pid:
        look = _watch_one(world, operation, subject, pid) if pid else None
        result, steps = look or _watch_births(world, operation, subject, victim)
    operation.check(world, subject, result)
    operation.undo(world, subject, result)
    settle(world)
    return steps


def _watch_one(world: World, operation: Operation, subject: str, pid: int) -> tuple[object, list[Step]]:
    began = time.monotonic()
    with Strace(pid, calls=STEPS, follow=False) as strace:
        result = operation.act(world, subject)
        took = time.monotonic() - began
    steps = [Step(call, nth) for call, nth in strace.steps]
    return result, steps + [Step(delay=took * part / MOMENTS) for part in range(MOMENTS - len(steps))]


def _watch_births(world: World, operation: Operation, subject: str, victim: str) -> tuple[object, list[Step]]:
    lives: dict[int, list[float]] = {}
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(operation.act, world, subject)
        while not acting.done():
            for pid in victims.coming(world, victim, subject):
                lives.setdefault(pid, []).append(time.monotonic())
            time.sleep(0.0005)
        result = acting.result()
    spans = [seen[-1] - seen[0] for seen in lives.values()]
    moments = -(-MOMENTS // max(1, len(spans)))
    return result, [
        Step(BIRTH, number, span * part / moments)
        for number, span in enumerate(spans)
        for part in range(moments)
    ]


# -- striking -------------------------------------------------------------------------------------------


def strike(world: World, operation: Operation, blow: Blow, stop_seconds: float = STOP_SECONDS) -> bool:
    """Do the operation, strike, look whether everything is as it must be. True if the blow went home."""
    subject = operation.prepare(world)
    victims.wake(world, blow.victim)
    with victims.present(world, blow.victim, subject) as pid, ThreadPoolExecutor(1) as pool:
        struck, acting = _strike(world, operation, blow, subject, pid, pool)
        if struck:
            _see_to(world, blow, struck, stop_seconds)
        result = acting.result(120)
    world.recovered()
    if result is not FAILED:
        operation.check(world, subject, result)
    world.check_witness()
    operation.undo(world, subject, result)
    settle(world)
    return bool(struck)


def _strike(
    world: World, operation: Operation, blow: Blow, subject: str, pid: int, pool: ThreadPoolExecutor
) -> tuple[int, Future[object]]:
    """Begin the operation and strike; return who was struck, 0 if the moment did not come."""
    if blow.step.call == BIRTH:
        acting = pool.submit(_act, world, operation, subject, blow)
        return _at_its_birth(world, blow, subject, acting), acting
    with _at_its_step(blow, pid) as strace:
        acting = pool.submit(_act, world, operation, subject, blow)
        if not blow.step.call:
            time.sleep(blow.step.delay)
            os.kill(pid, blow.signal)
        while not (struck := _struck(pid, blow.signal)) and not acting.done():
            time.sleep(0.002)
    if strace is None:
        wait_for(lambda: _struck(pid, blow.signal), "the signal is delivered")
        return pid, acting
    if not struck and (blow.step.call, blow.step.nth) in strace.steps:
        # On its way when all was done, for that has an end behind the answer; or gone with strace, which then
        # has not written of the signal any more.
        with contextlib.suppress(AssertionError):
            wait_for(lambda: _struck(pid, blow.signal), "the signal is delivered", 1.0)
    # Who is being let go by strace looks neither stopped nor running for a moment: what was seen counts.
    return pid if struck or _struck(pid, blow.signal) else 0, acting


@contextlib.contextmanager
def _at_its_step(blow: Blow, pid: int) -> Iterator[Strace | None]:
    if blow.step.call:
        what = f"signal={blow.signal.name}"
        with Strace(pid, what, nth=blow.step.nth, calls=blow.step.call, follow=False) as strace:
            yield strace
    else:
        yield None


def _at_its_birth(world: World, blow: Blow, subject: str, acting: Future[object]) -> int:
    seen: dict[int, None] = {}
    while not acting.done():
        seen.update(dict.fromkeys(victims.coming(world, blow.victim, subject)))
        if len(seen) > blow.step.nth:
            return _after(blow.step.delay, list(seen)[blow.step.nth], blow.signal)
        time.sleep(0.0005)
    return 0


def _after(seconds: float, pid: int, number: signal.Signals) -> int:
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        if alive(pid):
            os.kill(pid, number)
            return pid
    return 0


def _act(world: World, operation: Operation, subject: str, blow: Blow) -> object:
    """What a client may notice makes it try again, as a kubelet does; everything else is a loss."""
    victim = VICTIMS[blow.victim]
    if not victim.costs:
        return world.patient(lambda: operation.act(world, subject), 60, victim.allows)
    try:
        return operation.act(world, subject)
    except Exception as error:
        if victim.allows(error):
            return FAILED
        raise


def _see_to(world: World, blow: Blow, pid: int, stop_seconds: float) -> None:
    """Be the service manager, or whoever wakes what was stopped."""
    if blow.signal == signal.SIGSTOP:
        time.sleep(stop_seconds)
        if alive(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    elif blow.victim == "supervisor":
        world.node.restart_ended()


def _struck(pid: int, number: signal.Signals) -> bool:
    state = _state(pid)
    return state in "tT" and _stopped(pid) if number == signal.SIGSTOP else state in "ZX"


def _state(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    return "X"


def _stopped(pid: int) -> bool:
    """In a stop that lasts: tracing stops are over in no time."""
    for _ in range(5):
        time.sleep(0.01)
        if _state(pid) not in "tT":
            return False
    return True


# -- what must be true afterwards -----------------------------------------------------------------------


def settle(world: World) -> None:
    """Wait until what was interrupted is cleaned up: only the witness may be left, with one address."""
    end = time.monotonic() + SETTLE_SECONDS
    while left := left_behind(world):
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.01)


def left_behind(world: World) -> list[str]:
    """What is there and not the witness's; its address and its link, one of each, carry no id."""
    mine = (world.witness, world.witness_pod)
    left = [one for one in world.node.leftovers() if not any(id_ in one for id_ in mine)]
    for nameless in ("address ", "link "):
        found = [one for one in left if one.startswith(nameless)]
        left = [one for one in left if one not in found] + found[1:] + ([] if found else [f"no {nameless}"])
    return left
