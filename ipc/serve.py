"""Runs in: supervisor, storage, network, monitor.

The selector face: connections that answer and ask on an ipc.loop.Loop, and the server that accepts them.
A handler answers by returning a body, or returns None and calls Call.reply or Call.fail later.
A RemoteError raised in a handler is its answer; any other exception is a bug and leaves the loop.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ipc import calls, wire
from ipc.channel import Channel, Peer, PeerStalled, peer_of
from ipc.errors import Code, RemoteError, moved
from ipc.fds import FdSet
from ipc.log import Log
from ipc.loop import Loop, Timer
from ipc.messages import Body, Request
from ipc.messages.supervisor import InFlight
from ipc.table import Handler

Done = Callable[[Body | RemoteError, FdSet], object]


class Call:
    """One request in the hands of its handler."""

    def __init__(self, connection: Connection, asked: calls.Asked) -> None:
        self.connection = connection
        self.caller = connection.peer.kind
        self.peer_pid = connection.peer.pid
        self.fds = asked.fds
        self.type = asked.handler.request.NAME
        self.deadline = asked.deadline_ns / 1e9 if asked.deadline_ns else None
        self.doing = ""
        self.done = False
        self.since = time.monotonic()
        self._number = asked.number
        self._abandoned: list[Callable[[], object]] = []
        self._timer: Timer | None = None
        if self.deadline is not None:
            self._timer = connection.loop.call_later(self.deadline - time.monotonic(), self._expired)

    @property
    def remaining(self) -> float | None:
        """Seconds to the deadline, None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def reply(self, body: Body, fds: Sequence[int] = ()) -> None:
        """Answer. Takes the descriptors over; ignored if the call is done already."""
        owned = FdSet(fds)
        if self._finish():
            self.connection.answer(self._number, body, owned)
        owned.close()

    def fail(self, error: RemoteError) -> None:
        """Answer with a failure; ignored if the call is done already."""
        if self._finish():
            self.connection.refuse(self._number, error)

    def update(self, body: Body) -> None:
        """Report progress."""
        if not self.done:
            self.connection.update(self._number, body)

    def on_abandon(self, callback: Callable[[], object]) -> None:
        """Call when nobody wants the answer any more: cancelled, deadline passed, peer gone."""
        if not self.done:
            self._abandoned.append(callback)

    def abandon(self) -> None:
        """The connection's word that the caller cancelled or went."""
        callbacks = list(self._abandoned)
        if self._finish():
            for callback in callbacks:
                callback()

    def _expired(self) -> None:
        callbacks = list(self._abandoned)
        if not self.done:
            self.fail(
                RemoteError(Code.DEADLINE_EXCEEDED, f"{self.type}: deadline passed {self.doing}".rstrip())
            )
            for callback in callbacks:
                callback()

    def _finish(self) -> bool:
        if self.done:
            return False
        self.done = True
        self._abandoned.clear()
        self.fds.close()
        if self._timer is not None:
            self._timer.cancel()
        self.connection.forget(self._number)
        return True


