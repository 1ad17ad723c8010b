"""Runs in: unpack.

From a layer's blob to its tar stream: gzip (several members too), zstd (several frames, skippable ones) or
nothing, told apart by their first bytes; a media type is only a hint, and often wrong. The compressed bytes
are hashed and counted on the way.

Owns the memory bound: no step makes more than `CHUNK` bytes at a time, however well they were packed.
Refuses streams that end early, and what stands behind a gzip stream and is neither a member nor zeros.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import IO, cast

import zstandard

from ipc.errors import Code, RemoteError

#: Bytes of plain text that one step makes at most, and bytes that one read takes from the pipe.
CHUNK = 1024 * 1024
READ_SIZE = 256 * 1024
#: RFC 8878 asks for 8 MiB at least; 128 MiB is what `zstd --long` and image builders use at most.
ZSTD_MAX_WINDOW = 128 * 1024 * 1024

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = tuple(bytes((n,)) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))

Read = Callable[[int], bytes]


class HashedSource:
    """The blob as it arrives: `read` returns its bytes, `size` and `digest` tell what they were."""

    def __init__(self, read: Read, algorithm: str = "sha256") -> None:
        self._read = read
        self._hash = hashlib.new(algorithm, usedforsecurity=True)
        self._algorithm = algorithm
        self._ahead = b""
        self.size = 0

    def read(self, size: int = READ_SIZE) -> bytes:
        """Up to `size` bytes; b"" at the end."""
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            return data
        return self._fill(size)

    def _fill(self, size: int) -> bytes:
        data = self._read(size)
        self._hash.update(data)
        self.size += len(data)
        return data

    def peek(self, size: int) -> bytes:
        """The first `size` bytes, which are read again afterwards; fewer if there are no more."""
        while len(self._ahead) < size and (data := self._fill(READ_SIZE)):
            self._ahead += data
        return self._ahead[:size]

    def drain(self) -> None:
        """Take the rest, for the sake of the digest."""
        self._ahead = b""
        while self._fill(READ_SIZE):
            pass

    @property
    def digest(self) -> str:
        """Digest of all that was read so far, in OCI's form."""
        return f"{self._algorithm}:{self._hash.hexdigest()}"


class BrokenStream(RemoteError):
    """The compressed stream is damaged: a wrong digest explains it better, so look at that first."""

    def __init__(self, text: str) -> None:
        super().__init__(Code.INVALID_ARGUMENT, text)


def plain(source: HashedSource) -> Iterator[bytes]:
    """The uncompressed stream in chunks of at most CHUNK bytes. Raises BrokenStream."""
    magic = source.peek(4)
    if magic[:2] == GZIP_MAGIC:
        return _gunzip(source)
    if magic == ZSTD_MAGIC or magic in ZSTD_SKIPPABLE:
        return _unzstd(source)
    return iter(source.read, b"")


def _gunzip(source: HashedSource) -> Iterator[bytes]:
    data = source.read()
    while data:
        member = zlib.decompressobj(wbits=31)
        try:
            yield from _inflate(member, data, source)
        except zlib.error as error:
            raise BrokenStream(f"the layer's gzip stream is damaged: {error}") from error
        data = _next_member(member.unused_data, source)


def _inflate(member: zlib._Decompress, data: bytes, source: HashedSource) -> Iterator[bytes]:
    while not member.eof:
        text = member.decompress(data, CHUNK)
        if text:
            yield text
        data = member.unconsumed_tail
        # After a full chunk there may be text left inside the decompressor: no new input before it is out.
        if not data and not member.eof and len(text) < CHUNK:
            data = source.read()
            if not data:
                raise BrokenStream("the layer's gzip stream ends early")


def _next_member(rest: bytes, source: HashedSource) -> bytes:
    """What follows a member: the next one, or nothing but padding zeros."""
    while not (rest := rest.lstrip(b"\0")):
        rest = source.read()
        if not rest:
            return b""
    while len(rest) < len(GZIP_MAGIC) and (more := source.read()):
        rest += more
    if not rest.startswith(GZIP_MAGIC):
        raise BrokenStream("the layer's gzip stream is followed by something that is not gzip")
    return rest


def _unzstd(source: HashedSource) -> Iterator[bytes]:
    """A frame that ends early gives what it has: the digests and the archive's reader find that out."""
    context = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
    reader = context.stream_reader(cast(IO[bytes], source), read_size=READ_SIZE, read_across_frames=True)
    try:
        while text := reader.read(CHUNK):
            yield text
    except zstandard.ZstdError as error:
        raise BrokenStream(f"the layer's zstd stream is damaged: {error}") from error
