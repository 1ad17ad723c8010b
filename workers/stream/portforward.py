"""Runs in: stream.

Port-forward, the client's side: forwarded connections (a data stream and an error stream each) over SPDY or
WebSocket. Pairing is sans-IO; what a client opens and never completes is given up after a while.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ipc.streams import spdy, websocket
from workers.stream.wire import Wire

DATA, ERROR = "data", "error"


class BadStream(ValueError):
    """A stream that belongs to no forwarded connection."""


@dataclass
class Pair:
    """The two streams of one forwarded connection."""

    key: str
    port: int
    streams: dict[str, int] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether both are there."""
        return len(self.streams) == 2


class Pairs:
    """Finds the streams that belong together."""

    def __init__(self) -> None:
        self._pairs: dict[str, Pair] = {}

    def opened(self, stream: int, headers: dict[str, str]) -> Pair:
        """The pair of a new stream. Raises BadStream."""
        kind, port = headers.get("streamtype", ""), _port(headers.get("port", ""))
        if kind not in {DATA, ERROR}:
            raise BadStream(f"a stream of type {kind!r}")
        # clients before request ids open the error stream and, next, the data stream
        key = headers.get("requestid", "") or str(stream if kind == ERROR else stream - 2)
        pair = self._pairs.setdefault(key, Pair(key, port))
        if kind in pair.streams or pair.port != port:
            raise BadStream(f"a second {kind} stream of request {key}")
        pair.streams[kind] = stream
        return pair

    def forget(self, pair: Pair) -> None:
        """The connection is over."""
        self._pairs.pop(pair.key, None)


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= 0xFFFF:
        return int(text)
    raise BadStream(f"{text[:32]!r} is no port")