class Connection:
    """One connected socket on the loop. `on_close` callbacks run once when it ends, for whatever reason.

    `asked`: of a socket that somebody else has asked on before, how often, so that late answers find nobody.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        peer: Peer,
        handlers: Mapping[str, Handler],
        *,
        max_requests: int = 256,
        log: Log | None = None,
        asked: int = 0,
    ) -> None:
        self.loop = loop
        self.peer = peer
        self.closed = False
        self.draining = False  # what comes from now on is for the successor
        self.in_flight: dict[int, Call] = {}
        self._channel = Channel(sock)
        self._calls = calls.Calls(handlers, peer.kind, max_requests=max_requests, asked=asked)
        self._waiting: dict[int, tuple[Done, Timer | None]] = {}
        self._on_close: list[Callable[[], object]] = []
        self._log = log
        loop.add_reader(self._channel.fileno(), self._readable)

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call when the connection ends; at once if it has."""
        if self.closed:
            callback()
        else:
            self._on_close.append(callback)

    def off_close(self, callback: Callable[[], object]) -> None:
        """Take an on_close callback back."""
        with contextlib.suppress(ValueError):
            self._on_close.remove(callback)

    # -- asking ---------------------------------------------------------------------------------------

    def ask(self, body: Request[Any], done: Done, *, timeout: float | None = None) -> None:
        """Send a request; `done(reply or RemoteError, descriptors)` is called once, later."""
        if self.closed:
            self.loop.call_soon(lambda: done(_gone(body), FdSet()))
            return
        deadline_ns = 0 if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
        number, packet = self._calls.ask(body, FdSet(), deadline_ns)
        timer = None if timeout is None else self.loop.call_later(timeout, lambda: self._timed_out(number))
        self._waiting[number] = (done, timer)
        self._send(packet)

    def _timed_out(self, number: int) -> None:
        packet = self._calls.cancel(number)
        if packet is not None:
            self._send(packet)
        self._settle(number, RemoteError(Code.DEADLINE_EXCEEDED, "no answer in time"), FdSet())

    def _settle(self, number: int, result: Body | RemoteError, fds: FdSet) -> None:
        done, timer = self._waiting.pop(number, (None, None))
        if timer is not None:
            timer.cancel()
        if done is not None:
            done(result, fds)

    # -- answering ------------------------------------------------------------------------------------

    def answer(self, number: int, body: Body, fds: FdSet) -> None:
        """Send a reply (Call.reply does). A body over the limit becomes the failure it deserves."""
        try:
            packet = self._calls.reply(number, body, fds)
        except RemoteError as error:
            packet = self._calls.fail(number, error)
        self._send(packet)

    def refuse(self, number: int, error: RemoteError) -> None:
        """Send a failure (Call.fail does)."""
        self._send(self._calls.fail(number, error))

    def update(self, number: int, body: Body) -> None:
        """Send a progress report (Call.update does)."""
        self._send(self._calls.update(number, body))

    def forget(self, number: int) -> None:
        """The call is done (Call does)."""
        self.in_flight.pop(number, None)

    def _send(self, packet: calls.Packet | None) -> None:
        if packet is None or self.closed:
            if packet is not None:
                packet.fds.close()
            return
        try:
            self._channel.send(packet)
        except (OSError, PeerStalled) as error:
            self.close(str(error))
            return
        if self._channel.wants_write:
            self.loop.add_writer(self._channel.fileno(), self._writable)

    def _writable(self) -> None:
        try:
            self._channel.flush()
        except OSError as error:
            self.close(str(error))
            return
        if not self._channel.wants_write:
            self.loop.remove_writer(self._channel.fileno())

    # -- receiving ------------------------------------------------------------------------------------

    def _readable(self) -> None:
        for _ in range(16):  # then the others' turn
            if self.closed or not self._receive_one():
                return

    def _receive_one(self) -> bool:
        try:
            packet = self._channel.receive()
            if packet is None:
                self.close("")
                return False
            event = self._calls.receive(*packet)
        except BlockingIOError:
            return False
        except (OSError, wire.ProtocolError) as error:
            self.close(str(error))
            return False
        if event is not None:
            self._dispatch(event)
        return True

    def _dispatch(self, event: calls.Event) -> None:
        match event:
            case calls.Asked() if self.draining and not event.fds:  # descriptors cannot be sent again
                self.refuse(event.number, moved(event.handler.request.NAME))
            case calls.Asked():
                self._serve(event)
            case calls.Cancelled(number):
                call = self.in_flight.get(number)
                if call is not None:
                    call.abandon()
            case calls.Answered(number, body, fds):
                self._settle(number, body, fds)
            case calls.Failed(number, error):
                self._settle(number, error, FdSet())
            case calls.Refused(packet, error, type_):
                if self._log is not None:
                    self._log.warning("request refused", type=type_, caller=self.peer.kind, error=error)
                self._send(packet)

    def _serve(self, asked: calls.Asked) -> None:
        call = Call(self, asked)
        self.in_flight[asked.number] = call
        try:
            body = asked.handler.function(call, asked.body)
        except RemoteError as error:
            call.fail(error)
        else:
            if body is not None:
                call.reply(body)

    def detach(self) -> socket.socket:
        """Stop serving, and return the socket, open."""
        self.closed = True
        self.loop.remove_reader(self._channel.fileno())
        self.loop.remove_writer(self._channel.fileno())
        return self._channel.sock

    def fileno(self) -> int:
        """The descriptor of the socket."""
        return self._channel.fileno()

    @property
    def asked(self) -> int:
        """How many requests were asked here: the number of the last one."""
        return self._calls.asked

    @property
    def flushed(self) -> bool:
        """True if nothing waits to be sent."""
        return not self._channel.wants_write

    def close(self, why: str = "") -> None:
        """End the connection: calls are abandoned, askers get UNAVAILABLE, on_close runs."""
        if self.closed:
            return
        self.closed = True
        if why and self._log is not None:
            self._log.warning("connection closed", peer=self.peer.kind, pid=self.peer.pid, why=why)
        fd = self._channel.fileno()
        self.loop.remove_reader(fd)
        self.loop.remove_writer(fd)
        self._channel.close()
        for call in list(self.in_flight.values()):
            call.abandon()
        for number in self._calls.lost():
            self._settle(number, RemoteError(Code.UNAVAILABLE, "the peer went away"), FdSet())
        callbacks, self._on_close = self._on_close, []
        for callback in callbacks:
            callback()


