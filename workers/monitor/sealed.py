"""Runs in: the nursery, which makes the copies, and the monitor, which executes them.

Programs of OCI runtimes in sealed memory. crun does not trust its own file while it is in a container, which
could write to it through /proc/self/exe: at each call it copies itself and executes the copy, which takes
2 ms. It goes on at once where it finds that it is a sealed copy already, so it is started as one. A copy
is as large as the program: this is for small ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ipc.fds import close_all

LARGEST = 4 * 1024 * 1024  # bytes of a program that is copied
#: With SELinux a program's label decides what it may do, and a copy has none.
SELINUX = "/sys/fs/selinux/enforce"
_ELF = b"\x7fELF"
_FREE_FD = 30  # the copies lie above what a program is given, which is in place when it is executed
_EXECUTABLE = 0x10  # MFD_EXEC, of Linux 6.3
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class _Copy:
    fd: int
    of: tuple[int, int, int, int]


class Sealed:
    """Copies of the programs at `paths`, made now; of those that cannot be copied there is none."""

    def __init__(self, paths: Sequence[str] = ()) -> None:
        self._copies: dict[str, _Copy] = {}
        for path in dict.fromkeys(paths):
            with contextlib.suppress(OSError):
                self._copy(path)

    @property
    def fds(self) -> list[int]:
        """The copies' descriptors."""
        return [copy.fd for copy in self._copies.values()]

    def path(self, path: str) -> str:
        """What is to be executed for the program at `path`: its copy, unless it has changed since."""
        copy = self._copies.get(path)
        if copy is None:
            return path
        try:
            same = _identity(os.stat(path)) == copy.of
        except OSError:
            same = False
        return f"/proc/self/fd/{copy.fd}" if same else path

    def close(self) -> None:
        """Release the copies."""
        close_all(self.fds)
        self._copies.clear()

    def _copy(self, path: str) -> None:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_size > LARGEST or os.path.exists(SELINUX):
                return
            program = file.read(LARGEST)
        if program.startswith(_ELF):
            low = _sealed(os.path.basename(path), program)
            self._copies[path] = _Copy(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FREE_FD), _identity(found))
            os.close(low)


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _sealed(name: str, program: bytes) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | _EXECUTABLE)
    except OSError:  # an older kernel, whose memory files are executable
        fd = os.memfd_create(name, flags)
    try:
        os.fchmod(fd, 0o500)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(program)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd
