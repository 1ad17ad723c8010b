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
import select

from ipc.loop import Loop

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


class OomWatch:
    """Counts a container's OOM kills. `follow`: the group may vanish before the end."""

    def __init__(self, loop: Loop, memory: str, version: int, *, follow: bool = False) -> None:
        self._loop = loop
        self._memory = memory
        self._version = version
        self._seen = 0
        #: The parent's count without this container's, as long as that could be told.
        self._others: int | None = None
        self._fds: list[int] = []
        self._epoll: select.epoll | None = None
        if follow and memory:
            # Without events there is still the count at the end.
            with contextlib.suppress(OSError):
                self._follow()

    def kills(self) -> int:
        """Return the count now, or the last one seen if the group is gone."""
        count = count_kills(self._memory, self._version) if self._memory else None
        if count is not None:
            self._seen = count
        elif self._others is not None:
            total = _kills(self._parent)
            self._seen = max(self._seen, (total or 0) - self._others)
        return self._seen

    @property
    def _parent(self) -> str:
        return f"{os.path.dirname(self._memory)}/{V2_FILE}"

    def close(self) -> None:
        """Stop following."""
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        for fd in self._fds:
            self._loop.remove_reader(fd)
            os.close(fd)
        self._fds.clear()

    def _follow(self) -> None:
        file = V2_FILE if self._version == 2 else V1_FILE
        self._fds.append(os.open(f"{self._memory}/{file}", os.O_RDONLY | os.O_CLOEXEC))
        if self._version == 2:
            self._follow_v2()
        else:
            self._follow_v1(self._fds[0])

    def _follow_v2(self) -> None:
        with contextlib.suppress(OSError):  # the root has no such file
            self._fds.append(os.open(self._parent, os.O_RDONLY | os.O_CLOEXEC))
        self._read_v2()
        # A kernfs file is always readable; its events are EPOLLPRI, which the loop does not ask for.
        epoll = select.epoll()
        self._epoll = epoll
        self._loop.add_reader(epoll.fileno(), self._changed_v2)
        for each in self._fds:
            epoll.register(each, select.EPOLLPRI)

    def _changed_v2(self) -> None:
        try:
            self._read_v2()
        except OSError:  # ENODEV: the group is gone and the file would be ready for ever
            self.close()

    def _read_v2(self) -> None:
        # The parent's first: a kill between the two readings is then counted once at least, never lost.
        total = parse_kills(os.pread(self._fds[1], 4096, 0)) if len(self._fds) > 1 else None
        count = parse_kills(os.pread(self._fds[0], 4096, 0)) or 0
        self._seen = max(self._seen, count)
        self._others = None if total is None else total - count

    def _follow_v1(self, fd: int) -> None:
        event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(event_fd)
        control = os.open(f"{self._memory}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(control, f"{event_fd} {fd}".encode())
        finally:
            os.close(control)
        self._loop.add_reader(event_fd, self._changed_v1)

    def _changed_v1(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fds[1])
        if os.path.exists(f"{self._memory}/{V1_FILE}"):
            # The event comes before the kill; removal of the group makes one too, but then the file is gone.
            self._seen = max(self._seen, 1)
        else:
            self.close()
