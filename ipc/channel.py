"""Runs in: every process.

One SEQPACKET socket with its descriptors and its bounded queue of packets that wait for the kernel.
It never blocks. It refuses a peer that does not read (PeerStalled) and truncated control data.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ipc import wire
from ipc.calls import Packet
from ipc.fds import FdSet
from ipc.table import ROOT

QUEUE_PACKETS = 1024
QUEUE_BYTES = 8 * 1024 * 1024
ADDRESS_LIMIT = 107
_ANCILLARY = socket.CMSG_SPACE(wire.FD_LIMIT * 4)
_CREDENTIALS = struct.Struct("iII")


class PeerStalled(Exception):
    """The peer does not read and the queue for it is full: close the connection."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of an accepted connection (SO_PEERCRED), and its kind by uid."""

    pid: int
    uid: int
    gid: int
    kind: str


def peer_of(sock: socket.socket, uids: Mapping[int, str]) -> Peer:
    """Return the peer of an accepted Unix socket; an unknown uid has the kind "unknown"."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return Peer(pid, uid, gid, ROOT if uid == 0 else uids.get(uid, "unknown"))


class Channel:
    """A non-blocking packet socket. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._queue: deque[Packet] = deque()
        self._queued_bytes = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def wants_write(self) -> bool:
        """True while packets wait: ask the loop for writability and call flush()."""
        return bool(self._queue)

    def receive(self) -> tuple[bytes, FdSet] | None:
        """Return the next packet, None at the end of the stream.

        Raises BlockingIOError when nothing is there, ProtocolError on truncated data or control data.
        """
        data, ancillary, flags, _ = self._recvmsg()
        fds = FdSet(_descriptors(ancillary))
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            fds.close()
            raise wire.ProtocolError("a packet or its control data was truncated")
        if data:
            return data, fds
        fds.close()
        return None

    def _recvmsg(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        try:
            return self.sock.recvmsg(wire.PACKET_LIMIT, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            # The peer died with unread data: said once, and what it had sent before is still there.
            try:
                return self.sock.recvmsg(wire.PACKET_LIMIT, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                return b"", [], 0, None

    def send(self, packet: Packet) -> None:
        """Send now or queue. Raises PeerStalled when the queue is full, OSError when the peer is gone."""
        if not self._queue and self._try(packet):
            return
        if len(self._queue) >= QUEUE_PACKETS or self._queued_bytes + len(packet.data) > QUEUE_BYTES:
            packet.fds.close()
            raise PeerStalled(f"{len(self._queue)} packets wait for a peer that does not read")
        self._queue.append(packet)
        self._queued_bytes += len(packet.data)

    def flush(self) -> None:
        """Send queued packets as far as the kernel takes them. Raises OSError when the peer is gone."""
        while self._queue and self._try(self._queue[0]):
            self._queued_bytes -= len(self._queue.popleft().data)

    def _try(self, packet: Packet) -> bool:
        try:
            fds = list(packet.fds)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            self.sock.sendmsg([packet.data], rights, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError:
            packet.fds.close()
            raise
        packet.fds.close()
        return True

    def close(self) -> None:
        """Close the socket and every descriptor that waits in the queue."""
        for packet in self._queue:
            packet.fds.close()
        self._queue.clear()
        self.sock.close()


@contextlib.contextmanager
def address(path: str) -> Iterator[str]:
    """Yield a name for `path` that fits into a socket address, whose limit is 107 bytes (unix(7)).

    A longer path is reached through a descriptor of its directory. Raises OSError.
    """
    if len(os.fsencode(path)) <= ADDRESS_LIMIT:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def listen(
    path: str, *, mode: int = 0o600, uid: int = -1, gid: int = -1, backlog: int = 128
) -> socket.socket:
    """Bind a listening SEQPACKET socket at `path`, over a stale one, with mode and owner. Raises OSError."""
    if os.path.lexists(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with address(path) as short:
            sock.bind(short)
        os.chown(path, uid, gid)
        os.chmod(path, mode)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected SEQPACKET sockets."""
    return socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    )
