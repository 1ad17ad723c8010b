"""Runs in: every worker that has a view, after it entered a mount namespace of its own.

A root directory that holds the declared paths and nothing else. Each path is bound alone (but trees, which
say so), the host's mounts are let go, so that no worker keeps one of them from being unmounted.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import struct
from collections.abc import Iterable, Mapping

from ipc import kernel
from supervisor.sandbox.spec import Bind

_SAFE = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
_ROOT_OPTIONS = "mode=0755,size=256k,nr_inodes=512"

_SYS_MOUNT_SETATTR = 442  # the same on every machine
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
#: The MOUNT_ATTR_* bits have the values of the MS_* flags of the same names.
_STRUCT_MOUNT_ATTR = struct.Struct("=4Q")


def expand(view: Iterable[Bind], paths: Mapping[str, str]) -> list[Bind]:
    """The declared binds with real paths; optional ones that are absent are left out.

    Raises FileNotFoundError for one that must be there, KeyError for an unknown template.
    """
    expanded = (
        dataclasses.replace(bind, path=path) for bind in view for path in _paths(bind.path, paths) if path
    )
    return [bind for bind in expanded if not bind.optional or os.path.exists(bind.path)]


def _paths(template: str, paths: Mapping[str, str]) -> list[str]:
    """A template's paths; a value that names several, separated by ":", makes several."""
    return template.format_map(paths).split(":")


def build(binds: Iterable[Bind], staging: str) -> list[str]:
    """Make the view and change into it; `staging` is an empty directory to make it at.

    Returns what this host lacks. Raises OSError.
    """
    umask = os.umask(0o022)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("view", staging, "tmpfs", _SAFE, _ROOT_OPTIONS)
    for bind in binds:
        _attach(bind, staging + bind.path)
    degraded = _change_root(staging)
    kernel.mount("", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _SAFE)
    os.umask(umask)
    return degraded


def _attach(bind: Bind, target: str) -> None:
    """Bind one path at the same place below the new root, with the fewest mount flags it can live with."""
    mode = os.stat(bind.path).st_mode
    _make_target(target, directory=stat.S_ISDIR(mode))
    kernel.bind_mount(bind.path, target, recursive=bind.tree)
    flags = _SAFE if bind.writable else _SAFE | kernel.MS_RDONLY
    if stat.S_ISCHR(mode):
        flags &= ~kernel.MS_NODEV
    if bind.tree:
        _set_attributes(target, flags)
    else:
        kernel.mount("", target, "", kernel.MS_REMOUNT | kernel.MS_BIND | flags)


def _make_target(target: str, *, directory: bool) -> None:
    """Something of the right type to mount on; inside a directory that is bound already it is there."""
    if directory:
        os.makedirs(target, exist_ok=True)
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.lexists(target):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def _set_attributes(target: str, flags: int) -> None:
    """mount_setattr(2) for a mount and all below it; before Linux 5.12 for each by itself."""
    attributes = _STRUCT_MOUNT_ATTR.pack(flags, 0, 0, 0)
    try:
        kernel.syscall(
            _SYS_MOUNT_SETATTR,
            _AT_FDCWD,
            target.encode(),
            _AT_RECURSIVE,
            attributes,
            len(attributes),
            what=f"set mount attributes of {target!r}",
        )
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        for mount in _mounts_below(target):
            kernel.mount("", mount, "", kernel.MS_REMOUNT | kernel.MS_BIND | flags)


def _mounts_below(target: str) -> list[str]:
    """Mount points at and below a path."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split()[4].encode().decode("unicode_escape") for line in file]
    return [point for point in points if point == target or point.startswith(target + "/")]


def _change_root(new_root: str) -> list[str]:
    """Make `new_root` the root and let go of the old one."""
    os.chdir(new_root)
    try:
        kernel.pivot_root(".", ".")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # The host runs from its initial RAM disk, which cannot be pivoted away (pivot_root(2), NOTES).
        kernel.mount(".", "/", "", kernel.MS_MOVE)
        os.chroot(".")
        os.chdir("/")
        return ["mount view: the root is an initial RAM disk, its mounts are hidden but not let go"]
    kernel.umount(".", kernel.MNT_DETACH)
    os.chdir("/")
    return []
