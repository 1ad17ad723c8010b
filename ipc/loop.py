"""Runs in: supervisor, storage, network, monitor (whatever must stay small and has no asyncio).

A selector loop: readiness, timers, signals (which only queue, through a wake-up descriptor), children by
pidfd. Single-threaded. It reaps only the children it was told of.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable

Callback = Callable[[], object]
ExitCallback = Callable[[int], object]

SIFT = 64  # timers that are kept whether they were cancelled or not
LONGEST_WAIT = 24 * 3600.0  # seconds; epoll_wait(2) counts milliseconds in an int, which 25 days overflow


class Timer:
    """A call that will be made, unless cancelled."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callback) -> None:
        self._callback: Callback | None = callback

    def cancel(self) -> None:
        """Never make the call. May be called again, and after the call."""
        self._callback = None

    @property
    def active(self) -> bool:
        return self._callback is not None

    def fire(self) -> None:
        """Make the call now (the loop does)."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Loop:
    """One process's loop. Exceptions of callbacks leave run(): a bug ends the process."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sift_at = SIFT
        self._soon: deque[Callback] = deque()
        self._order = itertools.count()
        self._signals: dict[int, Callback] = {}
        self._wakeup: tuple[int, int] | None = None
        self._stopped = False

    @staticmethod
    def time() -> float:
        """Seconds on the monotonic clock."""
        return time.monotonic()

    # -- readiness ------------------------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call `callback` whenever `fd` is readable (or at its end)."""
        self._readers[fd] = callback
        self._register(fd)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call `callback` whenever `fd` is writable."""
        self._writers[fd] = callback
        self._register(fd)

    def remove_reader(self, fd: int) -> None:
        """Watch `fd` for reading no more. No error if it was not watched. Call it before closing."""
        if self._readers.pop(fd, None) is not None:
            self._register(fd)

    def remove_writer(self, fd: int) -> None:
        """Watch `fd` for writing no more. No error if it was not watched."""
        if self._writers.pop(fd, None) is not None:
            self._register(fd)

    def _register(self, fd: int) -> None:
        events = (selectors.EVENT_READ if fd in self._readers else 0) | (
            selectors.EVENT_WRITE if fd in self._writers else 0
        )
        known = fd in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, events)
        else:
            self._selector.register(fd, events)

    # -- time -----------------------------------------------------------------------------------------

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call once after `seconds`."""
        timer = Timer(callback)
        if len(self._timers) >= self._sift_at:
            self._sift()
        heapq.heappush(self._timers, (self.time() + max(0.0, seconds), next(self._order), timer))
        return timer

    def _sift(self) -> None:
        """Forget timers that were cancelled long before their time: most deadlines are."""
        self._timers = [entry for entry in self._timers if entry[2].active]
        heapq.heapify(self._timers)
        self._sift_at = max(SIFT, 2 * len(self._timers))

    def call_soon(self, callback: Callback) -> None:
        """Call once in the next turn."""
        self._soon.append(callback)

    @property
    def pending(self) -> bool:
        """True if a call is to be made in the next turn."""
        return bool(self._soon)

    # -- signals and children ---------------------------------------------------------------------------

    def on_signal(self, number: int, callback: Callback, *, handled: bool = False) -> None:
        """Call `callback` from the loop when the signal came. Several of one kind may become one call.

        `handled`: it has a handler already; to set one touches 50 pages, which counts in a fork.
        """
        if self._wakeup is None:
            self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
            self.add_reader(self._wakeup[0], self._drain_signals)
        self._signals[number] = callback
        if not handled:
            signal.signal(number, _nothing)

    def _drain_signals(self) -> None:
        assert self._wakeup is not None
        with contextlib.suppress(BlockingIOError):
            for number in dict.fromkeys(os.read(self._wakeup[0], 4096)):
                callback = self._signals.get(number)
                if callback is not None:
                    callback()

    def watch_child(self, pid: int, callback: ExitCallback) -> int:
        """Reap child `pid` when it ends and call `callback(code)`; -N means signal N, as in subprocess.

        Returns the pidfd, which stays the loop's. Raises OSError if there is no such process.
        """
        fd = os.pidfd_open(pid)
        self.add_reader(fd, lambda: self._reap(fd, callback))
        return fd

    def _reap(self, fd: int, callback: ExitCallback) -> None:
        result = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
        if result is None:
            return
        self.remove_reader(fd)
        os.close(fd)
        callback(result.si_status if result.si_code == os.CLD_EXITED else -result.si_status)

    # -- running --------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Leave run() after this turn."""
        self._stopped = True

    def run(self) -> None:
        """Run until stop() is called."""
        self._stopped = False
        while not self._stopped:
            self.turn()

    def turn(self, timeout: float | None = None) -> None:
        """One turn: wait for something (at most `timeout` seconds), then make the calls that are due."""
        for key, events in self._selector.select(self._wait(timeout)):
            if events & selectors.EVENT_READ and key.fd in self._readers:
                self._readers[key.fd]()
            if events & selectors.EVENT_WRITE and key.fd in self._writers:
                self._writers[key.fd]()
        self._fire_timers()
        for _ in range(len(self._soon)):
            self._soon.popleft()()

    def _wait(self, timeout: float | None) -> float | None:
        while self._timers and not self._timers[0][2].active:
            heapq.heappop(self._timers)
        if self._soon:
            return 0.0
        if not self._timers:
            return timeout
        due = min(max(0.0, self._timers[0][0] - self.time()), LONGEST_WAIT)
        return due if timeout is None else min(due, timeout)

    def _fire_timers(self) -> None:
        now = self.time()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()

    def close(self) -> None:
        """Release the loop's own descriptors; what it watched stays its owners'."""
        self._selector.close()
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            for end in self._wakeup:
                os.close(end)

    def abandon(self) -> None:
        """In a forked child: drop the parent's epoll descriptor without touching what it watches."""
        self._selector.close()


def _nothing(_number: int, _frame: object) -> None:
    """Signals only wake the loop."""
