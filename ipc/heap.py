"""Runs in: every worker. What the heap keeps after a burst goes back to the kernel.

A request of many megabytes leaves free memory behind that the C library and the collector of cycles would
keep for the life of the worker. Looked at with every health ping: no request waits for it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource

from ipc import kernel

#: Bytes that a process may be over its least before it is looked at what of it is free.
SLACK = 8 << 20
#: Looked at again without success, it is left in peace for so many pings at most.
LONGEST_PAUSE = 12


class Heap:
    """This process's memory. Made after the fork; without /proc in sight it does nothing."""

    def __init__(self) -> None:
        self._statm_fd = -1
        with contextlib.suppress(OSError):
            self._statm_fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._least = self._after = 0  # resident bytes: ever, and when it was last looked at
        self._pause = self._wait = 0  # pings

    def resident(self) -> int:
        """Bytes of memory of its own in use, 0 if that is not to be known."""
        if self._statm_fd < 0:
            return 0
        _size, resident, of_files, *_ = os.pread(self._statm_fd, 128, 0).split()
        return (int(resident) - int(of_files)) * resource.getpagesize()

    def settle(self) -> bool:
        """Give back what is free, if it may be much. Returns whether it was looked for."""
        now = self.resident()
        self._least = min(self._least or now, now)
        if now <= self._least + SLACK:
            return False
        grown = now > self._after + SLACK
        if self._wait and not grown:
            self._wait -= 1
            return False
        self._wait = self._pause = 1 if grown else min(2 * self._pause, LONGEST_PAUSE)
        gc.collect()
        kernel.trim_heap()
        self._after = self.resident()
        return True
