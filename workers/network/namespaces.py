"""Runs in: children of network.

A pod's namespaces: made by `unshare` in a child that returns afterwards, prepared from inside, and pinned by
bind mounts of `/proc/self/ns/X` in the node's mount namespace. It owns the pins `net`, `ipc`, `uts` and
`user` of `<run_root>/ns/<pod_id>/`; a `pid` pin beside them is the supervisor's and is left alone.

With a user namespace a process beside the child makes them all, since nobody comes back from one; the
child writes the mappings, for that needs the node's own SETUID and SETGID.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator, Mapping

from ipc import kernel, userns
from ipc.errors import invalid
from ipc.messages import IdMapping
from workers.jobs import Beside
from workers.network import sysctl

FLAGS = {
    "net": kernel.CLONE_NEWNET,
    "ipc": kernel.CLONE_NEWIPC,
    "uts": kernel.CLONE_NEWUTS,
    "user": kernel.CLONE_NEWUSER,
}
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_IFREQ = "16sH14x"
_HOSTNAME_LIMIT = 64  # __NEW_UTS_LEN
_LAST_ID = 2**32 - 2

#: uid and gid mappings of a user namespace, none for a pod without one.
Mappings = tuple[list[IdMapping], list[IdMapping]]


def check(namespaces: Collection[str], hostname: str, mappings: Mappings = ([], [])) -> None:
    """Raise INVALID_ARGUMENT for a namespace that is not ours, or a host name that cannot be set, or mappings
    that are not one range each, of container id 0 on, without the host's root in it."""
    unknown = [name for name in namespaces if name not in FLAGS]
    if unknown:
        raise invalid(f"namespace {unknown[0]!r} is none of {', '.join(FLAGS)}")
    if hostname and "uts" not in namespaces:
        raise invalid("a host name needs the pod to have its own uts namespace")
    if len(hostname.encode()) > _HOSTNAME_LIMIT or not hostname.isprintable():
        raise invalid(f"host name {hostname!r} cannot be set")
    if ("user" in namespaces) != any(mappings):
        raise invalid("a user namespace and id mappings need each other")
    for ranges in mappings if "user" in namespaces else ():
        _check_range(ranges)


def _check_range(ranges: list[IdMapping]) -> None:
    if len(ranges) != 1:
        raise invalid("a user namespace has exactly one mapping of uids and one of gids")
    one = ranges[0]
    if one.container_id != 0 or not 0 < one.host_id <= one.host_id + one.length - 1 <= _LAST_ID:
        raise invalid(f"id mapping {one.container_id} {one.host_id} {one.length} cannot be made")


def paths(directory: str, namespaces: Collection[str]) -> dict[str, str]:
    """Return where each namespace is pinned, in the order of FLAGS."""
    return {name: os.path.join(directory, name) for name in FLAGS if name in namespaces}


def make(
    pins: Mapping[str, str], *, hostname: str, sysctls: Mapping[str, str], mappings: Mappings = ([], [])
) -> None:
    """Make new namespaces, prepare and pin them.

    Raises RemoteError or OSError; pins may then stand and are the caller's to remove.
    """

    def prepare() -> None:
        if "net" in pins:
            _loopback_up()
        if hostname:
            socket.sethostname(hostname)
        sysctl.apply(sysctls)

    if "user" in pins:
        _make_owned(pins, mappings, prepare)
        return
    with _unshared(pins):
        prepare()
        for name, path in pins.items():
            _pin(name, path)


def _make_owned(pins: Mapping[str, str], mappings: Mappings, prepare: Callable[[], None]) -> None:
    others = sum(FLAGS[name] for name in pins if name != "user")

    def prepare_as_root() -> None:
        userns.become_root()
        prepare()

    with Beside(lambda: userns.unshare(others), prepare_as_root) as maker:
        maker.step()
        userns.write_mappings(maker.pid, *mappings)
        for name, path in pins.items():  # now: who changes its uid hides its /proc entries from us
            _pin(name, path, maker.pid)
        maker.step()


@contextlib.contextmanager
def _unshared(names: Collection[str]) -> Iterator[None]:
    """In new namespaces; back in the old ones at the end."""
    flags = 0
    with contextlib.ExitStack() as stack:
        for name in names:
            flags |= FLAGS[name]
            home_fd = os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, home_fd)
            stack.callback(kernel.setns, home_fd, FLAGS[name])
        kernel.unshare(flags)
        yield


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack(_IFREQ, b"lo", 0)
        _name, flags = struct.unpack(_IFREQ, fcntl.ioctl(sock, _SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack(_IFREQ, b"lo", flags | _IFF_UP))


def _pin(name: str, path: str, process: int | str = "self") -> None:
    os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400))
    kernel.bind_mount(f"/proc/{process}/ns/{name}", path)
    kernel.mount("", path, "", kernel.MS_PRIVATE)


def unpin(directory: str) -> None:
    """Remove the pins of a pod, whatever there is of them. Raises OSError.

    Copies of a pin in other mount namespaces go with the file (unlink detaches them), so the namespace ends.
    """
    if not os.path.isdir(directory):
        return
    for name in FLAGS:
        path = os.path.join(directory, name)
        _unmount(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENOTEMPTY}:
            raise


def _unmount(path: str) -> None:
    while True:
        try:
            kernel.umount(path, kernel.MNT_DETACH)
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.ENOENT}:  # not a mount point, nothing there
                return
            raise


def pinned(path: str) -> bool:
    """Whether a namespace is pinned at `path`: after a reboot, files may stand there without one."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_dev == os.stat("/proc/self/ns/net").st_dev
    return False


def pods(directory: str) -> list[str]:
    """Names of the directories in which pins of ours stand."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(pod for pod in os.listdir(directory) if _has_pins(os.path.join(directory, pod)))
    return []


def _has_pins(directory: str) -> bool:
    return any(os.path.lexists(os.path.join(directory, name)) for name in FLAGS)
