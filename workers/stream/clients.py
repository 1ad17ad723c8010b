"""Runs in: stream.

The client's side of exec and attach: streams by name, over SPDY or WebSocket. What a client sends goes to
`on_data` and `on_end`; what breaks the protocol ends the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from ipc.streams import spdy, websocket
from workers.stream.remotecommand import CHANNELS, ERROR, RESIZE, STDIN, Wanted
from workers.stream.wire import Wire

OnData = Callable[[str, bytes], object]
OnEnd = Callable[[str], object]
FROM_CLIENT = (STDIN, RESIZE)


class Client(Protocol):
    """One client of a remote command."""

    async def ready(self) -> None:
        """Return when the client has opened its streams."""

    def send(self, name: str, data: bytes) -> None:
        """Send to a stream; Wire.drain says when there is room."""

    def close(self, outputs: list[str]) -> None:
        """End the output streams and say goodbye."""


class SpdyClient:
    """Streams that the client opens, each with its type in a header."""

    def __init__(
        self, wire: Wire, expected: frozenset[str], max_streams: int, on_data: OnData, on_end: OnEnd
    ) -> None:
        self._wire = wire
        self._expected = expected
        self._on_data, self._on_end = on_data, on_end
        self._connection = spdy.Connection(max_streams=max_streams)
        self._ids: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._ready = asyncio.Event()

    async def ready(self) -> None:
        await self._ready.wait()

    def receive(self, data: bytes) -> None:
        """Take bytes of the client."""
        try:
            for event in self._connection.receive(data):
                self._handle(event)
        except spdy.ProtocolError:
            self._wire.abort()
            return
        self._wire.write(self._connection.output())

    def _handle(self, event: spdy.Event) -> None:
        match event:
            case spdy.Opened(stream, headers):
                self._opened(stream, headers.get("streamtype", "").lower())
            case spdy.Data(stream, data):
                if self._names.get(stream) in FROM_CLIENT:
                    self._on_data(self._names[stream], data)
            case spdy.Ended(stream) | spdy.WasReset(stream):
                if self._names.get(stream) in FROM_CLIENT:
                    self._on_end(self._names[stream])

    def _opened(self, stream: int, name: str) -> None:
        if name in self._ids:
            self._connection.reset(stream, spdy.Reset.PROTOCOL_ERROR)
            return
        self._connection.accept(stream)
        if name in self._expected:  # what else there is, is accepted and ignored
            self._ids[name], self._names[stream] = stream, name
        if self._ids.keys() == self._expected:
            self._ready.set()

    def send(self, name: str, data: bytes) -> None:
        self._connection.send(self._ids.get(name, 0), data)
        self._wire.write(self._connection.output())

    def close(self, outputs: list[str]) -> None:
        for name in (*outputs, ERROR):
            self._connection.end(self._ids.get(name, 0))
        self._connection.close()
        self._wire.write(self._connection.output())


class WebSocketClient:
    """Channels by number; they are all there from the start."""

    def __init__(self, wire: Wire, protocol: str, wanted: Wanted, on_data: OnData, on_end: OnEnd) -> None:
        self._wire = wire
        self._first = (*wanted.outputs(), ERROR)[0]
        self._on_data, self._on_end = on_data, on_end
        self._connection = websocket.Connection(protocol)

    async def ready(self) -> None:
        """Begin with an empty message: the client sees that the upgrade is done."""
        self.send(self._first, b"")

    def receive(self, data: bytes) -> None:
        """Take bytes of the client."""
        try:
            for event in self._connection.receive(data):
                self._handle(event)
        except websocket.ProtocolError:
            self._connection.close(broken=True)
            self._wire.write(self._connection.output())
            self._wire.abort_soon()
            return
        self._wire.write(self._connection.output())

    def _handle(self, event: websocket.Event) -> None:
        match event:
            case websocket.Data(channel, data):
                if _name(channel) in FROM_CLIENT:
                    self._on_data(_name(channel), data)
            case websocket.Ended(channel):
                if _name(channel) in FROM_CLIENT:
                    self._on_end(_name(channel))
            case websocket.Closed():
                self._wire.abort_soon()

    def send(self, name: str, data: bytes) -> None:
        self._connection.send(CHANNELS.index(name), data)
        self._wire.write(self._connection.output())

    def close(self, _outputs: list[str]) -> None:
        # v5 half-closes what the client sends; clients take the server's for an unknown channel, and say so
        self._connection.close()
        self._wire.write(self._connection.output())


def _name(channel: int) -> str:
    return CHANNELS[channel] if 0 <= channel < len(CHANNELS) else ""
