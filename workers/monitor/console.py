"""Runs in: the monitor.

The console socket: the OCI runtime connects and hands over the master of the container's terminal
(SCM_RIGHTS). One terminal is taken, then the socket goes.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Callable

from ipc.fds import close_all
from ipc.loop import Loop


class ConsoleSocket:
    """Listens at `path` until a terminal came; `received(fd)` owns the descriptor. Raises OSError."""

    def __init__(self, loop: Loop, path: str, received: Callable[[int], object]) -> None:
        self.path = path
        self._loop = loop
        self._received = received
        self._peer: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen(1)
        loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            peer, _ = self._listener.accept()
            peer.setblocking(False)
            if self._peer is not None:
                self._forget_peer()
            self._peer = peer
            self._loop.add_reader(peer.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._peer is not None
        try:
            fds = _receive(self._peer)
        except BlockingIOError:
            return
        except OSError:
            fds = []
        if not fds:
            self._forget_peer()
            return
        close_all(fds[1:])
        self.close()
        self._received(fds[0])

    def _forget_peer(self) -> None:
        assert self._peer is not None
        self._loop.remove_reader(self._peer.fileno())
        self._peer.close()
        self._peer = None

    def receive_now(self) -> None:
        """Take what has arrived without waiting for the loop's turn (the runtime has ended)."""
        if self._listener.fileno() >= 0 and self._peer is None:
            self._accept()
        if self._peer is not None:
            self._readable()

    def close(self) -> None:
        """Remove the socket. May be called again."""
        if self._peer is not None:
            self._forget_peer()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def _receive(peer: socket.socket) -> list[int]:
    # Not socket.recv_fds: it forgets its flags, and the descriptor would be inherited.
    fds = array.array("i")
    _, ancillary, _, _ = peer.recvmsg(4096, socket.CMSG_SPACE(4 * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()
