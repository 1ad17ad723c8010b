"""Runs in: stream, bulkheadctl. Sans-IO.

SPDY/3 header blocks: one zlib stream per direction for the whole connection, with the dictionary of the
specification. Whatever a block claims, no more than BLOCK_LIMIT bytes of it are ever inflated.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

Headers = dict[str, str]

#: The dictionary of SPDY/3 (draft-mbelshe-httpbis-spdy-00, section 2.6.10.1).
DICTIONARY = Path(__file__).with_name("spdy3_dictionary.bin").read_bytes()
BLOCK_LIMIT = 64 * 1024  # bytes of a block, inflated
MEMORY_LEVEL = 1  # what is sent are empty blocks: a large hash would be a session's largest part
COUNT_LIMIT = 256  # headers of a block
_U32 = struct.Struct(">I")


class BadHeaders(ValueError):
    """A block that cannot be read; the connection's compression state is lost with it."""


class Compressor:
    """Makes blocks. Blocks must be sent in the order in which they were made."""

    def __init__(self) -> None:
        self._zlib = zlib.compressobj(
            9, zlib.DEFLATED, zlib.MAX_WBITS, MEMORY_LEVEL, zlib.Z_DEFAULT_STRATEGY, DICTIONARY
        )

    def block(self, headers: Headers) -> bytes:
        """The compressed block of these headers; names are sent in lower case."""
        parts = [_U32.pack(len(headers))]
        for name, value in headers.items():
            parts += [_field(name.lower()), _field(value)]
        return self._zlib.compress(b"".join(parts)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


def _field(text: str) -> bytes:
    raw = text.encode("latin-1")
    return _U32.pack(len(raw)) + raw


class Decompressor:
    """Reads blocks in the order in which they came."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS, DICTIONARY)

    def headers(self, block: bytes) -> Headers:
        """The headers of a block, names in lower case; the first of several values. Raises BadHeaders."""
        try:
            raw = self._zlib.decompress(block, BLOCK_LIMIT)
        except zlib.error as error:
            raise BadHeaders(str(error)) from None
        if self._zlib.unconsumed_tail:
            raise BadHeaders(f"a header block of more than {BLOCK_LIMIT} bytes")
        return _parse(raw)


def _parse(raw: bytes) -> Headers:
    count, at = _number(raw, 0)
    if count > COUNT_LIMIT:
        raise BadHeaders(f"{count} headers in a block")
    headers: Headers = {}
    for _ in range(count):
        name, at = _text(raw, at)
        value, at = _text(raw, at)
        if not name:
            raise BadHeaders("a header without a name")
        headers.setdefault(name.lower(), value.partition("\0")[0])
    if at != len(raw):
        raise BadHeaders("bytes after the last header")
    return headers


def _number(raw: bytes, at: int) -> tuple[int, int]:
    if at + 4 > len(raw):
        raise BadHeaders("the block ends early")
    return _U32.unpack_from(raw, at)[0], at + 4


def _text(raw: bytes, at: int) -> tuple[str, int]:
    length, at = _number(raw, at)
    if at + length > len(raw):
        raise BadHeaders("the block ends early")
    return raw[at : at + length].decode("latin-1"), at + length
