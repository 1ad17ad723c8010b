"""Runs in: the monitor.

Stopping a container: the stop signal, the grace period, then SIGKILL until it is gone. It goes on whoever
asked for it has died. The kernel drops a signal to the init of a PID namespace that has no handler for it,
and an entry point may still be setting up: while the grace lasts, the signal is sent again as soon as a
handler appears.
"""

from __future__ import annotations

from typing import Protocol

from ipc.loop import Loop, Timer
from workers.monitor.procfs import Disposition

WATCH_INTERVALS = (0.01, 0.02, 0.05)  # seconds between looks at the handlers; the last one repeats
KILL_FIRST = 0.1  # seconds to the second SIGKILL; doubles up to KILL_LONGEST
KILL_LONGEST = 5.0


class Target(Protocol):
    """What is stopped."""

    def send(self, number: int) -> None:
        """Send a signal to the container's init, thawed so that it can take it."""

    def kill(self) -> None:
        """SIGKILL everything that is the container's."""

    def disposition(self) -> Disposition | None:
        """Return what its init does with signals, None if it is gone."""


class Stopper:
    """One container's stop. `request` may be called again: only a shorter grace counts."""

    def __init__(self, loop: Loop, target: Target) -> None:
        self._loop = loop
        self._target = target
        self._deadline: float | None = None
        self._timer: Timer | None = None
        self._sent: set[int] = set()
        self._watches: dict[int, Timer] = {}
        self._kill_delay = KILL_FIRST
        self._killing = False
        self._ended = False

    @property
    def busy(self) -> bool:
        """True while something is being stopped."""
        return not self._ended and (self._killing or self._deadline is not None)

    def request(self, number: int, grace: float) -> None:
        """Stop with signal `number`, with SIGKILL after `grace` seconds (0: at once)."""
        if self._ended:
            return
        deadline = self._loop.time() + grace
        if not self._killing and (self._deadline is None or deadline < self._deadline):
            self._deadline = deadline
            self._kill_after(grace)
        if grace > 0 and number not in self._sent and not self._killing:
            self._sent.add(number)
            self._send(number, 0)

    def kill(self) -> None:
        """SIGKILL now, and again until `ended` is called."""
        if self._ended:
            return
        self._killing = True
        self._end_watches()
        self._target.kill()
        self._kill_after(self._kill_delay)
        self._kill_delay = min(KILL_LONGEST, self._kill_delay * 2)

    def ended(self) -> None:
        """The init is gone, and its pid may be another's: no more signals."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._end_watches()

    def _kill_after(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self.kill)

    def _send(self, number: int, look: int) -> None:
        # Asked before the signal is sent: a handler that comes in between makes it two, never none.
        before = self._target.disposition()
        self._target.send(number)
        if before is not None and before.drops(number):
            self._watch(number, look)

    def _watch(self, number: int, look: int) -> None:
        delay = WATCH_INTERVALS[min(look, len(WATCH_INTERVALS) - 1)]
        self._watches[number] = self._loop.call_later(delay, lambda: self._look(number, look + 1))

    def _look(self, number: int, look: int) -> None:
        now = self._target.disposition()
        if now is not None and now.drops(number):
            self._watch(number, look)
        elif now is not None:
            self._send(number, look)

    def _end_watches(self) -> None:
        for timer in self._watches.values():
            timer.cancel()
        self._watches.clear()
