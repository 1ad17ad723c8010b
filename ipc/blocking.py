"""Runs in: bulkheadctl, tests, short-lived children.

The blocking face: one connection, one request at a time.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar, cast

from ipc import calls, wire
from ipc.channel import Channel, address
from ipc.errors import Code, RemoteError
from ipc.fds import FdSet
from ipc.messages import Body, Request

R = TypeVar("R", bound=Body)


class Client:
    """A connection to the server at `path`, made by the first call and again after a loss.

    `timeout` (seconds) is the default of every call. Idempotent requests without descriptors are sent again
    when the peer dies, until the deadline (at most `RESENDS` times). All methods raise RemoteError.
    """

    RESENDS = 3

    def __init__(self, path: str, *, timeout: float | None = None) -> None:
        self._path = path
        self._timeout = timeout
        self._channel: Channel | None = None
        self._calls = calls.Calls({}, "server")

    def call(
        self,
        request: Request[R],
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
        on_update: Callable[[Any], object] | None = None,
    ) -> R:
        """Send a request, wait for its reply and return it; descriptors of the reply are closed."""
        body, received = self.call_fds(request, fds=fds, timeout=timeout, on_update=on_update)
        received.close()
        return body

    def call_fds(
        self,
        request: Request[R],
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
        on_update: Callable[[Any], object] | None = None,
    ) -> tuple[R, FdSet]:
        """As `call`, and return the reply's descriptors too. Takes over those that are sent."""
        limit = self._timeout if timeout is None else timeout
        deadline = None if limit is None else time.monotonic() + limit
        owned = FdSet(fds)
        resends = self.RESENDS if request.IDEMPOTENT and not owned else 0
        while True:
            try:
                return self._once(request, owned, deadline, on_update)
            except RemoteError as error:
                if error.code is not Code.MOVED:
                    raise
                self.close()  # the next connection leads to the successor
            except ConnectionError as error:
                self.close()
                if not resends:
                    raise RemoteError(Code.UNAVAILABLE, f"{request.NAME}: {error}") from error
                resends -= 1

    def _once(
        self,
        request: Request[R],
        fds: FdSet,
        deadline: float | None,
        on_update: Callable[[Any], object] | None,
    ) -> tuple[R, FdSet]:
        channel = self._connect(deadline)
        number, packet = self._calls.ask(request, fds, int((deadline or 0) * 1e9))
        channel.send(packet)
        while channel.wants_write:
            self._wait(channel, select.POLLOUT, deadline, request)
            channel.flush()
        while True:
            self._wait(channel, select.POLLIN, deadline, request)
            match self._receive(channel):
                case calls.Answered(answered, body, received) if answered == number:
                    return cast(R, body), received
                case calls.Failed(failed, error) if failed == number:
                    raise error
                case calls.Updated(updated, body) if updated == number and on_update is not None:
                    on_update(body)

    def _connect(self, deadline: float | None) -> Channel:
        if self._channel is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
            sock.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            try:
                with address(self._path) as short:
                    sock.connect(short)
            except OSError as error:
                sock.close()
                raise RemoteError(Code.UNAVAILABLE, f"cannot reach {self._path}: {error}") from error
            self._channel = Channel(sock)
            self._calls = calls.Calls({}, "server")
        return self._channel

    def _receive(self, channel: Channel) -> calls.Event | None:
        try:
            packet = channel.receive()
        except BlockingIOError:
            return None
        except wire.ProtocolError as error:
            raise ConnectionError(str(error)) from error
        if packet is None:
            raise ConnectionError("the peer went away")
        return self._calls.receive(*packet)

    def _wait(self, channel: Channel, event: int, deadline: float | None, request: Request[R]) -> None:
        poll = select.poll()
        poll.register(channel.fileno(), event)
        left = None if deadline is None else max(0.0, (deadline - time.monotonic()) * 1000)
        if not poll.poll(left):
            self.close()
            raise RemoteError(Code.DEADLINE_EXCEEDED, f"{request.NAME}: no answer in time")

    def close(self) -> None:
        """End the connection; the next call makes a new one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
