"""Runs in: the supervisor.

Processes that outlive the supervisor are known by a lock file: held means alive. The lock is taken before
the fork, shared with the child, and let go by the parent, so there is no moment without it. The file tells
the pid and its start time, so that a later supervisor kills the right process or none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re

from ipc.errors import invalid

_HOLDER_BYTES = 32
_STAT_LIMIT = 4096  # bytes, of which less than 500 come

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def check_id(text: str, what: str) -> str:
    """Return an id that may be a file's name. Raises RemoteError."""
    if not _ID.fullmatch(text):
        raise invalid(f"{text[:130]!r} is no {what} id")
    return text


def acquire(directory: str) -> int | None:
    """Take the lock of a directory; None if somebody holds it. Raises OSError."""
    fd = os.open(f"{directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def is_held(directory: str) -> bool:
    """True if the process that the directory belongs to lives."""
    try:
        fd = os.open(f"{directory}/lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def write_holder(lock_fd: int, pid: int) -> None:
    """Write down who holds the lock: over the one before, of the same length, so that it is never empty."""
    os.pwrite(lock_fd, f"{pid} {start_time(pid)}".ljust(_HOLDER_BYTES - 1).encode() + b"\n", 0)


def holder(directory: str) -> int:
    """Return the pid that holds the lock, 0 if none does, or if that number is somebody else's by now."""
    with (
        contextlib.suppress(FileNotFoundError, ValueError),
        open(f"{directory}/lock", encoding="ascii") as file,
    ):
        pid, started = (int(word) for word in file.read().split())
        if is_held(directory) and start_time(pid) == started:
            return pid
    return 0


def start_time(pid: int) -> int:
    """Return when a process began, in clock ticks since boot (field 22 of proc(5) stat), 0 if it is gone.

    Every monitor asks it of itself: a file object would be pages of its own for life.
    """
    try:
        stat_fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return int(os.read(stat_fd, _STAT_LIMIT).rpartition(b") ")[2].split()[19])
        finally:
            os.close(stat_fd)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def names(directory: str) -> list[str]:
    """Every directory in a directory, in lexical order."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []
