"""Runs in: image (made by the loop, used by one thread).

One request's life while a thread works on it: its deadline, and how the loop ends it. Ending shuts the
sockets that the thread may wait on, so a cancelled download does not read another byte.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import weakref

from ipc.errors import Code, RemoteError


class Cancelled(Exception):
    """Nobody waits for the result any more."""


class Operation:
    """The life of one request. `deadline` is monotonic, None without one."""

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    @property
    def cancelled(self) -> bool:
        return self._ended.is_set()

    def cancel(self) -> None:
        """End it, from any thread: sleeps and reads return at once."""
        self._ended.set()
        with self._lock:
            for sock in self._sockets:
                _shut(sock)

    def adopt(self, sock: socket.socket) -> None:
        """Have a socket shut when the operation ends."""
        with self._lock:
            self._sockets.add(sock)
        if self.cancelled:
            _shut(sock)

    def check(self) -> None:
        """Raises Cancelled, RemoteError(DEADLINE_EXCEEDED)."""
        if self.cancelled:
            raise Cancelled
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise RemoteError(Code.DEADLINE_EXCEEDED, "the time for the request is over")

    def sleep(self, seconds: float) -> None:
        """Wait, unless it ends before. Raises as `check`."""
        if self.deadline is not None:
            seconds = min(seconds, self.deadline - time.monotonic())
        self._ended.wait(max(0.0, seconds))
        self.check()


def _shut(sock: socket.socket) -> None:
    # Not sock.shutdown(): ssl's takes the TLS state away from under the thread that reads.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
