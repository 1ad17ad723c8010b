"""Runs in: stream, bulkheadctl. Sans-IO, over wsproto.

WebSocket messages as channels: the first byte (or, in the base64 forms, the first character) of a message is
the channel, the rest its bytes. Messages are handed on piece by piece, none is ever stored. v5.channel.k8s.io
adds the half-close of a channel: a binary message of 0xFF and the channel. In a tunnel there are no channels:
the messages, one after the other, are the bytes of a connection of another protocol.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from wsproto.connection import Connection as Frames
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

CLOSE_CHANNEL = 0xFF
TUNNEL = "SPDY/3.1+portforward.k8s.io"  # the subprotocol of a tunnel
TUNNELLED = 0  # the channel that its bytes are told as
_ZERO = ord("0")


class ProtocolError(Exception):
    """The peer broke the protocol: the connection cannot go on."""


@dataclass(frozen=True)
class Data:
    """Bytes of a channel."""

    channel: int
    data: bytes


@dataclass(frozen=True)
class Ended:
    """The peer will send no more on a channel (v5)."""

    channel: int


@dataclass(frozen=True)
class Closed:
    """The peer closes the connection."""


Event = Data | Ended | Closed


class Connection:
    """One connection after its handshake. What is to be sent collects until `output` takes it.

    `frames` is the client's side of wsproto's connection, after its handshake.
    """

    def __init__(self, protocol: str, frames: Frames | None = None) -> None:
        self._base64 = "base64." in protocol
        self._half_close = protocol.startswith("v5.")
        self._tunnel = protocol == TUNNEL
        self._frames = frames or Frames(ConnectionType.SERVER)
        self._out: list[bytes] = []
        self._channel: int | None = None  # of the message that is coming in
        self._closing = False  # it is a v5 half-close
        self._rest = ""  # of a base64 quantum

    # -- receiving ------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes of the peer; return what happened. Raises ProtocolError."""
        events: list[Event] = []
        try:
            self._frames.receive_data(data)
            for event in self._frames.events():
                events += self._handle(event)
        except (RemoteProtocolError, LocalProtocolError) as error:
            raise ProtocolError(str(error)) from None
        return events

    def _handle(self, event: object) -> list[Event]:
        match event:
            case BytesMessage() | TextMessage():
                return self._piece(event)
            case Ping():
                self._out.append(self._frames.send(event.response()))
            case CloseConnection():
                if self._frames.state is ConnectionState.OPEN:  # not the peer's: wsproto could not read it
                    raise ProtocolError(event.reason or "unreadable")
                if self._frames.state is ConnectionState.REMOTE_CLOSING:
                    self._out.append(self._frames.send(event.response()))
                return [Closed()]
        return []

    def _piece(self, event: BytesMessage | TextMessage) -> list[Event]:
        """A part of a message; in either form either kind of frame is taken."""
        if self._base64:
            found = self._decoded(event)
        else:
            raw = event.data.encode() if isinstance(event, TextMessage) else bytes(event.data)
            found = self._binary(raw)
        if event.message_finished:
            self._channel, self._closing, self._rest = None, False, ""
        return found

    def _binary(self, raw: bytes) -> list[Event]:
        if self._tunnel:
            return [Data(TUNNELLED, raw)] if raw else []
        if self._channel is None:
            if not raw:
                return []
            self._channel, raw = raw[0], raw[1:]
            self._closing = self._half_close and self._channel == CLOSE_CHANNEL
        if not raw:
            return []
        return [Ended(raw[0])] if self._closing else [Data(self._channel, raw)]

    def _decoded(self, event: BytesMessage | TextMessage) -> list[Event]:
        data = event.data
        text = data if isinstance(data, str) else bytes(data).decode("latin-1")
        if self._channel is None:
            if not text:
                return []
            self._channel, text = ord(text[0]) - _ZERO, text[1:]
        text = self._rest + text
        whole = len(text) if event.message_finished else len(text) // 4 * 4
        self._rest = text[whole:]
        try:
            raw = base64.b64decode(text[:whole], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ProtocolError(f"this is not base64: {error}") from None
        return [Data(self._channel, raw)] if raw else []

    # -- sending --------------------------------------------------------------------------------------

    def output(self) -> list[bytes]:
        """What is to be sent now, in order."""
        out, self._out = self._out, []
        return out

    def send(self, channel: int, data: bytes) -> None:
        """Send a message on a channel; none after the connection's close."""
        message: TextMessage | BytesMessage
        if self._base64:
            message = TextMessage(data=chr(_ZERO + channel) + base64.b64encode(data).decode())
        else:
            message = BytesMessage(data=data if self._tunnel else bytes((channel,)) + data)
        if self._frames.state is ConnectionState.OPEN:
            self._out.append(self._frames.send(message))

    def end(self, channel: int) -> None:
        """Half-close a channel, where the protocol can say it."""
        if self._half_close and self._frames.state is ConnectionState.OPEN:
            self._out.append(self._frames.send(BytesMessage(data=bytes((CLOSE_CHANNEL, channel)))))

    def close(self, *, broken: bool = False) -> None:
        """Say goodbye, once."""
        if self._frames.state is ConnectionState.OPEN:
            code = CloseReason.PROTOCOL_ERROR if broken else CloseReason.NORMAL_CLOSURE
            self._out.append(self._frames.send(CloseConnection(code=code)))
