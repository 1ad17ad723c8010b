"""Runs in: children of storage, and (VolumePlan) in storage.

Image volumes: the layers of an image, mounted read-only for one mount of one container, and the path inside
them that is used. Also the directories that an image declares as VOLUMEs.

Owns <run_root>/containers/<id>/volumes/<position>. What an image names is resolved inside of it (openat2,
RESOLVE_IN_ROOT), so no link of it leads out. Every refusal of an image volume has the reason that kubelets
know, ImageVolumeMountFailed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ipc import kernel
from ipc.errors import Code, RemoteError, invalid
from ipc.messages import Body
from ipc.messages.storage import MountSourceInfo

from . import mounts
from .layers import LowerLayer

REASON = "ImageVolumeMountFailed"
#: Programs of an image volume can be run, as in a container of it; they give nobody rights or devices.
LOCKED_FLAGS = ["ro", "nosuid", "nodev"]
FLAGS = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
_INSIDE = kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS | kernel.RESOLVE_NO_XDEV


class VolumePlan(Body):
    """One image volume: which mount of the request it is, what is used of it, and what it is made of."""

    position: int
    image_id: str
    sub_path: str
    lowers: list[LowerLayer]


def volume_directory(mounted: str, position: int) -> Path:
    """Where an image volume of a container is mounted."""
    return Path(mounted, "volumes", str(position))


def mount_volume(volume: VolumePlan, mounted: str, links: Path, empty: str) -> MountSourceInfo:
    """Mount an image volume, if it is not mounted yet. `links` has its layers. Raises RemoteError."""
    target = volume_directory(mounted, volume.position)
    os.umask(0o022)
    try:
        # the directory above is closed to all but the container's root, who must pass here
        target.parent.mkdir(mode=0o711, exist_ok=True)
        target.mkdir(mode=0o711, exist_ok=True)
        if not mounts.is_mounted(target):
            _mount_layers(volume, target, links, empty)
        return _resolved(target, volume)
    except OSError as error:
        raise failed(Code.INTERNAL, f"cannot mount image {volume.image_id}: {error.strerror}") from error


def failed(code: Code, text: str) -> RemoteError:
    """The refusal of an image volume."""
    return RemoteError(code, text, reason=REASON)


def _mount_layers(volume: VolumePlan, target: Path, links: Path, empty: str) -> None:
    if not volume.lowers:
        kernel.mount("empty", str(target), "tmpfs", FLAGS, "mode=0755,size=4k")
        return
    # an overlay without an upper directory wants two lower ones at least
    lowers = ":".join([*(lower.link for lower in volume.lowers), empty])
    os.chdir(links)
    try:
        options = f"lowerdir={lowers},{mounts.OVERLAY_OPTIONS}"
        kernel.mount("overlay", str(target), "overlay", FLAGS, options)
    finally:
        os.chdir("/")


def _resolved(target: Path, volume: VolumePlan) -> MountSourceInfo:
    """The path of what is used. It stays what it is: nothing in a read-only mount can become a link."""
    root_fd = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = _open_inside(root_fd, volume)
    finally:
        os.close(root_fd)
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            text = f"sub path {volume.sub_path!r} of image volume {volume.image_id} is no directory or file"
            raise failed(Code.INVALID_ARGUMENT, text)
        path = os.readlink(f"/proc/self/fd/{fd}")
        return MountSourceInfo(path=path, is_directory=stat.S_ISDIR(mode), locked_flags=LOCKED_FLAGS)
    finally:
        os.close(fd)


def _open_inside(root_fd: int, volume: VolumePlan) -> int:
    path = volume.sub_path.lstrip("/") or "."
    try:
        return kernel.openat2(root_fd, path, os.O_PATH, resolve=_INSIDE)
    except (FileNotFoundError, NotADirectoryError):
        text = f"sub path {volume.sub_path!r} does not exist in image volume {volume.image_id}"
        raise failed(Code.FAILED_PRECONDITION, text) from None
    except OSError as error:  # a circle of links, a name that is too long
        text = f"sub path {volume.sub_path!r} of image volume {volume.image_id}: {error.strerror}"
        raise failed(Code.INVALID_ARGUMENT, text) from error


def unmount_volumes(mounted: str) -> None:
    """Unmount every image volume of a container and remove their directories. Raises RemoteError."""
    home = Path(mounted, "volumes")
    if not home.is_dir():
        return
    for path in home.iterdir():
        mounts.unmount_all(path)
        mounts.remove_directory(path)
    mounts.remove_directory(home)


# -- VOLUMEs ----------------------------------------------------------------------------------------------


def make_directories(root_fd: int, paths: list[str], owner: tuple[int, int]) -> None:
    """Make the directories (0755) that are missing inside a root. INVALID_ARGUMENT for what cannot be one."""
    os.umask(0o022)
    for path in paths:
        try:
            _make_directory(root_fd, [part for part in path.split("/") if part not in {"", "."}], owner)
        except OSError as error:
            raise invalid(f"the image's VOLUME {path!r} cannot be made: {error.strerror}") from error


def _make_directory(root_fd: int, parts: list[str], owner: tuple[int, int]) -> None:
    parent_fd = os.dup(root_fd)
    try:
        for depth, name in enumerate(parts, start=1):
            try:
                fd = _enter(root_fd, parts[:depth])
            except FileNotFoundError:
                os.mkdir(name, 0o755, dir_fd=parent_fd)
                os.chown(name, *owner, dir_fd=parent_fd, follow_symlinks=False)
                fd = _enter(root_fd, parts[:depth])
            os.close(parent_fd)
            parent_fd = fd
    finally:
        os.close(parent_fd)


def _enter(root_fd: int, parts: list[str]) -> int:
    """The directory of that path, links resolved inside the root."""
    return kernel.openat2(root_fd, "/".join(parts), os.O_PATH | os.O_DIRECTORY, resolve=_INSIDE)
