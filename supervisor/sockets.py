"""Runs in: the supervisor.

The sockets that the supervisor binds and holds for its own life: one listening SEQPACKET socket per kind,
and the extra ones that an entry of the process table names. Who may connect is decided twice: here by the
socket file's access list, made of the table's callers, and by the receiver from SO_PEERCRED. It also puts the
CRI socket, which cri has bound, into its public place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ipc import channel
from ipc.errors import RemoteError, invalid
from supervisor.files import remove_tree
from supervisor.sandbox.spec import Identity
from supervisor.table import Entry

BACKLOG = 256
IN_USE_WAIT = 5.0  # seconds for the workers of a supervisor that was killed to let go of a port
#: Of an extra socket: the path of a Unix socket, or an IP address and a port.
Place = str | tuple[str, int]
_ACL = "system.posix_acl_access"
_ACL_VERSION = 2  # linux/posix_acl_xattr.h
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
_READ_WRITE = 6


@dataclass
class Sockets:
    """The listening sockets of one kind."""

    listener: socket.socket
    extra: dict[str, socket.socket] = field(default_factory=dict)

    def all(self) -> list[socket.socket]:
        """Every one of them."""
        return [self.listener, *self.extra.values()]

    def waiting(self) -> bool:
        """True if a connection waits to be accepted."""
        return any_readable(self.all())

    def close(self) -> None:
        """Close them and remove their paths."""
        for sock in self.all():
            if sock.family == socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    os.unlink(sock.getsockname())
            sock.close()


def any_readable(sockets: Iterable[socket.socket]) -> bool:
    """True if one of them can be read (for a listening socket: accepted from) now."""
    poll = select.poll()
    for sock in sockets:
        poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def bind(entry: Entry, path: str, who: Mapping[str, Identity], extra: Mapping[str, Place]) -> Sockets:
    """Bind the sockets of a kind; `extra` has the places of its extra ones, "" for none. Raises OSError."""
    sockets = Sockets(listen(path, _uids(entry.callers, who)))
    for name in entry.extra:
        place = extra[name]
        if not place:
            continue
        sockets.extra[name] = _listen_stream(place) if isinstance(place, str) else _listen_tcp(*place)
    return sockets


def _uids(callers: Collection[str], who: Mapping[str, Identity]) -> list[int]:
    return sorted(who[kind].uid for kind in callers if kind in who and who[kind].uid)


def listen(path: str, uids: Collection[int]) -> socket.socket:
    """Bind a SEQPACKET socket that root and these users may connect to. Raises OSError."""
    sock = channel.listen(path, mode=0o600, uid=0, gid=0, backlog=BACKLOG)
    allow(path, uids)
    return sock


def allow(path: str, uids: Collection[int]) -> None:
    """Let these users read and write a path besides its owner. Where a file system has no access lists,
    everybody may connect, and only SO_PEERCRED decides."""
    if not uids:
        return
    try:
        os.setxattr(path, _ACL, access_list(uids))
    except OSError:
        os.chmod(path, 0o666)  # noqa: S103 - the receiver checks SO_PEERCRED


def access_list(uids: Collection[int]) -> bytes:
    """Return a POSIX access list: owner and these users may read and write, nobody else anything."""
    entries = [
        (_USER_OBJ, _READ_WRITE, _NO_ID),
        *((_USER, _READ_WRITE, uid) for uid in sorted(uids)),
        (_GROUP_OBJ, 0, _NO_ID),
        (_MASK, _READ_WRITE, _NO_ID),
        (_OTHER, 0, _NO_ID),
    ]
    return struct.pack("<I", _ACL_VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def _listen_stream(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    sock.bind(path)
    os.chmod(path, 0o660)
    sock.listen(BACKLOG)
    return sock


def _listen_tcp(address: str, port: int) -> socket.socket:
    """Bind a TCP listener; port 0 is any. Raises OSError that names the place."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    until = time.monotonic() + IN_USE_WAIT
    while True:
        try:
            sock.bind((address, port))
            sock.listen(BACKLOG)
            return sock
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                sock.close()
                raise OSError(
                    error.errno, f"cannot listen at {address} port {port}: {error.strerror}"
                ) from None
            time.sleep(0.05)


def taken(path: str) -> bool:
    """Say whether somebody listens on a Unix stream socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except BlockingIOError:  # its backlog is full
            return True
        except OSError:
            return False
    return True


def inherit(listener_fd: int, extra_fds: Mapping[str, int]) -> Sockets:
    """The sockets that the program before this one has bound."""
    extra = {name: socket.socket(fileno=fd) for name, fd in extra_fds.items()}
    return Sockets(socket.socket(fileno=listener_fd), extra)


RELAY = "relay.sock"  # in cri's directory: a second name of the socket of the newest cri


def relay(bound: str, directory: str, uid: int) -> str:
    """Give the socket that cri has bound a name that stays, and return it: by it, a cri that was replaced
    passes on what it is still asked. Raises RemoteError if it is no socket, or not there."""
    path = f"{directory}/{RELAY}"
    try:
        if os.path.dirname(bound) != directory or not stat.S_ISSOCK(os.lstat(bound).st_mode):
            raise invalid(f"{bound!r} is no socket in {directory!r}")
        remove_tree(f"{path}.new")
        os.link(bound, f"{path}.new", follow_symlinks=False)
        os.rename(f"{path}.new", path)
    except OSError as error:
        raise invalid(f"cannot name {bound!r}: {error}") from error
    allow(path, [uid])
    return path


def publish(bound: str, directory: str, public: str) -> None:
    """Rename the socket that cri has bound in its directory over the public path, for root only.

    Between the two stands a name in the public directory, where cri cannot exchange what was checked.
    Raises RemoteError if it is no socket, or not there.
    """
    if os.path.dirname(bound) != directory or os.path.basename(bound) in {"", ".", ".."}:
        raise invalid(f"{bound!r} does not lie in {directory!r}")
    between = f"{public}.new"
    try:
        os.rename(bound, between)
        if not stat.S_ISSOCK(os.lstat(between).st_mode):
            raise invalid(f"{bound!r} is no socket")
        os.chown(between, 0, 0, follow_symlinks=False)
        os.chmod(between, 0o660)
        os.rename(between, public)
    except OSError as error:
        raise invalid(f"cannot publish {bound!r}: {error}") from error
    except RemoteError:
        remove_tree(between)
        raise
