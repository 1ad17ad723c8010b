"""Runs in: the monitor.

What the kernel tells of processes: their ancestry, the signals they would take, the pipes they hold.
A process that is gone meanwhile is no error anywhere here.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from ipc.errors import invalid

SCANS = 20  # a family that goes on growing while it is being stopped is killed as far as it is known
_SIGNALS = 64


class Stat(NamedTuple):
    """Part of /proc/PID/stat."""

    state: str
    parent: int
    group: int
    session: int
    start: int  # clock ticks since boot


class Disposition(NamedTuple):
    """What a process does with signals (bit masks), whether it is init of its PID namespace, and whether it
    has yet to execute the container's command."""

    blocked: int
    caught: int
    init: bool
    early: bool = False

    def drops(self, number: int) -> bool:
        """True if the signal would be lost: an init takes only what it blocks or handles, and the handlers of
        what executes the command (runc's init has one for every signal) do nothing."""
        bit = 1 << (number - 1)
        taken = (self.blocked | self.caught) & bit and not self.early
        return self.init and not taken and number != signal.SIGKILL


def _read(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, 8192)
    except OSError:
        return None
    finally:
        os.close(fd)


def stat(pid: int) -> Stat | None:
    """Return the process's facts, None if it is gone."""
    raw = _read(f"/proc/{pid}/stat")
    if not raw:
        return None
    fields = raw[raw.rindex(b")") + 2 :].split()
    return Stat(fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def children(pid: int) -> list[int]:
    """The children of a process."""
    raw = _read(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in (raw or b"").split()]


def open_pid(pid: int, start: int) -> int:
    """Return a pidfd of the process that began at `start`, -1 if it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    fact = stat(pid)
    if fact is not None and fact.start == start:
        return fd
    os.close(fd)
    return -1


def disposition(pid: int, before: str = "") -> Disposition | None:
    """Return the process's disposition, None if it is gone. `before`: the program that executes the
    container's command, as `program` names it."""
    early = bool(before) and program(pid) == before  # first: what is read next is at least as new
    raw = _read(f"/proc/{pid}/status")
    return None if not raw else parse_disposition(raw)._replace(early=early)


def program(pid: int) -> str:
    """Return what names the file that a process executes, "" if it is gone."""
    try:
        found = os.stat(f"/proc/{pid}/exe")
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino}"


def parse_disposition(status: bytes) -> Disposition:
    """Read a /proc/PID/status."""
    fields = dict(line.split(b":\t", 1) for line in status.splitlines() if b":\t" in line)
    levels = fields.get(b"NSpid", b"0").split()
    return Disposition(
        int(fields.get(b"SigBlk", b"0"), 16),
        int(fields.get(b"SigCgt", b"0"), 16),
        len(levels) > 1 and levels[-1] == b"1",
    )


def signal_number(name: str) -> int:
    """Return a signal's number from SIGTERM, TERM, 15, SIGRTMIN+3 or SIGRTMAX-1, in any case.

    Raises RemoteError(INVALID_ARGUMENT).
    """
    text = name.strip().upper()
    if text.isdecimal():
        number = int(text)
    else:
        base, sign, offset = text.removeprefix("SIG").replace("-", "+-").partition("+")
        known = getattr(signal, "SIG" + base, None)
        if not isinstance(known, signal.Signals) or (sign and base not in ("RTMIN", "RTMAX")):
            raise invalid(f"unknown signal {name!r}")
        try:
            number = int(known) + (int(offset) if sign else 0)
        except ValueError:
            raise invalid(f"unknown signal {name!r}") from None
    if not 1 <= number <= _SIGNALS:
        raise invalid(f"unknown signal {name!r}")
    return number


def command_line(pid: int) -> list[str]:
    """Return the process's arguments, none if it is gone or has ended."""
    raw = _read(f"/proc/{pid}/cmdline") or b""
    return raw.decode("utf-8", "replace").split("\0")[:-1]


def all_pids() -> list[int]:
    """Return every process that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def holds_pipe(pid: int, pipes: Collection[str]) -> bool:
    """True if the process has one of these ("pipe:[inode]") open."""
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):
                if os.readlink(f"{directory}/{name}") in pipes:
                    return True
    return False


def kill_family(
    root: int, session: int, candidates: Callable[[], Iterable[int]], pipes: Collection[str]
) -> None:
    """SIGKILL `root`, its descendants, its session, and who holds one of its pipes, among the candidates.

    They are stopped first and killed when no new one is found, so that none slips away by forking. Who waits
    for a CPU in the middle of a fork stops only after it, but who has been killed forks no more: so they are
    looked for once more then.
    `session` 0: do not go by the session. `root` must be an unreaped child of the caller.
    """
    members: set[int] = set()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        _signal_all(members, number)
        for _ in range(SCANS):
            found = _family(root, session, candidates(), pipes, members) - members
            if not found:
                break
            members |= found
            _signal_all(found, number)


def _family(
    root: int, session: int, candidates: Iterable[int], pipes: Collection[str], known: set[int]
) -> set[int]:
    facts = {pid: fact for pid in candidates if pid not in (1, os.getpid()) and (fact := stat(pid))}
    family = {root} | {pid for pid, fact in facts.items() if session and fact.session == session}
    family |= {pid for pid in facts if pid not in known and holds_pipe(pid, pipes)}
    grown = True
    while grown:
        children = {pid for pid, fact in facts.items() if fact.parent in family} - family
        family |= children
        grown = bool(children)
    return family


def _signal_all(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