class Forward(Protocol):
    """Where a client's part of one connection goes."""

    def data(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def reset(self) -> None: ...


#: A new connection, by its handle, and its port.
OnPair = Callable[[int, int], Forward]


class Client(Protocol):
    """One client of a port-forward. A handle names a connection."""

    def send(self, handle: int, data: bytes) -> None: ...

    def end(self, handle: int) -> None:
        """The pod sends no more on it."""

    def close(self, handle: int, error: str = "") -> None:
        """The connection is over; with an error, the client is told and may try again."""

    def goodbye(self) -> None: ...


class SpdyClient:
    """Any number of pairs over one connection."""

    def __init__(self, wire: Wire, max_streams: int, timeout: float, on_pair: OnPair) -> None:
        self._wire = wire
        self._timeout = timeout
        self._on_pair = on_pair
        self._connection = spdy.Connection(max_streams=max_streams)
        self._pairs = Pairs()
        self._handles: dict[int, Pair] = {}  # by the data stream
        self._forwards: dict[int, Forward] = {}

    def receive(self, data: bytes) -> None:
        """Take bytes of the client."""
        try:
            for event in self._connection.receive(data):
                self._handle(event)
        except spdy.ProtocolError:
            self._wire.abort()
            return
        self._flush()

    def _handle(self, event: spdy.Event) -> None:
        match event:
            case spdy.Opened(stream, headers):
                self._opened(stream, headers)
            case spdy.Data(stream, data) if stream in self._forwards:
                self._forwards[stream].data(data)
            case spdy.Ended(stream) if stream in self._forwards:
                self._forwards[stream].end()
            case spdy.WasReset(stream) if stream in self._forwards:
                self._forwards[stream].reset()

    def _opened(self, stream: int, headers: dict[str, str]) -> None:
        try:
            pair = self._pairs.opened(stream, headers)
        except BadStream:
            self._connection.reset(stream, spdy.Reset.REFUSED_STREAM)
            return
        self._connection.accept(stream)
        if not pair.whole:
            asyncio.get_running_loop().call_later(self._timeout, self._incomplete, pair)
            return
        handle = pair.streams[DATA]
        self._handles[handle] = pair
        self._forwards[handle] = self._on_pair(handle, pair.port)

    def _incomplete(self, pair: Pair) -> None:
        if pair.whole or self._wire.lost.is_set():
            return
        self._pairs.forget(pair)
        if ERROR in pair.streams:
            text = f"(conn={id(self):#x}, request={pair.key}) timed out waiting for streams"
            self._connection.send(pair.streams[ERROR], text.encode())
        self._reset(pair)

    def _reset(self, pair: Pair) -> None:
        for stream in pair.streams.values():
            self._connection.reset(stream, spdy.Reset.CANCEL)
        self._flush()

    def send(self, handle: int, data: bytes) -> None:
        self._connection.send(handle, data)
        self._flush()

    def end(self, handle: int) -> None:
        self._connection.end(handle)
        self._flush()

    def close(self, handle: int, error: str = "") -> None:
        self._forwards.pop(handle, None)
        pair = self._handles.pop(handle, None)
        if pair is None:
            return
        self._pairs.forget(pair)
        if error:
            self._connection.send(pair.streams[ERROR], error.encode())
        self._connection.end(pair.streams[ERROR])
        self._connection.end(handle)
        self._reset(pair)

    def goodbye(self) -> None:
        self._connection.close()
        self._flush()

    def _flush(self) -> None:
        self._wire.write(self._connection.output())


class TunnelledClient(SpdyClient):
    """The same, the whole SPDY connection in the messages of a WebSocket."""

    def __init__(self, wire: Wire, max_streams: int, timeout: float, on_pair: OnPair) -> None:
        super().__init__(wire, max_streams, timeout, on_pair)
        self._tunnel = websocket.Connection(websocket.TUNNEL)

    def receive(self, data: bytes) -> None:
        """Take bytes of the client."""
        try:
            for event in self._tunnel.receive(data):
                self._unwrapped(event)
        except websocket.ProtocolError:
            self._tunnel.close(broken=True)
            self._wire.abort_soon()
        self._wire.write(self._tunnel.output())

    def _unwrapped(self, event: websocket.Event) -> None:
        match event:
            case websocket.Data(_, data):
                super().receive(data)
            case websocket.Closed():
                self._wire.abort_soon()

    def goodbye(self) -> None:
        super().goodbye()
        self._tunnel.close()
        self._wire.write(self._tunnel.output())

    def _flush(self) -> None:
        if data := b"".join(self._connection.output()):
            self._tunnel.send(websocket.TUNNELLED, data)
            self._wire.write(self._tunnel.output())


class WebSocketClient:
    """One connection for each port asked for, on channels 2i (data) and 2i+1 (error)."""

    def __init__(self, wire: Wire, protocol: str, ports: list[int], on_pair: OnPair) -> None:
        self._wire = wire
        self._connection = websocket.Connection(protocol)
        self._open: set[int] = set()
        self._forwards: dict[int, Forward] = {}
        for handle, port in zip(itertools.count(step=2), ports, strict=False):
            for channel in (handle, handle + 1):
                self._connection.send(channel, struct.pack("<H", port))
            self._open.add(handle)
            self._forwards[handle] = on_pair(handle, port)
        self._flush()

    def receive(self, data: bytes) -> None:
        """Take bytes of the client."""
        try:
            for event in self._connection.receive(data):
                self._handle(event)
        except websocket.ProtocolError:
            self._connection.close(broken=True)
            self._flush()
            self._wire.abort_soon()
            return
        self._flush()

    def _handle(self, event: websocket.Event) -> None:
        match event:
            case websocket.Data(channel, data) if channel in self._open:
                self._forwards[channel].data(data)
            case websocket.Ended(channel) if channel in self._open:
                self._forwards[channel].end()
            case websocket.Closed():
                self._wire.abort_soon()

    def send(self, handle: int, data: bytes) -> None:
        self._connection.send(handle, data)
        self._flush()

    def end(self, handle: int) -> None:
        self._connection.end(handle)
        self._flush()

    def close(self, handle: int, error: str = "") -> None:
        """When the last connection is over, so is the session: nothing can open another."""
        self._open.discard(handle)
        if error:
            self._connection.send(handle + 1, error.encode())
        if not self._open:
            self._connection.close()
        self._flush()
        if not self._open:
            self._wire.abort_soon()

    def goodbye(self) -> None:
        self._connection.close()
        self._flush()

    def _flush(self) -> None:
        self._wire.write(self._connection.output())
