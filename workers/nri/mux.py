"""Runs in: nri. Sans-IO: the frames that carry two logical connections over one socket of a plugin.

A frame is the number of a logical connection, a length (both 32 bits, big endian) and so many bytes. A
logical connection is a stream of bytes: where frames begin and end means nothing to it. Frames of numbers
that nobody knows are skipped. Refuses frames that are longer than the longest message of ttrpc.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

#: The runtime asks on this one, the plugin answers.
PLUGIN_SERVICE = 1
#: The plugin asks on this one.
RUNTIME_SERVICE = 2

_HEADER = struct.Struct(">II")
HEADER_SIZE = _HEADER.size
MAX_PAYLOAD = (4 << 20) + 10

#: Plugins in Go read a frame with one read(2)-like call into a buffer of this size (bufio's) when a message
#: begins, and refuse a frame that is larger; the rest of a message they read into a buffer of its own size.
#: They also close a connection on which more than 256 frames wait. So a message is one frame, or two.
FIRST_FRAME = 4096


class MuxError(Exception):
    """The peer broke the framing; nothing that follows can be understood."""


def frame(number: int, payload: bytes) -> bytes:
    """One frame. Raises ValueError if the payload is too long for one."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame of {len(payload)} bytes")
    return _HEADER.pack(number, len(payload)) + payload


def frames(number: int, message: bytes) -> bytes:
    """The frames of one message of ttrpc."""
    parts = (message[:FIRST_FRAME], message[FIRST_FRAME:])
    return b"".join(frame(number, part) for part in parts if part)


class Demultiplexer:
    """Takes what comes from the socket, gives pieces of logical connections; keeps less than a header."""

    def __init__(self) -> None:
        self._head = b""
        self._number = 0
        self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield (connection, bytes) in order. Raises MuxError."""
        at = 0
        while at < len(data):
            if not self._left:
                at = self._take_head(data, at)
                continue
            piece = data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            yield self._number, piece

    def _take_head(self, data: bytes, at: int) -> int:
        missing = HEADER_SIZE - len(self._head)
        self._head += data[at : at + missing]
        if len(self._head) == HEADER_SIZE:
            self._number, self._left = _HEADER.unpack(self._head)
            self._head = b""
            if self._left > MAX_PAYLOAD:
                raise MuxError(f"a frame of {self._left} bytes")
        return at + missing
