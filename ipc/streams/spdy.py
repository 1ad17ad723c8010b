"""Runs in: stream (the server's side), bulkheadctl (the client's). Sans-IO.

SPDY/3.1 framing as kubelets and crictl speak it: bytes in, events out. There is no
flow control in it (SETTINGS and WINDOW_UPDATE mean nothing to these peers), so a data frame is handed on
piece by piece as it comes and none is ever stored. It owns the streams' states and refuses, with a reset of
the stream or the end of the connection, what breaks the rules or exceeds the limits.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ipc.streams.headers import BadHeaders, Compressor, Decompressor, Headers

VERSION = 3
CONTROL_LIMIT = 64 * 1024  # bytes of a control frame's payload
DATA_PIECE = 1 << 20  # bytes of a data frame that is sent
FIN = 0x01
_HEAD = struct.Struct(">II")
_SYN_STREAM = struct.Struct(">IIBB")
_ID_MASK = 0x7FFFFFFF
_LENGTH_MASK = 0xFFFFFF


class Type(enum.IntEnum):
    """Control frames."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Reset(enum.IntEnum):
    """Statuses of RST_STREAM."""

    PROTOCOL_ERROR = 1
    REFUSED_STREAM = 3
    CANCEL = 5
    FLOW_CONTROL_ERROR = 7


class ProtocolError(Exception):
    """The peer broke the protocol: the connection cannot go on."""


@dataclass(frozen=True)
class Opened:
    """The peer opened a stream: accept it or refuse it."""

    stream: int
    headers: Headers


@dataclass(frozen=True)
class Data:
    """Bytes of a stream."""

    stream: int
    data: bytes


@dataclass(frozen=True)
class Ended:
    """The peer will send no more on a stream (half-close)."""

    stream: int


@dataclass(frozen=True)
class WasReset:
    """The peer has given up a stream, both ways."""

    stream: int
    status: int


@dataclass(frozen=True)
class GoneAway:
    """The peer opens no more streams."""


Event = Opened | Data | Ended | WasReset | GoneAway


@dataclass
class _Stream:
    ended_here: bool = False
    ended_there: bool = False


