"""Runs in: stream.

A client's TCP (or TLS) connection on the loop. It counts bytes, knows when the last ones moved, tells writers
to wait while the client does not take what is there, and stops reading while somebody holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterable

WRITE_HIGH = 256 * 1024  # bytes that wait for the client before its sources are no longer read
WRITE_LOW = 64 * 1024
FLUSH_TIMEOUT = 10.0  # for a client to take the last bytes
LINGER = 2.0  # for it to close then
HELD_CHECK = 1.0  # seconds between looks whether a client that is not read from is still there
_ESTABLISHED = 1  # tcpi_state (linux/tcp.h)


class Wire(asyncio.Protocol):
    """`receiver` gets what comes in; until it is set, that collects in `early`, at most EARLY_LIMIT bytes."""

    EARLY_LIMIT = 64 * 1024

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self.bytes_in = 0
        self.bytes_out = 0
        self.touched = time.monotonic()
        self.early = b""
        self._receiver: Callable[[bytes], None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._holders: set[object] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    # -- what asyncio calls ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH, low=WRITE_LOW)
        _keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        self.bytes_in += len(data)
        self.touched = time.monotonic()
        if self._receiver is not None:
            self._receiver(data)
            return
        self.early += data
        if len(self.early) > self.EARLY_LIMIT:
            self.hold(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        self._writable.set()
        if self._watch is not None:
            self._watch.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- reading --------------------------------------------------------------------------------------

    def receive_with(self, receiver: Callable[[bytes], None]) -> None:
        """Hand everything from here on to `receiver`, first what has come already."""
        self._receiver = receiver
        early, self.early = self.early, b""
        self.release(self)
        if early:
            receiver(early)

    def receive_nothing(self) -> None:
        """Let what comes collect until there is a receiver."""
        self._receiver = None

    def hold(self, who: object) -> None:
        """Read no more until everybody who holds has released."""
        if not self._holders and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._check_later()
        self._holders.add(who)

    def release(self, who: object) -> None:
        """Read on, as far as this holder is concerned."""
        if who not in self._holders:
            return
        self._holders.discard(who)
        if not self._holders and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _check_later(self) -> None:
        self._watch = asyncio.get_running_loop().call_later(HELD_CHECK, self._check)

    def _check(self) -> None:
        """Whoever does not read is not told that the peer is gone."""
        if self._holders and self._transport is not None and not self.lost.is_set():
            sock = self._transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED:
                    self.abort()
                    return
            self._check_later()

    # -- writing --------------------------------------------------------------------------------------

    def write(self, pieces: Iterable[bytes]) -> None:
        """Send, now or when the client takes it."""
        data = b"".join(pieces)
        if data and self._transport is not None and not self._transport.is_closing():
            self.bytes_out += len(data)
            self.touched = time.monotonic()
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until there is room. Raises ConnectionError when the client is gone."""
        await self._writable.wait()
        if self.lost.is_set():
            raise ConnectionResetError("the client is gone")

    async def finish(self) -> None:
        """Send what is left, wait a moment for the client to close, then close.

        Closing over unread bytes would reset the connection, and the last bytes could be lost with it.
        """
        if self._transport is None:
            return
        self._receiver = lambda _data: None
        self._holders.clear()
        with contextlib.suppress(OSError, RuntimeError):  # it is gone, or too slow, or closing
            self._transport.resume_reading()
            self._transport.set_write_buffer_limits(high=0)
            async with asyncio.timeout(FLUSH_TIMEOUT):
                await self.drain()
            if self._transport.can_write_eof():
                self._transport.write_eof()
            async with asyncio.timeout(LINGER):
                await self.lost.wait()
        self.abort()

    def abort_soon(self) -> None:
        """End when what is written already has been taken, and read no more."""
        self._receiver = lambda _data: None
        if self._transport is not None:
            self._transport.close()
            asyncio.get_running_loop().call_later(FLUSH_TIMEOUT, self.abort)

    def abort(self) -> None:
        """End at once."""
        if self._transport is not None:
            self._transport.abort()


def _keep_alive(sock: socket.socket) -> None:
    """A client whose machine is gone is noticed within minutes, also while nothing is sent."""
    with contextlib.suppress(OSError):  # a Unix socket
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 8)