class Server:
    """Accepts connections and serves one table of handlers on them."""

    def __init__(
        self,
        loop: Loop,
        handlers: Mapping[str, Handler],
        uids: Mapping[int, str],
        *,
        max_requests: int = 256,
        log: Log | None = None,
    ) -> None:
        self.loop = loop
        self.handlers = handlers
        self.connections: set[Connection] = set()
        self.last_activity = time.monotonic()
        self._uids = uids
        self._max_requests = max_requests
        self._log = log
        self._listeners: list[socket.socket] = []

    def listen(self, sock: socket.socket) -> None:
        """Accept on a listening SEQPACKET socket; it stays the caller's."""
        sock.setblocking(False)
        self._listeners.append(sock)
        self.loop.add_reader(sock.fileno(), lambda: self._accept(sock))

    def _accept(self, sock: socket.socket) -> None:
        # One a turn: with several workers on one socket the others get their share.
        try:
            accepted, _ = sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.adopt(accepted, peer_of(accepted, self._uids))

    def adopt(self, sock: socket.socket, peer: Peer) -> Connection:
        """Serve on a socket that is connected already. Takes it over."""
        connection = Connection(
            self.loop, sock, peer, self.handlers, max_requests=self._max_requests, log=self._log
        )
        self.connections.add(connection)
        connection.on_close(lambda: self._closed(connection))
        return connection

    def _closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.last_activity = time.monotonic()

    def in_flight(self) -> list[InFlight]:
        """What is being served, for health answers."""
        now = time.monotonic()
        return [
            InFlight(
                type=call.type, age_ms=int((now - call.since) * 1000), peer=call.caller, doing=call.doing
            )
            for connection in self.connections
            for call in connection.in_flight.values()
        ]

    def stop_accepting(self) -> None:
        """Leave new connections to the next worker; those that are here go on."""
        for sock in self._listeners:
            self.loop.remove_reader(sock.fileno())
        self._listeners.clear()

    def drain(self) -> None:
        """Leave new connections, and new requests of those that are here, to the next worker."""
        self.stop_accepting()
        for connection in self.connections:
            connection.draining = True

    def close(self) -> None:
        """Stop accepting and end every connection."""
        self.stop_accepting()
        for connection in list(self.connections):
            connection.close()


def _gone(body: Request[Any]) -> RemoteError:
    return RemoteError(Code.UNAVAILABLE, f"{body.NAME}: the connection is closed")
