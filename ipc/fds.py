"""Runs in: every process.

Descriptors that travel: a set that closes what nobody took, and sealed memfds for large bodies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from types import TracebackType

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class FdSet:
    """Owner of received descriptors. What was not taken is closed with the set."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds: list[int | None] = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def get(self, index: int = 0) -> int:
        """Return a descriptor that stays the set's. Raises IndexError if there is none or it was taken."""
        fd = self._fds[index]
        if fd is None:
            raise IndexError(f"descriptor {index} was taken")
        return fd

    def take(self, index: int = 0) -> int:
        """Return a descriptor; the caller must close it from now on. Raises IndexError as `get` does."""
        fd = self.get(index)
        self._fds[index] = None
        return fd

    def pop_last(self) -> int:
        """Take the last descriptor and shorten the set by it (the memfd of a body)."""
        fd = self.get(len(self._fds) - 1)
        self._fds.pop()
        return fd

    def close(self) -> None:
        """Close all that was not taken. May be called again."""
        fds, self._fds = self._fds, []
        close_all(fd for fd in fds if fd is not None)

    def __iter__(self) -> Iterator[int]:
        return (fd for fd in self._fds if fd is not None)

    def __enter__(self) -> FdSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; one that is closed already is no error."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def sealed_memfd(name: str, data: bytes) -> int:
    """Return a descriptor of an unchangeable anonymous file with `data` in it. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _write_all(fd, data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_sealed(fd: int, limit: int) -> bytes:
    """Read a whole memfd of a peer. Raises ValueError if it is not sealed or larger than `limit` bytes."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError("the body's descriptor is no memfd") from error
    size = os.fstat(fd).st_size
    if seals & SEALS != SEALS or size > limit:
        raise ValueError(f"the body's memfd is not sealed or too large ({size} bytes)")
    return b"".join(_read_pieces(fd, size))


def _read_pieces(fd: int, size: int) -> Iterator[bytes]:
    offset = 0
    while offset < size:
        piece = os.pread(fd, size - offset, offset)
        if not piece:
            raise ValueError("the body's memfd ended early")
        offset += len(piece)
        yield piece


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
