"""Runs in: bulkheadctl, when a port is forwarded.

Listens on loopback and carries every connection over one SPDY connection, as two streams of it; half-closes
go through in both directions. A local connection that does not take what comes makes the others wait, for
SPDY has no flow control of its own.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
from dataclasses import dataclass, field

from ipc.streams import spdy
from supervisor.cli.ctl.connection import CtlError
from supervisor.cli.ctl.link import ENOUGH, PIECE, Link

PROTOCOL = "portforward.k8s.io"


@dataclass
class Forwarded:
    """One local connection."""

    sock: socket.socket
    data: int  # streams
    error: int
    out: bytearray = field(default_factory=bytearray)
    told: bytes = b""  # what came on the error stream
    ended_here: bool = False
    ended_there: bool = False


class Forwarding:
    """Every connection of the listeners."""

    def __init__(self, link: Link, listeners: dict[socket.socket, int]) -> None:
        self._link = link
        self._listeners = listeners
        link.spdy(PROTOCOL)
        self._connection = spdy.Connection(client=True)
        self._by_stream: dict[int, Forwarded] = {}
        self._requests = 0
        self._selector = selectors.PollSelector()

    def run(self) -> None:
        """Serve until the server ends the connection. Raises CtlError, KeyboardInterrupt."""
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._link, selectors.EVENT_READ)
        while not self._link.ended:
            self._watch()
            ready = self._selector.select(0 if self._link.pending else None)
            for key, events in ready:
                self._react(key.fileobj, events)
            self._from_server()
        raise CtlError("the server ended the connection")

    def _watch(self) -> None:
        slow = any(len(one.out) >= ENOUGH for one in self._by_stream.values())
        events = (0 if slow else selectors.EVENT_READ) | (selectors.EVENT_WRITE if self._link.waiting else 0)
        self._interest(self._link, events)
        for one in self._unique():
            reading = not one.ended_here and not self._link.full
            wanted = (selectors.EVENT_READ if reading else 0) | (selectors.EVENT_WRITE if one.out else 0)
            self._interest(one.sock, wanted)

    def _interest(self, what: Link | socket.socket, events: int) -> None:
        known = what.fileno() in self._selector.get_map()
        if known and events:
            self._selector.modify(what, events)
        elif known:
            self._selector.unregister(what)
        elif events:
            self._selector.register(what, events)

    def _unique(self) -> list[Forwarded]:
        return [one for stream, one in self._by_stream.items() if stream == one.data]

    def _react(self, what: object, events: int) -> None:
        if isinstance(what, socket.socket) and what in self._listeners:
            self._accept(what)
        elif isinstance(what, socket.socket):
            for one in self._unique():
                if one.sock is what:
                    self._local(one, events)

    # -- here -----------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        sock, _address = listener.accept()
        sock.setblocking(False)
        self._requests += 1
        headers = {"port": str(self._listeners[listener]), "requestid": str(self._requests)}
        error = self._connection.open({**headers, "streamtype": "error"})
        data = self._connection.open({**headers, "streamtype": "data"})
        self._connection.end(error)
        self._by_stream[error] = self._by_stream[data] = Forwarded(sock, data, error)
        self._link.send(self._connection.output())

    def _local(self, one: Forwarded, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(one)
            if events & selectors.EVENT_READ and not one.ended_here:
                data = one.sock.recv(PIECE)
                self._connection.send(one.data, data)
                if not data:
                    one.ended_here = True
                    self._connection.end(one.data)
        except BlockingIOError:
            pass
        except OSError:  # it is gone
            self._connection.reset(one.data, spdy.Reset.CANCEL)
            self._forget(one)
        self._settle(one)
        self._link.send(self._connection.output())

    def _flush(self, one: Forwarded) -> None:
        while one.out:
            del one.out[: one.sock.send(one.out[:PIECE])]
        if one.ended_there:
            with contextlib.suppress(OSError):
                one.sock.shutdown(socket.SHUT_WR)

    # -- there ----------------------------------------------------------------------------------------

    def _from_server(self) -> None:
        self._link.flush()
        try:
            events = self._connection.receive(self._link.receive())
        except spdy.ProtocolError as error:
            raise CtlError(f"the server breaks the protocol: {error}") from error
        for event in events:
            match event:
                case spdy.Data(stream, data) if stream in self._by_stream:
                    self._arrived(self._by_stream[stream], stream, data)
                case spdy.Ended(stream) if stream in self._by_stream:
                    self._ended(self._by_stream[stream], stream)
                case spdy.WasReset(stream, _) if stream in self._by_stream:
                    self._lost(self._by_stream[stream])
                case spdy.GoneAway():
                    self._link.ended = True
        self._link.send(self._connection.output())

    def _arrived(self, one: Forwarded, stream: int, data: bytes) -> None:
        if stream == one.error:
            one.told += data
            return
        one.out += data
        self._write(one)

    def _write(self, one: Forwarded) -> None:
        try:
            self._flush(one)
        except BlockingIOError:
            pass
        except OSError:
            self._connection.reset(one.data, spdy.Reset.CANCEL)
            self._forget(one)

    def _ended(self, one: Forwarded, stream: int) -> None:
        if stream == one.data:
            one.ended_there = True
            self._write(one)
            self._settle(one)
        elif one.told:
            self._lost(one)

    def _lost(self, one: Forwarded) -> None:
        if one.told:
            print(f"bulkheadctl: {one.told.decode('utf-8', 'replace')}", file=sys.stderr)
        self._forget(one)

    def _settle(self, one: Forwarded) -> None:
        """Over when both sides have ended and everything is written."""
        if one.ended_here and one.ended_there and not one.out:
            self._forget(one)

    def _forget(self, one: Forwarded) -> None:
        self._by_stream.pop(one.data, None)
        self._by_stream.pop(one.error, None)
        if one.sock.fileno() >= 0:
            self._interest(one.sock, 0)
            one.sock.close()


def listeners(address: str, ports: list[tuple[int, int]]) -> dict[socket.socket, int]:
    """Listen for each (local, remote) pair; the remote port by socket. Raises CtlError."""
    found: dict[socket.socket, int] = {}
    for local, remote in ports:
        try:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.create_server((address, local), family=family)
        except OSError as error:
            raise CtlError(f"cannot listen at {address} port {local}: {error.strerror}") from error
        found[sock] = remote
        print(f"Forwarding {address} port {sock.getsockname()[1]} -> {remote}", flush=True)
    return found
