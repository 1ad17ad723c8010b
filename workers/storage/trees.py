"""Runs in: children of storage.

Deleting what an image or a container made: trees of any depth and with any names, without following a link
and without leaving the file system they are on.
"""

from __future__ import annotations

import os
from pathlib import Path

from ipc import log


def delete_trees(victims: list[str], trash: str) -> int:
    """Delete directory trees. `trash`: a name for a new directory on the same file system, used meanwhile.

    Returns how many entries could not be removed (immutable files, mount points); each tree is logged.
    Subdirectories are moved up before they are emptied, so no path is ever longer than two names.
    """
    Path(trash).mkdir(mode=0o700)
    trash_fd = os.open(trash, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        failures = sum(_delete(victim, trash_fd) for victim in victims)
    finally:
        os.close(trash_fd)
    if not failures:
        Path(trash).rmdir()
    return failures


def _delete(victim: str, trash_fd: int) -> int:
    first = os.urandom(4).hex()
    try:
        os.rename(victim, first, dst_dir_fd=trash_fd)
    except FileNotFoundError:
        return 0
    pending, failures, number = [first], 0, 0
    emptied: list[str] = []
    while pending:
        name = pending.pop()
        found, failed = _empty(name, trash_fd, f"{first}-{number}")
        pending += found
        failures += failed
        number += 1
        emptied.append(name)
    for name in emptied:
        failures += not _remove_directory(name, trash_fd)
    if failures:
        log.get().warning("cannot delete all of a tree", tree=victim, left=failures)
    return failures


def _empty(name: str, trash_fd: int, prefix: str) -> tuple[list[str], int]:
    """Unlink what is in trash/<name>, move its directories up. Returns their new names, and the failures."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=trash_fd)
    moved: list[str] = []
    failures = 0
    try:
        for entry in os.listdir(fd):
            try:
                if not _unlink(entry, fd):
                    target = f"{prefix}-{len(moved)}"
                    os.rename(entry, target, src_dir_fd=fd, dst_dir_fd=trash_fd)
                    moved.append(target)
            except OSError as error:
                log.get().debug("cannot delete", name=entry, why=error)
                failures += 1
    finally:
        os.close(fd)
    return moved, failures


def _unlink(entry: str, fd: int) -> bool:
    """True if `entry` was no directory and is gone."""
    try:
        os.unlink(entry, dir_fd=fd)
    except IsADirectoryError:
        return False
    return True


def _remove_directory(name: str, trash_fd: int) -> bool:
    try:
        os.rmdir(name, dir_fd=trash_fd)
    except OSError:
        return False
    return True
