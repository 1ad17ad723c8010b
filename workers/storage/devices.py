"""Runs in: children of storage.

What a container asks of the host's /dev, and the seccomp profile that it names: host paths that `cri`, which
sees neither, must not touch. Every step is noted in `Progress`, so that a path that hangs is named.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ipc.errors import invalid, precondition
from ipc.messages.storage import DeviceInfo

from .mounts import Progress

MAX_DEVICES = 16_384
MAX_PROFILE = 1024 * 1024
APPARMOR_PROFILES = "/sys/kernel/security/apparmor/profiles"
#: What a container has of its own, whoever it is.
OWN_DIRECTORIES = frozenset({"pts", "shm", "mqueue", "fd"})
OWN_NODES = frozenset({"console", "ptmx", "tty"})


def examine_devices(requested: list[str], progress: Progress, *, every: bool) -> list[DeviceInfo]:
    """The nodes that `requested` paths stand for, and with `every` those of the whole /dev.

    INVALID_ARGUMENT for a path that is neither a device nor a directory, FAILED_PRECONDITION if it is not
    there.
    """
    found: list[DeviceInfo] = []
    for path in requested:
        progress.at(path)
        found += _requested(path)
    if every:
        progress.at("/dev")
        found += _all_below("/dev")
    if len(found) > MAX_DEVICES:
        raise invalid(f"more than {MAX_DEVICES} devices in one container")
    return found


def _requested(path: str) -> list[DeviceInfo]:
    if not path.startswith("/"):
        raise invalid(f"device {path!r} is no absolute path")
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return list(_below(path))
    except OSError as error:
        raise precondition(f"device {path!r}: {error.strerror}") from error
    device = _device(path, "", status)
    if device is None:
        raise invalid(f"{path!r} is neither a device nor a directory")
    return [device]


def _below(directory: str) -> Iterator[DeviceInfo]:
    """The devices in a directory, also by way of links (/dev/disk/by-id has nothing else)."""
    for base, _, names in os.walk(directory):
        for name in sorted(names):
            path = os.path.join(base, name)
            status = _look(path)
            device = status and _device(directory, path[len(directory.rstrip("/")) :], status)
            if device:
                yield device


def _all_below(directory: str) -> Iterator[DeviceInfo]:
    """Every node of a directory by its own path; links stay links and are left out."""
    for base, directories, names in os.walk(directory):
        if base == directory:
            directories[:] = [name for name in directories if name not in OWN_DIRECTORIES]
            names = [name for name in names if name not in OWN_NODES]  # noqa: PLW2901 - filtered in place
        for name in sorted(names):
            path = os.path.join(base, name)
            status = None if os.path.islink(path) else _look(path)
            device = status and _device(path, "", status)
            if device:
                yield device


def _look(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # a dangling link, or gone again
        return None


def _device(requested: str, suffix: str, status: os.stat_result) -> DeviceInfo | None:
    kinds = {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}
    kind = kinds.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return None
    return DeviceInfo(
        requested=requested,
        type=kind,
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        suffix=suffix,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
    )


def profile_loaded(name: str, progress: Progress) -> bool:
    """Whether the kernel has an AppArmor profile of that name."""
    if not name:
        return False
    progress.at(APPARMOR_PROFILES)
    try:
        with open(APPARMOR_PROFILES, encoding="utf-8", errors="surrogateescape") as lines:
            return any(line.rpartition(" (")[0] == name for line in lines)
    except OSError:  # no AppArmor, or no securityfs
        return False


def read_profile(path: str, progress: Progress) -> bytes:
    """The content of a seccomp profile, b"" for no path. INVALID_ARGUMENT, FAILED_PRECONDITION."""
    if not path:
        return b""
    if not path.startswith("/"):
        raise invalid(f"seccomp profile {path!r} is no absolute path")
    progress.at(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise invalid(f"seccomp profile {path!r} is no regular file")
        with Path(path).open("rb") as file:
            data = file.read(MAX_PROFILE + 1)
    except OSError as error:
        raise precondition(f"seccomp profile {path!r}: {error.strerror}") from error
    if len(data) > MAX_PROFILE:
        raise invalid(f"seccomp profile {path!r} is larger than {MAX_PROFILE} bytes")
    return data
