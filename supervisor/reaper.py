"""Runs in: the supervisor.

Reaps every child: those it was told of, and the orphans that a sub-reaper inherits (what a monitor that
died left, pod inits, whose first parent ends at once). One place, on SIGCHLD, so that nobody waits for
somebody else's child.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from ipc import kernel
from ipc.log import Log
from ipc.loop import Loop

Ended = Callable[[int], object]


class Reaper:
    """`watch` tells it of a child before the loop turns again, so no end is missed."""

    def __init__(self, loop: Loop, log: Log) -> None:
        self._log = log
        self._watched: dict[int, Ended] = {}
        #: Told of those that were inherited: pid, code.
        self.orphaned: Callable[[int, int], object] = lambda _pid, _code: None
        loop.on_signal(signal.SIGCHLD, self.reap)

    @staticmethod
    def become_subreaper() -> None:
        """Inherit the orphans of all descendants. Raises OSError."""
        kernel.become_subreaper()

    def watch(self, pid: int, ended: Ended) -> None:
        """Call `ended(code)` when child `pid` is reaped; -N means signal N."""
        self._watched[pid] = ended

    def reap(self) -> None:
        """Reap whatever has ended."""
        while (found := _next()) is not None:
            pid, code = found
            ended = self._watched.pop(pid, None)
            if ended is None:
                self._log.debug("orphan reaped", pid=pid, code=code)
                self.orphaned(pid, code)
            else:
                ended(code)


def _next() -> tuple[int, int] | None:
    try:
        result = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_pid, result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
