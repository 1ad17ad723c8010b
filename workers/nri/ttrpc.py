"""Runs in: nri. Sans-IO: ttrpc, unary calls only, in both roles.

A message has a head of ten bytes (length, stream, type, flags) and a Request or a Response. `Caller` asks,
`Answerer` is asked. Refuses messages over 4 MiB, streams that are not the client's to name, a peer that has
too many requests open. What it does not know of the protocol (messages of streaming calls, new types) it
skips.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError

from ipc.nri import ttrpc_pb2

_HEADER = struct.Struct(">IIBB")
HEADER_SIZE = _HEADER.size
MAX_MESSAGE = 4 << 20
MAX_OPEN = 64  # requests of a plugin that are being answered
_MAX_STREAM = 2**32 - 1

REQUEST, RESPONSE = 1, 2


class ProtocolError(Exception):
    """The peer broke the protocol: its connection is to be closed."""


class Status(enum.IntEnum):
    """The codes of google.rpc that are told apart or sent here."""

    OK = 0
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    UNAVAILABLE = 14


@dataclass(frozen=True)
class Message:
    """One message, its body not yet looked at."""

    stream: int
    kind: int
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What came back. `code` 0 is success."""

    stream: int
    code: int
    text: str
    payload: bytes


@dataclass(frozen=True)
class Asked:
    """What the peer asks of us."""

    stream: int
    service: str
    method: str
    payload: bytes


def message(stream: int, kind: int, body: bytes) -> bytes:
    """The bytes of a message. Raises ValueError if it is too long."""
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(body)} bytes; {MAX_MESSAGE} is the most")
    return _HEADER.pack(len(body), stream, kind, 0) + body


class Messages:
    """Makes messages of a stream of bytes; keeps at most one of them."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete. Raises ProtocolError."""
        self._buffer += data
        while len(self._buffer) >= HEADER_SIZE:
            length, stream, kind, _flags = _HEADER.unpack_from(self._buffer)
            if length > MAX_MESSAGE:
                raise ProtocolError(f"a message of {length} bytes")
            end = HEADER_SIZE + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER_SIZE:end])
            del self._buffer[:end]
            yield Message(stream, kind, body)


class Caller:
    """The side that asks: streams have odd, rising numbers."""

    def __init__(self) -> None:
        self._messages = Messages()
        self._next = 1
        self._open: set[int] = set()

    def ask(self, service: str, method: str, payload: bytes, timeout_ns: int) -> tuple[int, bytes]:
        """Return the number of a new call and the bytes to send. Raises ValueError if it is too long."""
        if self._next > _MAX_STREAM:
            raise ProtocolError("the connection has used up its streams")
        stream = self._next
        request = ttrpc_pb2.Request(service=service, method=method, payload=payload, timeout_nano=timeout_ns)
        data = message(stream, REQUEST, request.SerializeToString())
        self._next += 2
        self._open.add(stream)
        return stream, data

    def feed(self, data: bytes) -> Iterator[Answer]:
        """Yield answers to open calls. Raises ProtocolError."""
        for one in self._messages.feed(data):
            if one.kind == RESPONSE and one.stream in self._open:
                self._open.discard(one.stream)
                yield _answer(one)


def _answer(received: Message) -> Answer:
    response = _parse(ttrpc_pb2.Response, received.body)
    status = response.status
    return Answer(received.stream, status.code, status.message, response.payload)


class Answerer:
    """The side that is asked."""

    def __init__(self) -> None:
        self._messages = Messages()
        self._last = 0
        self._open: set[int] = set()

    def feed(self, data: bytes) -> Iterator[Asked]:
        """Yield requests. Raises ProtocolError."""
        for one in self._messages.feed(data):
            if one.kind == REQUEST:
                yield self._asked(one)

    def _asked(self, received: Message) -> Asked:
        if received.stream % 2 == 0 or received.stream <= self._last:
            raise ProtocolError(f"a request on stream {received.stream} after {self._last}")
        if len(self._open) >= MAX_OPEN:
            raise ProtocolError(f"more than {MAX_OPEN} requests at a time")
        self._last = received.stream
        self._open.add(received.stream)
        request = _parse(ttrpc_pb2.Request, received.body)
        return Asked(received.stream, request.service, request.method, request.payload)

    def answer(self, stream: int, payload: bytes) -> bytes:
        """The bytes of a success."""
        return self._respond(stream, ttrpc_pb2.Response(payload=payload))

    def refuse(self, stream: int, code: int, text: str) -> bytes:
        """The bytes of a failure."""
        status = ttrpc_pb2.Status(code=code, message=text[:4096])
        return self._respond(stream, ttrpc_pb2.Response(status=status))

    def _respond(self, stream: int, response: ttrpc_pb2.Response) -> bytes:
        self._open.discard(stream)
        return message(stream, RESPONSE, response.SerializeToString())


M = TypeVar("M", ttrpc_pb2.Request, ttrpc_pb2.Response)


def _parse(kind: type[M], data: bytes) -> M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"no {kind.DESCRIPTOR.name}: {error}") from error
