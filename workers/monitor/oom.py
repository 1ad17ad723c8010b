"""Runs in: the monitor.

Did the OOM killer take a process of the container? The kernel counts its kills in the memory group
(`oom_kill` in v2's memory.events, in v1's memory.oom_control), so reading once at the end is exact for the
shortest life. Only systemd removes a group as soon as it is empty: there the counter is also followed while
the container lives, and the last count seen is kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

V1_FILE = "memory.oom_control"
V2_FILE = "memory.events"


def parse_kills(text: bytes) -> int | None:
    """Return the `oom_kill` count of either file, None if it has none (v1 before Linux 4.13)."""
    for line in text.splitlines():
        name, _, value = line.partition(b" ")
        if name == b"oom_kill" and value.strip().isdigit():
            return int(value)
    return None


def count_kills(memory: str, version: int) -> int | None:
    """Return the kills in the group at `memory`; None if it is gone or does not count.

    v2 counts a group with all below it; v1 each group alone, so there they are added up.
    """
    if version == 2:
        return _kills(f"{memory}/{V2_FILE}")
    counts = [_kills(f"{path}/{V1_FILE}") for path, _, _ in os.walk(memory)]
    return sum(count or 0 for count in counts) if counts and counts[0] is not None else None


def _kills(path: str) -> int | None:
    try:
        with open(path, "rb") as file:
            return parse_kills(file.read(4096))
    except OSError:
        return None


def follow(memory: str, version: int) -> list[int]:
    """Return the descriptors by which the count of a group that may vanish is followed, for OomWatch.

    The second one has the events. Raises OSError.
    """
    count = os.open(f"{memory}/{V2_FILE if version == 2 else V1_FILE}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [count, os.dup(count) if version == 2 else _event(memory, count)]
    except OSError:
        os.close(count)
        raise


def _event(memory: str, count_fd: int) -> int:
    event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        control = os.open(f"{memory}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(control, f"{event_fd} {count_fd}".encode())
        finally:
            os.close(control)
    except OSError:
        os.close(event_fd)
        raise
    return event_fd


class OomWatch:
    """Counts a container's OOM kills. `fds` are `follow`'s, where the group may vanish before the end."""

    def __init__(self, memory: str, version: int, fds: Sequence[int] = ()) -> None:
        self.memory = memory
        self.version = version
        self.seen = 0
        self._fds = list(fds)

    @property
    def event_fd(self) -> int:
        """Where the events are, -1 for nowhere: v1's is readable then, v2's has EPOLLPRI."""
        return self._fds[-1] if self._fds else -1

    def kills(self) -> int:
        """Return the count now, or the last one seen if the group is gone."""
        count = count_kills(self.memory, self.version) if self.memory else None
        if count is not None:
            self.seen = count
        return self.seen

    def changed(self) -> bool:
        """There was an event. False if the group is gone: its file would be ready for ever."""
        if self.version != 2:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._fds[1])
            # The event comes before the kill; removal of the group makes one too, but then the file is gone.
            here = os.path.exists(f"{self.memory}/{V1_FILE}")
            self.seen = max(self.seen, int(here))
            return here
        try:
            count = parse_kills(os.pread(self._fds[0], 4096, 0))
        except OSError:  # ENODEV
            return False
        self.seen = max(self.seen, count or 0)
        return True

    def close(self) -> None:
        """Stop following."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
