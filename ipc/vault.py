"""Runs in: the supervisor, the hands and successors of monitors.

What a monitor's successor needs, in the kernel's keeping: a socket that is connected to itself. What is sent
to it stays in its queue, descriptors included, until somebody receives it, and nobody else can send to it.
The supervisor holds one for each monitor and never looks inside.

    LISTENER  one descriptor: the monitor's listening socket
    TAKEN     what a hand gave to its keeper (workers/monitor/link.py), with a pidfd of the init
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence

from ipc.fds import close_all

LISTENER, TAKEN = b"S", b"T"
_END = b"."  # of a walk through the queue; one that was cut short leaves it behind
_PACKET, _MOST_FDS = 16 * 1024, 16
_ROOM = socket.CMSG_SPACE(_MOST_FDS * array.array("i").itemsize)

Message = tuple[bytes, bytes, list[int]]
Change = Callable[[bytes, bytes, list[int]], Message]


def _same(kind: bytes, data: bytes, fds: list[int]) -> Message:
    return kind, data, fds


def make() -> int:
    """Return the descriptor of a new one, close-on-exec. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind("")  # the kernel finds an abstract name
        sock.connect(sock.getsockname())
        return sock.detach()


def is_one(fd: int) -> bool:
    """True if a descriptor is a vault's."""
    try:
        with _borrowed(fd) as sock:
            kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            own = sock.getsockname()
            return kind == socket.SOCK_DGRAM and own[:1] == b"\0" and sock.getpeername() == own
    except (OSError, TypeError):
        return False


def put(fd: int, kind: bytes, data: bytes = b"", fds: Sequence[int] = ()) -> None:
    """Put a message in; the descriptors stay the caller's. Raises OSError."""
    with _borrowed(fd) as sock:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sock.sendmsg([kind + data], rights)


def look(fd: int, change: Change = _same) -> list[Message]:
    """Return what is in: kind, data, duplicates of the descriptors, which are the caller's.

    Everything stays in, as `change` gives it back; at no moment is anything nowhere else. Raises OSError.
    """
    end = os.urandom(8)
    put(fd, _END, end)
    found = []
    while True:
        message = _receive(fd, socket.MSG_PEEK)
        if message[0] != _END:
            put(fd, *change(*message))
            found.append(message)
        close_all(_receive(fd)[2])
        if message[:2] == (_END, end):
            return found


def _receive(fd: int, flags: int = 0) -> Message:
    with _borrowed(fd) as sock:
        data, ancillary, _, _ = sock.recvmsg(_PACKET, _ROOM, flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _level, _type, raw in ancillary:
        fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
    return data[:1], data[1:], fds.tolist()


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """A socket object of a descriptor that stays open."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()
