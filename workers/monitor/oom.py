"""Runs in: the monitor.

Did the OOM killer take a process of the container? The kernel counts its kills in the memory group
(`oom_kill` in v2's memory.events, in v1's memory.oom_control), so reading once at the end is exact for the
shortest life. Only systemd removes a group as soon as it is empty, and then its file cannot be read even
through an open descriptor: there the counter is also followed while the container lives, and the last count
seen is kept. On v2 the parent's counter holds what its children counted, gone ones too, so what it has gained
since the container's own was last read was the container's. (A sibling's kill in the same milliseconds
would be taken for it; no other trace of the kill is left.)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from ipc.fds import close_all

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


class Followed(NamedTuple):
    """How a group's count is followed. `others`: the parent's count without the group's, -1 if untold."""

    fds: list[int]
    others: int


def follow(memory: str, version: int) -> Followed:
    """Begin to follow a group that may vanish; the rest is OomWatch's. Raises OSError.

    The descriptors: the group's file, then v1's eventfd, v2's file of the parent if it has one.
    """
    fds = [os.open(f"{memory}/{V2_FILE if version == 2 else V1_FILE}", os.O_RDONLY | os.O_CLOEXEC)]
    try:
        if version != 2:
            fds.append(_event(memory, fds[0]))
            return Followed(fds, -1)
        with contextlib.suppress(OSError):  # the root has no such file
            fds.append(os.open(_parent(memory), os.O_RDONLY | os.O_CLOEXEC))
        return Followed(fds, _read_v2(fds)[1])
    except OSError:
        close_all(fds)
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


def _parent(memory: str) -> str:
    return f"{os.path.dirname(memory)}/{V2_FILE}"


def _read_v2(fds: Sequence[int]) -> tuple[int, int]:
    """Return the group's count and that of all others below the parent, -1 if that cannot be told."""
    # The parent's first: a kill between the two readings is then counted once at least, never lost.
    total = parse_kills(os.pread(fds[1], 4096, 0)) if len(fds) > 1 else None
    count = parse_kills(os.pread(fds[0], 4096, 0)) or 0
    return count, -1 if total is None else total - count


class OomWatch:
    """Counts a container's OOM kills. `followed` is `follow`'s, where the group may vanish before the end."""

    def __init__(self, memory: str, version: int, followed: Followed | None = None) -> None:
        self.memory = memory
        self.version = version
        self.seen = 0
        self.others = -1 if followed is None else followed.others
        self.fds = [] if followed is None else list(followed.fds)

    @property
    def event_fds(self) -> list[int]:
        """Where events are: v1's is readable then; v2's, always readable as kernfs files, have EPOLLPRI."""
        return self.fds if self.version == 2 else self.fds[1:]

    def kills(self) -> int:
        """Return the count now, or what was seen of it if the group is gone."""
        count = count_kills(self.memory, self.version) if self.memory else None
        if count is not None:
            self.seen = count
        elif self.others >= 0:
            total = _kills(_parent(self.memory))
            self.seen = max(self.seen, (total or 0) - self.others)
        return self.seen

    def changed(self) -> bool:
        """There was an event. False if the group is gone: its file would be ready for ever."""
        if self.version != 2:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fds[1])
            # The event comes before the kill; removal of the group makes one too, but then the file is gone.
            here = os.path.exists(f"{self.memory}/{V1_FILE}")
            self.seen = max(self.seen, int(here))
            return here
        try:
            count, self.others = _read_v2(self.fds)
        except OSError:  # ENODEV
            return False
        self.seen = max(self.seen, count)
        return True

    def close(self) -> None:
        """Stop following."""
        close_all(self.fds)
        self.fds.clear()
