"""Runs in: the tests. What strikes a process at a step of an operation, and how the operation goes on.

A step is a system call of the victim: a message it sends or takes, a change of a file system or a database,
a fork, a namespace. Strace counts them first, and then strikes at one of them (tests/support/faults.py), so
every phase of an operation is somebody's last one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.crash_world import Operation, World
from tests.support.daemon import alive, wait_for
from tests.support.faults import CHANGES, Strace

STEPS = f"{CHANGES},sendmsg,recvmsg,clone,unshare,setns,wait4,waitid,pidfd_send_signal"
FRONT = ("cri", "supervisor", "monitor")  # whose deaths a client may notice, and then tries again
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Blow:
    """What is done to a victim, and when: at the `nth` of a system call, or at once."""

    victim: str
    signal: signal.Signals
    call: str = ""
    nth: int = 0

    def __str__(self) -> str:
        return f"{self.signal.name} for {self.victim} at {self.call or 'once'} {self.nth or ''}"


@dataclass
class Tally:
    """A row of the table: how often one kind was struck in one operation."""

    blows: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def add(self, blow: Blow) -> None:
        """A blow that went home."""
        self.blows[blow.signal.name] = self.blows.get(blow.signal.name, 0) + 1


def victim_pid(world: World, kind: str, subject: str) -> int:
    """The process that is struck; of the monitors, that of the operation's container or the witness's."""
    if kind == "monitor":
        container = ([*subject.split(), "", "", ""][2]) or world.witness
        lock = world.node.run_root / "monitors" / container / "lock"
        return int(lock.read_text().split()[0])
    if kind == "supervisor":
        assert world.node.daemon is not None
        return world.node.daemon.pid
    return wait_for(lambda: world.node.pids(kind), f"{kind} runs")[0]


def steps_of(world: World, operation: Operation, victim: str) -> list[tuple[str, int]]:
    """The steps that the victim takes in an operation that nobody disturbs."""
    subject = operation.prepare(world)
    world.wake(victim)
    with Strace(victim_pid(world, victim, subject), calls=STEPS, follow=False) as strace:
        result = operation.act(world, subject)
    operation.check(world, subject, result)
    operation.undo(world, subject, result)
    settle(world)
    return strace.steps


def strike(world: World, operation: Operation, blow: Blow, stop_seconds: float = STOP_SECONDS) -> bool:
    """Do the operation, strike, look whether everything is as it must be. True if the blow went home."""
    subject = operation.prepare(world)
    world.wake(blow.victim)
    pid = victim_pid(world, blow.victim, subject)
    with ThreadPoolExecutor(1) as pool:
        with _at_its_step(blow, pid):
            acting = pool.submit(_act, world, operation, subject, blow)
            while not acting.done() and not _struck(pid, blow.signal):
                time.sleep(0.002)
        struck = _struck(pid, blow.signal)
        if struck:
            _see_to(world, blow, pid, stop_seconds)
        result = acting.result(120)
    world.recovered()
    operation.check(world, subject, result)
    world.check_witness()
    operation.undo(world, subject, result)
    settle(world)
    return struck


@contextlib.contextmanager
def _at_its_step(blow: Blow, pid: int) -> Iterator[None]:
    if blow.call:
        strace = Strace(pid, f"signal={blow.signal.name}", nth=blow.nth, calls=blow.call, follow=False)
        with strace:
            yield
    else:
        os.kill(pid, blow.signal)
        yield


def _act(world: World, operation: Operation, subject: str, blow: Blow) -> object:
    """A leaf's death is invisible to clients; those of FRONT make a kubelet try again."""
    if blow.victim in FRONT:
        return world.patient(lambda: operation.act(world, subject), 60)
    return operation.act(world, subject)


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
    wait_for(lambda: only_the_witness(world), "everything but the witness is cleaned up", 20)
    assert networks(world) == (1, 1)


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
