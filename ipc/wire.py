"""Runs in: every process. Sans-IO.

The frame: one SEQPACKET packet is one envelope, a msgpack array. The type is read before the body is
decoded. Bodies over INLINE_LIMIT travel in a sealed memfd, the last descriptor of the packet.
It refuses: other versions, unknown kinds, packets over PACKET_LIMIT, bodies over BODY_LIMIT.
"""

from __future__ import annotations

import enum
from typing import Any, TypeVar

import msgspec

from ipc.errors import Code, RemoteError
from ipc.messages import Body

VERSION = 1
INLINE_LIMIT = 64 * 1024  # bytes of a body that still travel in the packet itself
PACKET_LIMIT = INLINE_LIMIT + 4096
BODY_LIMIT = 256 * 1024 * 1024
FD_LIMIT = 16  # descriptors of one packet, the body's memfd included


class Kind(enum.IntEnum):
    """What a packet is. The numbers are on the wire."""

    REQUEST = 1
    REPLY = 2
    ERROR = 3
    CANCEL = 4
    UPDATE = 5


class ProtocolError(Exception):
    """The peer broke the protocol: its connection is closed, nothing is answered."""


class Envelope(msgspec.Struct, array_like=True):
    """The head of a packet. `deadline_ns` is on CLOCK_MONOTONIC, which a host shares; 0: none."""

    version: int
    kind: int
    id: int
    type: str
    deadline_ns: int
    fds: int  # descriptors of the message, without the memfd
    memfd: bool
    body: msgspec.Raw


class WireError(Body):
    """Body of an ERROR packet."""

    code: str
    text: str
    reason: str = ""


_ENCODER = msgspec.msgpack.Encoder()
_HEAD = msgspec.msgpack.Decoder(Envelope)
_NIL = msgspec.Raw(b"\xc0")
_DECODERS: dict[type, msgspec.msgpack.Decoder[Any]] = {}
B = TypeVar("B", bound=Body)


def encode_body(body: Body) -> bytes:
    """Return the body's bytes. Raises RemoteError(RESOURCE_EXHAUSTED) over BODY_LIMIT."""
    data = _ENCODER.encode(body)
    if len(data) > BODY_LIMIT:
        raise RemoteError(Code.RESOURCE_EXHAUSTED, f"message of {len(data)} bytes is over the limit")
    return data


def decode_body(cls: type[B], data: bytes | msgspec.Raw) -> B:
    """Decode a body. Raises RemoteError(INVALID_ARGUMENT) with the field that is wrong."""
    decoder = _DECODERS.get(cls)
    if decoder is None:
        decoder = _DECODERS[cls] = msgspec.msgpack.Decoder(cls)
    try:
        return decoder.decode(data)  # type: ignore[no-any-return]  # the decoder was made for cls
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteError(Code.INVALID_ARGUMENT, f"{cls.__name__}: {error}") from error


def encode_head(
    kind: Kind, number: int, *, type_: str = "", deadline_ns: int = 0, fds: int = 0, body: bytes | None = None
) -> bytes:
    """Return the packet; `body` None means that it travels in a memfd."""
    raw = _NIL if body is None else msgspec.Raw(body)
    return _ENCODER.encode(Envelope(VERSION, kind, number, type_, deadline_ns, fds, body is None, raw))


def decode_head(packet: bytes) -> Envelope:
    """Decode a packet's envelope, not its body. Raises ProtocolError."""
    try:
        head = _HEAD.decode(packet)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not an envelope: {error}") from error
    if head.version != VERSION:
        raise ProtocolError(f"protocol version {head.version}, expected {VERSION}")
    if head.kind not in Kind._value2member_map_:
        raise ProtocolError(f"unknown packet kind {head.kind}")
    if not 0 <= head.fds <= FD_LIMIT or head.deadline_ns < 0:
        raise ProtocolError("bad descriptor count or deadline")
    return head


def encode_error(error: RemoteError) -> bytes:
    """Return the body of an ERROR packet; the text is cut to fit into a packet."""
    return encode_body(WireError(code=error.code.value, text=error.text[:16_000], reason=error.reason))


def decode_error(data: bytes | msgspec.Raw) -> RemoteError:
    """Rebuild the peer's error; a code that this release does not know becomes INTERNAL."""
    wire = decode_body(WireError, data)
    known = Code._value2member_map_
    code = Code(wire.code) if wire.code in known else Code.INTERNAL
    return RemoteError(code, wire.text, reason=wire.reason)
