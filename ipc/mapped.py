"""Runs in: cri, image, stream, ops, nri. Pages of libraries that were needed once and no longer are.

A library with its start behind it keeps megabytes mapped that nobody will run again, and the kernel maps
sixteen pages where one is touched. Now and then all of them are unmapped; those in use are found in the page
cache at their next use. Looked at with health pings: no request waits for it. Workers whose libraries the
whole family shares would save nothing (docs/figures.md).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator

from ipc import kernel

#: Seconds from one time to the next.
PAUSE = 60.0
#: Resident bytes of a mapping that is worth a system call.
SMALLEST = 256 << 10
_CHUNK = 1 << 16
#: A private mapping of a file that cannot be written to, in smaps: proc_pid_smaps(5).
_MAPPING = re.compile(
    rb"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) r-[x-]p \S+ \S+ \d+ +/.*\n"
    rb"(?:\w+: .*\n)*?Rss: +(?P<resident>\d+) kB\n"
    rb"(?:\w+: .*\n)*?Anonymous: +(?P<written>\d+) kB$",
    re.MULTILINE,
)


class Mapped:
    """This process's mappings of files. Made after the fork; without /proc in sight it does nothing."""

    def __init__(self) -> None:
        self._smaps_fd = -1
        with contextlib.suppress(OSError):
            self._smaps_fd = os.open("/proc/self/smaps", os.O_RDONLY | os.O_CLOEXEC)
        self._due = time.monotonic() + PAUSE

    def settle(self) -> bool:
        """Unmap what is not in use, if it is time. Returns whether it was."""
        if self._smaps_fd < 0 or time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + PAUSE
        for start, end in clean(self._read()):
            with contextlib.suppress(OSError):  # locked in memory: it stays as it is
                kernel.drop_pages(start, end - start)
        return True

    def _read(self) -> bytes:
        os.lseek(self._smaps_fd, 0, os.SEEK_SET)
        return b"".join(iter(lambda: os.read(self._smaps_fd, _CHUNK), b""))


def clean(smaps: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of the mappings that can be dropped without loss, of those that are large.

    In them every page is the file's own: one that was written to (a relocation, a breakpoint) exists nowhere
    else.
    """
    for mapping in _MAPPING.finditer(smaps):
        if int(mapping["resident"]) << 10 >= SMALLEST and int(mapping["written"]) == 0:
            yield int(mapping["start"], 16), int(mapping["end"], 16)