class Connection:
    """One connection. What is to be sent collects until `output` takes it.

    The client's streams have odd numbers, the server's even ones, and so have their pings.
    """

    def __init__(self, *, max_streams: int = 256, client: bool = False) -> None:
        self._max_streams = max_streams
        self._peer_parity = 0 if client else 1
        self._last_own = -1 if client else 0
        self._streams: dict[int, _Stream] = {}
        self._last_id = 0
        self._compress = Compressor()
        self._decompress = Decompressor()
        self._in = bytearray()
        self._data_left = 0  # of the data frame that is coming in
        self._data_stream = 0
        self._data_fin = False
        self._out: list[bytes] = []
        self._events: list[Event] = []

    @property
    def streams(self) -> list[int]:
        """The streams that are open at least one way."""
        return list(self._streams)

    # -- receiving ------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes of the peer; return what happened. Raises ProtocolError."""
        self._in += data
        while self._step():
            pass
        events, self._events = self._events, []
        return events

    def _step(self) -> bool:
        if self._data_left:
            return self._data_piece()
        if len(self._in) < _HEAD.size:
            return False
        first, second = _HEAD.unpack_from(self._in)
        flags, length = second >> 24, second & _LENGTH_MASK
        if first >> 31:
            return self._control_frame(first, flags, length)
        del self._in[: _HEAD.size]
        self._data_stream, self._data_left, self._data_fin = first & _ID_MASK, length, bool(flags & FIN)
        if not length:
            self._data_over()
        return True

    def _data_piece(self) -> bool:
        piece = bytes(self._in[: self._data_left])
        if not piece:
            return False
        del self._in[: len(piece)]
        self._data_left -= len(piece)
        stream = self._streams.get(self._data_stream)
        if stream is not None and not stream.ended_there:
            self._events.append(Data(self._data_stream, piece))
        if not self._data_left:
            self._data_over()
        return True

    def _data_over(self) -> None:
        if self._data_fin:
            self._peer_ended(self._data_stream)

    def _control_frame(self, first: int, flags: int, length: int) -> bool:
        version, type_ = first >> 16 & 0x7FFF, first & 0xFFFF
        if version != VERSION:
            raise ProtocolError(f"SPDY version {version}")
        if length > CONTROL_LIMIT:
            raise ProtocolError(f"a control frame of {length} bytes")
        if len(self._in) < _HEAD.size + length:
            return False
        payload = bytes(self._in[_HEAD.size : _HEAD.size + length])
        del self._in[: _HEAD.size + length]
        handle = self._handlers().get(type_)
        if handle is None:
            raise ProtocolError(f"a control frame of type {type_}")
        handle(flags, payload)
        return True

    def _handlers(self) -> dict[int, Callable[[int, bytes], None]]:
        return {
            Type.SYN_STREAM: self._syn_stream,
            Type.SYN_REPLY: self._headers,
            Type.HEADERS: self._headers,
            Type.RST_STREAM: self._rst_stream,
            Type.PING: self._ping,
            Type.GOAWAY: self._goaway,
            Type.SETTINGS: self._ignored,
            Type.WINDOW_UPDATE: self._ignored,
        }

    def _syn_stream(self, flags: int, payload: bytes) -> None:
        if len(payload) < _SYN_STREAM.size:
            raise ProtocolError("a short SYN_STREAM")
        stream = _SYN_STREAM.unpack_from(payload)[0] & _ID_MASK
        headers = self._inflate(
            payload[_SYN_STREAM.size :]
        )  # also of one that is refused: it is one zlib stream
        if stream % 2 != self._peer_parity or stream <= self._last_id:
            self._rst(stream, Reset.PROTOCOL_ERROR)
            return
        self._last_id = stream
        if len(self._streams) >= self._max_streams:
            self._rst(stream, Reset.REFUSED_STREAM)
            return
        self._streams[stream] = _Stream()
        self._events.append(Opened(stream, headers))
        if flags & FIN:
            self._peer_ended(stream)

    def _headers(self, flags: int, payload: bytes) -> None:
        self._inflate(payload[4:])
        if flags & FIN:
            self._peer_ended(_number(payload))

    def _inflate(self, block: bytes) -> Headers:
        try:
            return self._decompress.headers(block)
        except BadHeaders as error:
            raise ProtocolError(str(error)) from None

    def _rst_stream(self, _flags: int, payload: bytes) -> None:
        stream, status = _number(payload), _number(payload[4:], masked=False)
        if self._streams.pop(stream, None) is not None:
            self._events.append(WasReset(stream, status))

    def _ping(self, _flags: int, payload: bytes) -> None:
        number = _number(payload, masked=False)
        if number % 2 == self._peer_parity:  # we send none ourselves
            self._control(Type.PING, 0, payload[:4])

    def _goaway(self, _flags: int, _payload: bytes) -> None:
        self._events.append(GoneAway())

    def _ignored(self, _flags: int, _payload: bytes) -> None:
        """No flow control: TCP has it."""

    def _peer_ended(self, stream: int) -> None:
        state = self._streams.get(stream)
        if state is None or state.ended_there:
            return
        state.ended_there = True
        self._events.append(Ended(stream))
        self._forget(stream, state)

    def _forget(self, stream: int, state: _Stream) -> None:
        if state.ended_here and state.ended_there:
            del self._streams[stream]

    # -- sending --------------------------------------------------------------------------------------

    def output(self) -> list[bytes]:
        """What is to be sent now, in order."""
        out, self._out = self._out, []
        return out

    def open(self, headers: Headers) -> int:
        """Open a stream; return its number."""
        self._last_own += 2
        block = self._compress.block(headers)
        self._control(Type.SYN_STREAM, 0, _SYN_STREAM.pack(self._last_own, 0, 0, 0) + block)
        self._streams[self._last_own] = _Stream()
        return self._last_own

    def accept(self, stream: int) -> None:
        """Answer an opened stream with SYN_REPLY."""
        if stream in self._streams:
            self._control(Type.SYN_REPLY, 0, struct.pack(">I", stream) + self._compress.block({}))

    def send(self, stream: int, data: bytes) -> None:
        """Send bytes; on a stream that is no longer open they are dropped."""
        state = self._streams.get(stream)
        if state is None or state.ended_here:
            return
        for at in range(0, len(data), DATA_PIECE):
            piece = data[at : at + DATA_PIECE]
            self._out += [_HEAD.pack(stream, len(piece)), piece]

    def end(self, stream: int) -> None:
        """Half-close a stream from here."""
        state = self._streams.get(stream)
        if state is None or state.ended_here:
            return
        state.ended_here = True
        self._out.append(_HEAD.pack(stream, FIN << 24))
        self._forget(stream, state)

    def reset(self, stream: int, status: Reset) -> None:
        """Give a stream up, both ways."""
        if self._streams.pop(stream, None) is not None:
            self._rst(stream, status)

    def close(self) -> None:
        """Reset what is open, then say GOAWAY."""
        for stream in self.streams:
            self.reset(stream, Reset.CANCEL)
        self._control(Type.GOAWAY, 0, struct.pack(">II", self._last_id, 0))

    def _rst(self, stream: int, status: Reset) -> None:
        self._control(Type.RST_STREAM, 0, struct.pack(">II", stream, status))

    def _control(self, type_: Type, flags: int, payload: bytes) -> None:
        head = _HEAD.pack(0x80000000 | VERSION << 16 | type_, flags << 24 | len(payload))
        self._out.append(head + payload)


def _number(payload: bytes, *, masked: bool = True) -> int:
    if len(payload) < 4:
        raise ProtocolError("a short control frame")
    number = int.from_bytes(payload[:4], "big")
    return number & _ID_MASK if masked else number
