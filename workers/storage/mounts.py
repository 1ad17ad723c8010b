"""Runs in: children of storage.

Mounts of the host: overlay roots of containers, and what a path that a pod wants to mount is, resolved.

Everything here may hang on a dead server's path; that is why it runs in a child. `Progress` is a page shared
with the worker that says what the child is at, so that the worker can name the path when time is up.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from ipc import kernel, log
from ipc.errors import RemoteError, internal, invalid, precondition
from ipc.messages.storage import MountSource, MountSourceInfo

_LOCKED = ("ro", "nosuid", "nodev", "noexec")
#: overlay(5): no index, so that an upper directory can be mounted again from anywhere; no metacopy, whose
#: half-copied files would let a hostile upper directory redirect reads.
OVERLAY_OPTIONS = "index=off,metacopy=off"
#: A container's writable layer goes with the container, at the latest when the machine is booted: its end
#: need not write the whole file system below to disk, as unmounting an overlay does. Since Linux 5.10.
VOLATILE = ",volatile"


class Progress:
    """What a child is doing, readable by its parent: step number, since when (CLOCK_MONOTONIC), and text."""

    _SIZE = 4096 + 256
    _HEAD = struct.Struct("<Qd")

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, self._SIZE)
        self._steps = 0

    def at(self, text: str) -> None:
        """The child's next step."""
        self._steps += 1
        data = os.fsencode(text)[: self._SIZE - self._HEAD.size - 1]
        self._page[self._HEAD.size : self._HEAD.size + len(data) + 1] = data + b"\0"
        self._HEAD.pack_into(self._page, 0, self._steps, time.monotonic())

    def read(self) -> tuple[int, str]:
        """Number and text of the step that the child is at."""
        return self._HEAD.unpack_from(self._page)[0], self._text()

    def describe(self, job: str, began: float) -> tuple[str, float]:
        """Text of the step that a job's child is at, and when it began; the job's own before its first."""
        since = self._HEAD.unpack_from(self._page)[1]
        return (self._text(), since) if since >= began else (job, began)

    def _text(self) -> str:
        return os.fsdecode(self._page[self._HEAD.size :].split(b"\0", 1)[0])

    def close(self) -> None:
        """Give the page back."""
        self._page.close()


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo (proc_pid_mountinfo(5))."""

    number: int
    mount_point: str
    options: tuple[str, ...]
    shared: bool
    slave: bool


def parse_mountinfo(line: str) -> Mount:
    """One line of /proc/PID/mountinfo."""
    fields = line.split(" ")
    optional = fields[6 : fields.index("-", 6)]
    return Mount(
        number=int(fields[0]),
        mount_point=_unescape(fields[4]),
        options=tuple(fields[5].split(",")),
        shared=any(f.startswith("shared:") for f in optional),
        slave=any(f.startswith("master:") for f in optional),
    )


def mounted_device(path: Path) -> str:
    """What the file system of `path` was mounted from ("/dev/sda1"), "" if it cannot be told."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            if fields[2] == wanted:
                return _unescape(fields[fields.index("-", 6) + 2])
    return ""


def _unescape(text: str) -> str:
    for code, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        text = text.replace(f"\\{code}", character)
    return text


def mount_of(fd: int) -> Mount:
    """The mount that an open file lies on. Raises RemoteError."""
    wanted = _mount_number(fd)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line.startswith(f"{wanted} "):
                return parse_mountinfo(line)
    raise internal(f"mount {wanted} is not in /proc/self/mountinfo")


def _mount_number(fd: int) -> str:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("mnt_id:"):
                return line.split()[1]
    raise internal("no mnt_id in /proc/self/fdinfo")


