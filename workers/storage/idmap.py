"""Runs in: children of storage.

Containers in a user namespace: layers and volumes keep their owners on disk and are seen, through id-mapped
mounts, as the namespace maps them. Such mounts are made here, not by the OCI runtime, so every runtime that
can join a user namespace can have them. The overlay's upper directory is not mapped (overlayfs could not make
its work directory in it): what the container writes is on disk under the host's ids.

Owned: `<run_root>/containers/<id>/lower`, mounted while the overlay is being mounted, and `mounts/<n>`, the
container's id-mapped volumes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ipc import kernel, userns
from ipc.errors import RemoteError, internal, invalid, precondition
from ipc.messages import Body, IdMapping
from ipc.messages.storage import IdmapSupport, MountSource, MountSourceInfo
from workers.jobs import Beside

from . import mounts

LOWER, VOLUMES = "lower", "mounts"
_PROBED = IdMapping(container_id=0, host_id=1_000_000, length=1)


class Mapped(Body):
    """The user namespace of a container's pod: where it is pinned, and its mappings."""

    pin: str
    uids: list[IdMapping]
    gids: list[IdMapping]

    def owner(self, uid: int, gid: int) -> tuple[int, int]:
        """The host's ids of a container's. FAILED_PRECONDITION if they have none."""
        try:
            return userns.on_host(self.uids, uid), userns.on_host(self.gids, gid)
        except LookupError as error:
            raise precondition(f"the pod's user namespace does not map the owner {error} of /") from None

    def check(self, uid: int, gids: list[int]) -> None:
        """INVALID_ARGUMENT for a user that cannot be in the namespace."""
        for what, mappings, numbers in (("uid", self.uids, [uid]), ("gid", self.gids, gids)):
            for number in numbers:
                try:
                    userns.on_host(mappings, number)
                except LookupError:
                    raise invalid(f"{what} {number} is not in the pod's user namespace") from None


def mount_mapped(source: str, target: str, pin: str, *, recursive: bool = False) -> None:
    """Mount `source` on `target`, its ids seen as the namespace pinned at `pin` maps them. Raises OSError."""
    namespace_fd = os.open(pin, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mount_fd = kernel.clone_mount(source, recursive=recursive)
        try:
            kernel.idmap_mount(mount_fd, namespace_fd, recursive=recursive)
            kernel.attach_mount(mount_fd, target)
        finally:
            os.close(mount_fd)
    finally:
        os.close(namespace_fd)


def mount_overlay(
    mapped: Mapped, root: Path, home: Path, *, links: str, lowers: list[str], upper: Path, work: Path
) -> None:
    """Mount the overlay at `<home>/rootfs`, its layers below `root` seen as mapped. Raises RemoteError."""
    with mapped_root(mapped, root, home) as lower:
        mounts.mount_overlay(lower / links, lowers, upper, work, home / "rootfs")


@contextlib.contextmanager
def mapped_root(mapped: Mapped, root: Path, home: Path) -> Iterator[Path]:
    """`root` seen as mapped, for as long as overlays of its layers are being mounted. Raises RemoteError.

    One mapped mount serves all layers; an overlay keeps copies of it, so it goes again.
    """
    lower = home / LOWER
    mounts.unmount_all(lower)
    lower.mkdir(mode=0o700, exist_ok=True)
    try:
        mount_mapped(str(root), str(lower), mapped.pin)
    except OSError as error:
        raise precondition(f"{root} cannot be mounted with mapped ids: {error.strerror}") from error
    try:
        yield lower
    finally:
        mounts.unmount_all(lower)
        lower.rmdir()


def mount_volumes(
    mapped: Mapped, home: Path, sources: list[MountSource], infos: list[MountSourceInfo]
) -> None:
    """Mount the sources that are to be mapped, and say in their infos where. Raises RemoteError, OSError."""
    for number, (source, info) in enumerate(zip(sources, infos, strict=True)):
        if source.idmap:
            target = home / VOLUMES / str(number)
            _mount_volume(mapped, info, target)
            info.path = str(target)


def _mount_volume(mapped: Mapped, info: MountSourceInfo, target: Path) -> None:
    target.parent.mkdir(mode=0o700, exist_ok=True)
    mounts.unmount_all(target)
    if info.is_directory:
        target.mkdir(mode=0o700, exist_ok=True)
    else:
        target.touch(mode=0o600)
    try:
        mount_mapped(info.path, str(target), mapped.pin, recursive=True)
    except OSError as error:
        text = f"mount source {info.path!r}: its file system cannot map ids ({error.strerror})"
        raise precondition(text) from error


def unmount_volumes(home: Path) -> None:
    """Take all away again. Absent is success. Raises RemoteError."""
    mounts.unmount_all(home / LOWER)
    for target in _entries(home / VOLUMES):
        mounts.unmount_all(target)


def remove(home: Path) -> None:
    """Remove the mount points, unmounted before."""
    mounts.remove_directory(home / LOWER)
    for target in _entries(home / VOLUMES):
        target.rmdir() if target.is_dir() else target.unlink()
    mounts.remove_directory(home / VOLUMES)


def _entries(directory: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return list(directory.iterdir())
    return []


# -- probe ----------------------------------------------------------------------------------------------


def probe(root: str, scratch: str) -> IdmapSupport:
    """Try all that containers need, on the file system of `root`, in a mount namespace that ends with us."""
    home = Path(scratch)
    try:
        _try(Path(root), home)
    except (OSError, RemoteError) as error:
        return IdmapSupport(supported=False, why=f"user namespaces: {error}")
    finally:
        mounts.forget_volatile(home / "work")
        for name in ("layer/file", "layer", LOWER, "upper", "work/work", "work", "rootfs", ""):
            with contextlib.suppress(OSError):
                path = home / name
                path.unlink() if path.is_file() else path.rmdir()
    return IdmapSupport(supported=True)


def _try(root: Path, home: Path) -> None:
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    for name in ("layer", "upper", "work", "rootfs"):
        (home / name).mkdir(mode=0o700, parents=True)
    (home / "layer/file").touch()
    with Beside(userns.unshare) as other:
        other.step()
        userns.write_mappings(other.pid, [_PROBED], [_PROBED])
        mapped = Mapped(pin=f"/proc/{other.pid}/ns/user", uids=[_PROBED], gids=[_PROBED])
        links = str((home / "layer").relative_to(root).parent)
        upper, work = home / "upper", home / "work"
        mount_overlay(mapped, root, home, links=links, lowers=["layer"], upper=upper, work=work)
    seen = (home / "rootfs/file").stat().st_uid
    kernel.umount(str(home / "rootfs"))
    if seen != _PROBED.host_id:
        raise internal("an overlay on an id-mapped layer does not map its ids")
