"""Runs in: stream.

The container's ends of a session on the loop: pipes, ptys, sockets. A source is read only while its reader
asks; a sink holds a bounded rest and says when it is full and when there is room again.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import socket
import stat
from collections.abc import Callable

CHUNK = 256 * 1024
SINK_HIGH = 256 * 1024  # bytes that a sink holds before it is full
SINK_LOW = 64 * 1024


class Source:
    """Reads a descriptor, which it owns."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[bool] | None = None
        self._quiet: float | None = None

    async def read(self) -> bytes:
        """The next bytes, nothing at the end of file."""
        while self._fd >= 0:
            try:
                data = os.read(self._fd, CHUNK)
                await asyncio.sleep(0)  # one that always has bytes must not keep others from the loop
                return data
            except BlockingIOError:
                if not await self._readable():
                    return b""
            except OSError:  # EIO: a pty without a slave; or a socket that was reset
                return b""
        return b""

    def end_when_quiet(self, seconds: float) -> None:
        """Count as ended once nothing came for so long: whoever still holds the other end is left alone."""
        self._quiet = seconds
        if self._waiting is not None:
            self._loop.call_later(seconds, self._wake, self._waiting, False)

    async def _readable(self) -> bool:
        self._waiting = waiting = self._loop.create_future()
        self._loop.add_reader(self._fd, self._wake, waiting, True)
        timer = None
        if self._quiet is not None:
            timer = self._loop.call_later(self._quiet, self._wake, waiting, False)
        try:
            return bool(await waiting)
        finally:
            self._waiting = None
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)
            if timer is not None:
                timer.cancel()

    @staticmethod
    def _wake(waiting: asyncio.Future[bool], readable: bool) -> None:
        if not waiting.done():
            waiting.set_result(readable)

    def close(self) -> None:
        """Close the descriptor. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.remove_reader(fd)
            os.close(fd)


class Sink:
    """Writes to a descriptor, which it owns once it has it; what comes before is kept.

    `on_full` and `on_room` are called in turn; `on_broken` once, when the other end is gone: from then on
    everything is dropped.
    """

    def __init__(
        self,
        on_full: Callable[[], object],
        on_room: Callable[[], object],
        on_broken: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_full, self._on_room, self._on_broken = on_full, on_room, on_broken
        self._fd = -1
        self._pieces: collections.deque[memoryview] = collections.deque()
        self._size = 0
        self._full = False
        self._ended = False
        self._dropping = False
        self._ends_descriptor = True
        self._loop = asyncio.get_running_loop()

    def attach(self, fd: int, *, ends: bool = True) -> None:
        """Write to this from now on. `ends`: the end of what comes is the end of the descriptor."""
        os.set_blocking(fd, False)
        self._fd = fd
        self._ends_descriptor = ends
        self._flush()

    def write(self, data: bytes) -> None:
        """Write now or later."""
        if self._dropping or self._ended or not data:
            return
        self._pieces.append(memoryview(data))
        self._size += len(data)
        if self._fd >= 0 and len(self._pieces) == 1:
            self._flush()
        if self._size > SINK_HIGH and not self._full:
            self._full = True
            self._on_full()

    def end(self) -> None:
        """No more will come: half-close when everything is written."""
        if not self._ended:
            self._ended = True
            self._flush()

    def drop(self) -> None:
        """Nobody wants what comes: forget it, now and later."""
        self._dropping = True
        self._pieces.clear()
        self._size = 0
        self._room()

    def close(self) -> None:
        """Close the descriptor, whatever waits. May be called again."""
        self.drop()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.remove_writer(fd)
            os.close(fd)

    def _flush(self) -> None:
        if self._fd < 0:
            return
        try:
            self._write_pieces()
        except BlockingIOError:
            self._loop.add_writer(self._fd, self._flush)
        except OSError:  # EPIPE, ECONNRESET, EIO: the other end is gone
            self._loop.remove_writer(self._fd)
            self.drop()
            self._on_broken()
        else:
            self._loop.remove_writer(self._fd)
            if self._ended:
                self._half_close()
        self._room()

    def _write_pieces(self) -> None:
        while self._pieces:
            written = os.write(self._fd, self._pieces[0])
            self._size -= written
            if written == len(self._pieces[0]):
                self._pieces.popleft()
            else:
                self._pieces[0] = self._pieces[0][written:]

    def _room(self) -> None:
        if self._full and self._size <= SINK_LOW:
            self._full = False
            self._on_room()

    def _half_close(self) -> None:
        if not self._ends_descriptor:
            return
        if stat.S_ISSOCK(os.fstat(self._fd).st_mode):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as sock:
                sock.shutdown(socket.SHUT_WR)
        else:
            self.close()
