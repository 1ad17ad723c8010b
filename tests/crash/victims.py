"""Runs in: the tests. Who can be struck, how each is found, and what a client may notice of its end.

A victim is there before an operation begins (a worker, the supervisor, a monitor), or comes with it: a job's
child, an OCI runtime, the hand of a monitor, the monitor of a container that is being made.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from tests.crash.crash_world import AWAY, World
from tests.crash.operations import CommandStruck, SessionBroken, SessionRefused
from tests.support.daemon import alive, wait_for

#: What a call answers whose work was cut off in the middle, and which can be made again.
CUT = AWAY | {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
RUNTIMES = ("crun", "runc", "memfd:", "python3")  # a sealed copy; the last one before it executes


@dataclass(frozen=True)
class Victim:
    """One row of the matrix. `codes` and `errors`: what a client may see, who then asks again. `costs`: the
    operation may fail for good, in order: an OCI runtime that dies is not ours to repeat."""

    codes: Collection[grpc.StatusCode] = ()
    errors: tuple[type[Exception], ...] = ()
    costs: bool = False

    def allows(self, error: Exception) -> bool:
        """Say whether a client may see this."""
        known = isinstance(error, grpc.Call) and error.code() in self.codes
        return known or isinstance(error, self.errors)


SESSIONS = (SessionRefused, SessionBroken)
VICTIMS = {
    "image": Victim(),
    "storage": Victim(),
    "network": Victim(),
    "ops": Victim(),
    "nri": Victim(),
    "nursery": Victim(),
    "stream": Victim(errors=SESSIONS),
    "storage job": Victim(CUT),
    "network job": Victim(CUT),
    "runtime": Victim(CUT | {grpc.StatusCode.FAILED_PRECONDITION}, (*SESSIONS, CommandStruck), costs=True),
    "hand": Victim(CUT, SESSIONS),
    "monitor": Victim(CUT, SESSIONS),
    "cri": Victim(AWAY, (SessionRefused,)),
    "supervisor": Victim(AWAY, (SessionRefused,)),
}


@contextlib.contextmanager
def present(world: World, kind: str, subject: str) -> Iterator[int]:
    """The victim that is there before the operation; 0 if it comes with it."""
    container = _container(subject)
    if kind == "supervisor":
        assert world.node.daemon is not None
        yield world.node.daemon.pid
    elif kind == "monitor":
        comes = _creates(subject) or _has_ended(world, container)
        yield 0 if comes else _keeper(world, container or world.witness)
    elif kind == "hand" and not subject.count(" "):
        with _visit(world, world.witness):
            keeper = _keeper(world, world.witness)
            yield wait_for(lambda: _hands([keeper]), "the witness's monitor has a hand")[0]
    elif kind in ("hand", "runtime") or kind.endswith(" job"):
        yield 0
    else:
        yield _worker(world, kind)


def coming(world: World, kind: str, subject: str) -> list[int]:
    """Victims that live just now, of a kind that comes with the operation."""
    if kind.endswith(" job"):
        return _descendants(world.node.pids(kind.removesuffix(" job")))
    keepers = _keepers(world, subject)
    if kind == "monitor":
        return keepers
    hands = _hands(keepers)
    return hands if kind == "hand" else [pid for hand in hands for pid in _runtimes(hand)]


def wake(world: World, kind: str) -> None:
    """Make sure that the victim, or whoever it comes of, is there."""
    if kind == "nursery" and not world.node.pids(kind):
        container = world.create(world.witness_pod, "witness", ["true"], world.fresh("wake"))
        world.remove_container(container)
    if kind in ("hand", "runtime", "monitor"):
        return
    world.wake(kind.removesuffix(" job"))


def _worker(world: World, kind: str) -> int:
    """The one that serves; not one that drains if there is another."""
    states = [one for one in world.node.workers() if one.kind == kind and one.pid]
    return min(states, key=lambda one: one.state == "draining").pid


def _container(subject: str) -> str:
    return [*subject.split(), "", "", ""][2]


def _creates(subject: str) -> bool:
    return subject.count(" ") == 1


def _has_ended(world: World, container: str) -> bool:
    """True if its monitor is on its way out."""
    return (world.node.run_root / "monitors" / container / "exit.json").exists()


def _keeper(world: World, container: str) -> int:
    """A container's monitor; 0 if it has none any more."""
    lock = world.node.run_root / "monitors" / container / "lock"
    with contextlib.suppress(FileNotFoundError):
        pid = int((lock.read_text().split() or ["0"])[0])
        return pid if alive(pid) else 0
    return 0


def _keepers(world: World, subject: str) -> list[int]:
    """Monitors of the operation's container, or of all but the witness if it is being made."""
    found = [_container(subject)]
    if _creates(subject):
        with contextlib.suppress(FileNotFoundError):
            found = [name for name in os.listdir(world.node.run_root / "monitors") if name != world.witness]
    pids = (_keeper(world, container) for container in found if container)
    return [pid for pid in pids if pid]


@contextlib.contextmanager
def _visit(world: World, container: str) -> Iterator[None]:
    """Be connected to a monitor, which then has a hand."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(world.node.run_root / "monitors" / container / "ctl.sock"))
        yield


def _hands(keepers: list[int]) -> list[int]:
    return [pid for keeper in keepers for pid in _children(keeper) if _program(pid).startswith("python")]


def _runtimes(hand: int) -> list[int]:
    return [pid for pid in _children(hand) if _program(pid).startswith(RUNTIMES)]


def _program(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    return ""


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _descendants(pids: list[int]) -> list[int]:
    found: list[int] = []
    for pid in pids:
        children = _children(pid)
        found += children + _descendants(children)
    return found