def examine_source(source: MountSource, progress: Progress) -> MountSourceInfo:
    """Make a mount source if it is missing and may be made, and look at it.

    INVALID_ARGUMENT for a relative path, FAILED_PRECONDITION if it is missing or cannot be made.
    """
    if not source.path.startswith("/") or "\0" in source.path:
        raise invalid(f"mount source {source.path!r} is no absolute path")
    progress.at(source.path)
    try:
        real = os.path.realpath(source.path)
        fd = _open_source(real, source)
        try:
            mount = mount_of(fd)
            return MountSourceInfo(
                path=real,
                is_directory=stat.S_ISDIR(os.fstat(fd).st_mode),
                shared=mount.shared,
                slave=mount.slave,
                locked_flags=[flag for flag in _LOCKED if flag in mount.options],
            )
        finally:
            os.close(fd)
    except OSError as error:
        raise precondition(f"mount source {source.path!r}: {error.strerror}") from error


def _open_source(real: str, source: MountSource) -> int:
    try:
        return os.open(real, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        if not source.create:
            raise
    make_directories(Path(real))
    return os.open(real, os.O_PATH | os.O_CLOEXEC)


def make_directories(path: Path) -> None:
    """mkdir -p with mode 0755 whatever the umask is; several may do it at once."""
    os.umask(0o022)
    path.mkdir(mode=0o755, parents=True, exist_ok=True)


# -- overlay --------------------------------------------------------------------------------------------


def overlay_options(lowers: list[str], upper: str, work: str) -> str:
    """overlay's option string; lowers nearest first."""
    lower = ":".join(_escape(path, "\\:,") for path in lowers)
    return (
        f"lowerdir={lower},upperdir={_escape(upper, chr(92) + ',')},"
        f"workdir={_escape(work, chr(92) + ',')},{OVERLAY_OPTIONS}"
    )


def _escape(path: str, characters: str) -> str:
    return "".join(f"\\{c}" if c in characters else c for c in path)


def mount_overlay(links: Path, lowers: list[str], upper: Path, work: Path, target: Path) -> None:
    """Mount an overlay on `target`. `lowers` are names in `links`: the options of 500 layers fit one page
    (mount(2) takes no more). Raises RemoteError."""
    os.chdir(links)
    try:
        forget_volatile(work)
        _mount_volatile(str(target), overlay_options(lowers, str(upper), str(work)))
    except OSError as error:
        raise internal(f"cannot mount the container's root file system: {error.strerror}") from error
    finally:
        os.chdir("/")


def _mount_volatile(target: str, options: str) -> None:
    try:
        kernel.mount("overlay", target, "overlay", 0, options + VOLATILE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        kernel.mount("overlay", target, "overlay", 0, options)


def forget_volatile(work: Path) -> None:
    """Overlay marks a layer that was mounted so, for whoever might need what was lost with the machine."""
    mark = work / "work" / "incompat" / "volatile"
    with contextlib.suppress(FileNotFoundError):
        (mark / "dirty").unlink()
    for directory in (mark, mark.parent):
        remove_directory(directory)


def mount_points(directory: str) -> set[str]:
    """Everything that is mounted below a directory."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        points = {_unescape(line.split(" ", 5)[4]) for line in lines}
    return {point for point in points if point.startswith(f"{directory}/")}


def is_mounted(target: Path) -> bool:
    """True if something is mounted on the directory `target`."""
    return target.is_dir() and os.path.ismount(target)


def unmount_all(target: Path) -> None:
    """Unmount all that is mounted on `target`; lazily, with a warning, what is busy. Raises RemoteError."""
    while True:
        try:
            kernel.umount(str(target))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # not a mount point (any more)
                return
            if error.errno != errno.EBUSY:
                raise _cannot_unmount(target, error) from error
            log.get().warning("mount is busy, unmounted lazily", path=target)
            _unmount_lazily(target)


def _unmount_lazily(target: Path) -> None:
    try:
        kernel.umount(str(target), kernel.MNT_DETACH)
    except OSError as error:
        raise _cannot_unmount(target, error) from error


def _cannot_unmount(target: Path, error: OSError) -> RemoteError:
    return internal(f"cannot unmount {target}: {error.strerror}")


def remove_directory(path: Path) -> None:
    """rmdir, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()
