"""Runs in: children of storage.

SELinux labels of volumes: everything below a mount source gets the label that the container may touch
(CRI Mount.selinux_relabel). Links are labelled, never followed; other mounts below are left alone.

Refuses directories whose labels the system itself lives by, and file systems that keep no labels are left as
they are: what they have is decided by how they are mounted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from ipc.errors import precondition

from .mounts import Progress

ATTRIBUTE = "security.selinux"
#: Relabelled with all that is below, these would lock the node out of itself.
_USR = ("bin", "lib", "lib64", "sbin")
_ROOT = (*_USR, "boot", "dev", "etc", "home", "opt", "proc", "root", "run", "srv", "sys", "tmp", "usr", "var")
_VAR = ("lib", "log", "run", "tmp")
SYSTEM = frozenset(
    ["/", *(f"/{n}" for n in _ROOT), *(f"/usr/{n}" for n in _USR), *(f"/var/{n}" for n in _VAR)]
)
_STEP = 1000


def relabel(path: str, label: str, progress: Progress) -> None:
    """Label `path` (its links resolved) and all below it. FAILED_PRECONDITION if that cannot be."""
    if path in SYSTEM:
        raise precondition(f"mount source {path!r} cannot be relabelled: the system needs its labels")
    value = label.encode() + b"\0"
    try:
        for number, entry in enumerate(_tree(path)):
            if number % _STEP == 0:
                progress.at(f"labels below {path}")
            _label(entry, value)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EROFS):
            return
        raise precondition(f"mount source {path!r} cannot be relabelled: {error.strerror}") from error


def _tree(path: str) -> Iterator[str]:
    yield path
    device = os.lstat(path).st_dev
    for base, directories, names in os.walk(path):
        directories[:] = [name for name in directories if _same(os.path.join(base, name), device)]
        for name in (*directories, *names):
            yield os.path.join(base, name)


def _same(path: str, device: int) -> bool:
    try:
        return os.lstat(path).st_dev == device
    except FileNotFoundError:
        return False


def _label(path: str, value: bytes) -> None:
    try:
        if _current(path) != value:
            os.setxattr(path, ATTRIBUTE, value, follow_symlinks=False)
    except FileNotFoundError:  # removed by whoever uses the volume
        return


def _current(path: str) -> bytes:
    try:
        return os.getxattr(path, ATTRIBUTE, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return b""
        raise
