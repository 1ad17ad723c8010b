"""Runs in: a child of storage, one per commit.

The last step of a layer: what the unpack child could not know or write. Directories that the archive only
implied get the looks that they have in the nearest layer below; opaque directories get overlayfs's attribute.
Then everything is written to disk, and the directory gets its name: whole or not at all.

What is read here was written by a process that handled a hostile archive: the report is decoded with its
types checked, and every path in it is opened below the layer's root without following links.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ipc import kernel, log
from ipc.errors import Code, RemoteError, internal

from .database import LayerRow
from .report import LayerReport
from .whiteouts import OPAQUE_XATTR

MAX_REPORT = 256 * 1024 * 1024
REPORT, DESCRIPTION, DIFF = "report", "layer.json", "diff"
_BENEATH = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OVERLAY_XATTRS = "trusted.overlay."


def commit_layer(staging: str, target: str, chain_id: str, parent: str, lowers: list[str]) -> bytes:
    """Finish `<staging>` and rename it to `target`. `lowers`: diff directories below, nearest first.

    Returns the LayerRow in JSON. Raises RemoteError; the staging is the caller's to delete then.
    """
    report = _read_report(Path(staging, REPORT))
    try:
        diff_fd = os.open(Path(staging, DIFF), _DIRECTORY)
        try:
            _finish_directories(diff_fd, report, lowers)
        finally:
            os.close(diff_fd)
        row = _describe(Path(staging), report, chain_id, parent)
        _put_in_place(Path(staging), Path(target))
    except OSError as error:
        raise _explain(error) from error
    return msgspec.json.encode(row)


def _read_report(path: Path) -> LayerReport:
    with path.open("rb") as file:
        data = file.read(MAX_REPORT + 1)
    try:
        if len(data) > MAX_REPORT:
            raise msgspec.DecodeError("too large")
        return msgspec.msgpack.decode(data, type=LayerReport)
    except msgspec.DecodeError as error:
        raise internal(f"the unpack child's report is broken: {error}") from error


def _finish_directories(diff_fd: int, report: LayerReport, lowers: list[str]) -> None:
    for path in report.opaque:
        with _opened(diff_fd, path) as fd:
            os.setxattr(fd, OPAQUE_XATTR, b"y")
    lower_fds = [os.open(lower, _DIRECTORY) for lower in lowers] if report.implied else []
    try:
        for path in report.implied:
            with _opened(diff_fd, path) as fd:
                _look_like(fd, path, lower_fds)
    finally:
        for lower_fd in lower_fds:
            os.close(lower_fd)


@contextlib.contextmanager
def _opened(diff_fd: int, path: bytes) -> Iterator[int]:
    fd = kernel.openat2(diff_fd, path or b".", _DIRECTORY, resolve=_BENEATH)
    try:
        yield fd
    finally:
        os.close(fd)


def _look_like(fd: int, path: bytes, lower_fds: list[int]) -> None:
    """Give a directory the owner, mode, attributes and times of the one that it will cover."""
    for lower_fd in lower_fds:
        model, covered = find_below(lower_fd, path)
        if model is not None:
            try:
                copy_looks(model, fd)
            finally:
                os.close(model)
        if covered:
            return


def find_below(lower_fd: int, path: bytes) -> tuple[int | None, bool]:
    """The directory `path` of one layer, and whether the search ends here: found, or hidden from view."""
    fd = os.dup(lower_fd)
    opaque = _is_opaque(fd)
    for part in [p for p in path.split(b"/") if p]:
        try:
            below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        except FileNotFoundError:
            os.close(fd)
            return None, opaque
        except NotADirectoryError:  # a whiteout, a file, a link
            os.close(fd)
            return None, True
        os.close(fd)
        fd = below
        opaque = opaque or _is_opaque(fd)
    return fd, True


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(fd, OPAQUE_XATTR) == b"y"
    except OSError:
        return False


def copy_looks(source_fd: int, target_fd: int) -> None:
    """Copy owner, mode, extended attributes (but overlayfs's own) and times of a directory."""
    status = os.fstat(source_fd)
    os.fchown(target_fd, status.st_uid, status.st_gid)
    os.fchmod(target_fd, status.st_mode & 0o7777)
    for name in os.listxattr(source_fd):
        if not name.startswith(_OVERLAY_XATTRS):
            with contextlib.suppress(OSError):  # a policy's own label, which only the policy may set
                os.setxattr(target_fd, name, os.getxattr(source_fd, name))
    os.utime(target_fd, ns=(status.st_mtime_ns, status.st_mtime_ns))


def _describe(staging: Path, report: LayerReport, chain_id: str, parent: str) -> LayerRow:
    row = LayerRow(
        chain_id=chain_id,
        parent=parent,
        diff_id=report.diff_id,
        size=report.size,
        entries=report.entries,
        opaque=b"" in report.opaque,
    )
    (staging / REPORT).unlink()
    (staging / DESCRIPTION).write_bytes(msgspec.json.encode(row))
    if report.ignored_xattrs:
        log.get().info("attributes left out", chain_id=chain_id, names=report.ignored_xattrs)
    return row


def _put_in_place(staging: Path, target: Path) -> None:
    staging_fd = os.open(staging, _DIRECTORY)
    parent_fd = os.open(target.parent, _DIRECTORY)
    try:
        kernel.syncfs(staging_fd)
        staging.rename(target)
        os.fsync(parent_fd)
    finally:
        os.close(staging_fd)
        os.close(parent_fd)


def _explain(error: OSError) -> RemoteError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RemoteError(Code.RESOURCE_EXHAUSTED, f"cannot commit the layer: {error.strerror}")
    return internal(f"cannot commit the layer: {error}")
