"""Runs in: unpack (written), children of storage and `bulkhead check` (compared).

What a layer holds, so that bit rot can be told: `<layer>/content`, a record of 20 bytes for each file, link
and directory in the order in which they were made. A record is a digest of the path, the size, and a CRC-32
of the content or of the link's target. The last record of a path counts; one that was removed has a record
that says so. Hard links and sparse files have none: the content of a hard link stands under its first name.

It is no protection from people (a CRC is no signature), and costs 0.3 ms a megabyte.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator

CONTENT = "content"
_RECORD = struct.Struct("<8sQI")
_GONE, _DIRECTORY = 2**64 - 1, 2**64 - 2
_PIECE = 1024 * 1024


class Content:
    """The record of a layer in the making."""

    def __init__(self) -> None:
        self.data = bytearray()

    def file(self, path: bytes, size: int, crc: int) -> None:
        """A file was written."""
        self.data += _RECORD.pack(_key(path), size, crc)

    def link(self, path: bytes, target: bytes) -> None:
        """A symbolic link was made."""
        self.data += _RECORD.pack(_key(path), len(target), zlib.crc32(target))

    def directory(self, path: bytes) -> None:
        """A directory was made."""
        self.data += _RECORD.pack(_key(path), _DIRECTORY, 0)

    def gone(self, path: bytes) -> None:
        """What was there was removed, or its content is not known."""
        self.data += _RECORD.pack(_key(path), _GONE, 0)


def _key(path: bytes) -> bytes:
    import hashlib  # only who unpacks or compares has it

    return hashlib.blake2b(path, digest_size=8).digest()


def differences(diff: str, data: bytes, *, deep: bool) -> Iterator[str]:
    """What of a layer's tree is not as it was made, a sentence each. Raises OSError, ValueError."""
    expected = _expected(data)
    for path, status in _walk(os.fsencode(diff)):
        record = expected.pop(_key(path), None)
        if record is not None:
            sentence = _difference(os.path.join(os.fsencode(diff), path), status, record, deep=deep)
            if sentence:
                yield f"{os.fsdecode(path)}: {sentence}"
    if expected:
        yield f"{len(expected)} of its files are missing"


def _expected(data: bytes) -> dict[bytes, tuple[int, int]]:
    if len(data) % _RECORD.size:
        raise ValueError("the record of the layer's content is cut off")
    found = {key: (size, crc) for key, size, crc in _RECORD.iter_unpack(data)}
    return {key: record for key, record in found.items() if record[0] != _GONE}


def _walk(top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    pending = [b""]
    while pending:
        above = pending.pop()
        with os.scandir(os.path.join(top, above)) as entries:
            for entry in entries:
                path = os.path.join(above, entry.name)
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(path)
                yield path, status


def _difference(path: bytes, status: os.stat_result, record: tuple[int, int], *, deep: bool) -> str:
    size, crc = record
    if size == _DIRECTORY or stat.S_ISDIR(status.st_mode):
        return "" if size == _DIRECTORY and stat.S_ISDIR(status.st_mode) else "another kind of file"
    if status.st_size != size:
        return f"{status.st_size} bytes, not {size}"
    if stat.S_ISLNK(status.st_mode):
        return "" if zlib.crc32(os.readlink(path)) == crc else "the link leads elsewhere"
    if deep and stat.S_ISREG(status.st_mode) and _crc(path) != crc:
        return "the content is not what was unpacked"
    return ""


def _crc(path: bytes) -> int:
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc
