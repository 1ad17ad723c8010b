"""Runs in: the monitor.

The one place that reaps. As sub-reaper the monitor gets the container's init, what `exec --detach` started,
and orphans that nobody knows. All of them must be reaped at once: a zombie that is ours but lives in the
container's PID namespace keeps its init from dying. A pid that the runtime tells us in a file may have ended
before we read it: while such a run is on, ends of unknown children are remembered.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from ipc.loop import Loop

Ended = Callable[[int], object]


class Reaper:
    """Children by pid. Codes are -N for signal N. `handled`: SIGCHLD has a handler (Loop.on_signal)."""

    def __init__(self, loop: Loop, *, handled: bool = False) -> None:
        self._loop = loop
        self._claims: dict[int, Ended] = {}
        self._unclaimed: dict[int, int] = {}
        self._expecting = 0
        loop.on_signal(signal.SIGCHLD, self.reap, handled=handled)
        loop.call_soon(self.reap)  # what ended before that was in place told nobody

    def claim(self, pid: int, ended: Ended) -> None:
        """Call `ended(code)` once, later, when child `pid` has ended, even if it has already."""
        if pid in self._unclaimed:
            code = self._unclaimed.pop(pid)
            self._loop.call_soon(lambda: ended(code))
        else:
            self._claims[pid] = ended

    def has_ended(self, pid: int) -> bool:
        """True if the end of `pid` is remembered: a claim will be answered."""
        return pid in self._unclaimed

    def expect(self) -> None:
        """A child whose pid we do not know yet may appear and end: remember ends until `expected`."""
        self._expecting += 1

    def expected(self) -> None:
        """It was claimed, or never came."""
        self._expecting -= 1
        if not self._expecting:
            self._unclaimed.clear()

    def reap(self) -> None:
        """Reap whatever has ended."""
        while (found := _next()) is not None:
            pid, code = found
            ended = self._claims.pop(pid, None)
            if ended is not None:
                ended(code)
            elif self._expecting:
                self._unclaimed[pid] = code


def _next() -> tuple[int, int] | None:
    try:
        result = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_pid, result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def exit_code(code: int) -> int:
    """Return a reaped child's code as shells and the CRI have it: 128+N for signal N."""
    return 128 - code if code < 0 else code
