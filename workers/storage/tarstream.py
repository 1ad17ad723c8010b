"""Runs in: unpack.

A streaming reader of tar archives: blocks in, entries out, no I/O of its own. Reads V7, ustar, GNU and PAX
(POSIX.1-2001) with long names, base-256 numbers, numeric owners, extended attributes (SCHILY.xattr.*) and
sparse files (GNU old format; PAX 0.0, 0.1, 1.0). The standard library's tarfile reads as much, at several
times the cost for each entry, and touches the file system itself.

Owns: the syntax of the archive. Names are bytes, as they stand in it; extract.py judges them.
Refuses: wrong checksums, negative or absurd numbers, headers over a limit, maps that do not fit their file,
multi-volume parts, and an archive that ends within an entry.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ipc.errors import RemoteError, invalid

from .whiteouts import shown

BLOCK = 512
#: A PAX or GNU extension header; Linux allows 64 KiB per extended attribute, 4 KiB per path.
MAX_EXTENSION = 1024 * 1024
MAX_SEGMENTS = 65_536
MAX_NUMBER = 2**63 - 1

REGULAR, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = (b"0", b"1", b"2", b"3", b"4", b"5", b"6")
_REGULAR_TYPES = (b"0", b"\0", b"7", b"S")
_HAS_DATA = frozenset((REGULAR, b"S", b"D"))
_KNOWN = frozenset((REGULAR, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO, b"D", b"S"))
_XATTR = b"SCHILY.xattr."
_FIELDS = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12s")
_NOTHING = bytes(BLOCK)

Segment = tuple[int, int]  # offset in the file, bytes of data


@dataclass(slots=True)
class Entry:
    """One member. `size` counts the data bytes that follow; `real_size` is the file's size with its holes."""

    name: bytes
    kind: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] | None = None
    segments: list[Segment] | None = None
    real_size: int = 0

    @property
    def shown(self) -> str:
        """The name for an error text."""
        return shown(self.name)


@dataclass(slots=True)
class _Extension:
    """What PAX and GNU headers say of the next entry."""

    records: list[tuple[bytes, bytes]] = field(default_factory=list)
    name: bytes | None = None
    link: bytes | None = None
    size: int = 0  # bytes of all of them


class Input:
    """Exact reads over an iterator of chunks; no chunk is copied but where a read spans two."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = b""
        self._at = 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes; b"" at a clean end, an error when it ends within."""
        end = self._at + size
        if end <= len(self._chunk):
            data = self._chunk[self._at : end]
            self._at = end
            return data
        return self._read_across(size)

    def _read_across(self, size: int) -> bytes:
        parts: list[bytes] = []
        missing = size
        while missing:
            piece = self._piece(missing)
            if not piece:
                if parts:
                    raise _truncated()
                return b""
            parts.append(bytes(piece))
            missing -= len(piece)
        return b"".join(parts)

    def _piece(self, limit: int) -> memoryview:
        while self._at == len(self._chunk):
            following = next(self._chunks, None)
            if following is None:
                return memoryview(b"")
            self._chunk, self._at = following, 0
        start = self._at
        self._at = min(len(self._chunk), start + limit)
        return memoryview(self._chunk)[start : self._at]

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes without copies."""
        while size:
            piece = self._piece(size)
            if not piece:
                raise _truncated()
            size -= len(piece)
            yield piece

    def skip(self, size: int) -> None:
        """Leave out `size` bytes."""
        for _ in self.pieces(size):
            pass

    def drain(self) -> None:
        """Read to the end: bytes after the archive's end belong to the diff id all the same."""
        self._chunk, self._at = b"", 0
        for _ in self._chunks:
            pass


def _truncated() -> RemoteError:
    return invalid("the layer's archive ends in the middle of an entry")


class TarReader:
    """Iterates the entries; the consumer takes each one's data with `data` before it asks for the next."""

    def __init__(self, source: Input) -> None:
        self._input = source
        self._left = 0  # data bytes of the current entry that nobody took
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        extension = _Extension()
        while (block := self._header()) is not None:
            entry = parse_header(block)
            if self._take_extension(entry, extension):
                continue
            yield self._finish(entry, block, extension)
            extension = _Extension()
        if extension.records or extension.name or extension.link:
            raise _truncated()

    def data(self, size: int) -> Iterator[memoryview]:
        """The next `size` bytes of the current entry's data."""
        if size > self._left:
            raise invalid("an entry of the layer's archive is shorter than it says")
        for piece in self._input.pieces(size):
            self._left -= len(piece)
            yield piece

    def _header(self) -> bytes | None:
        self._input.skip(self._left + self._padding)
        self._left = self._padding = 0
        block = self._input.read(BLOCK)
        if not block or block == _NOTHING:
            self._input.drain()
            return None
        return block

    def _take_extension(self, entry: Entry, extension: _Extension) -> bool:
        """True if this was a header about another entry."""
        if entry.kind not in _EXTENSIONS:
            return False
        extension.size += entry.size
        if extension.size > MAX_EXTENSION:
            raise invalid(f"an extension header of {extension.size} bytes in the layer's archive")
        body = self._input.read(entry.size)
        if len(body) < entry.size:
            raise _truncated()
        self._input.skip(-entry.size % BLOCK)
        _EXTENSIONS[entry.kind](extension, body)
        return True

    def _finish(self, entry: Entry, block: bytes, extension: _Extension) -> Entry:
        _apply(entry, extension)
        if entry.kind not in _KNOWN:
            raise invalid(f"entry {entry.shown} has the unknown type {shown(entry.kind)!r}")
        self._left = entry.size if entry.kind in _HAS_DATA else 0
        self._padding = -self._left % BLOCK
        entry.real_size = entry.size
        if entry.kind == b"S":
            self._old_sparse(entry, block)
        elif extension.records:
            self._pax_sparse(entry, extension)
        elif entry.kind == b"D":
            entry.kind = DIRECTORY
        return entry

    def _old_sparse(self, entry: Entry, block: bytes) -> None:
        """GNU's old format: four segments in the header, the others in blocks that follow it."""
        segments = _segments(block[386:482])
        more, real_size = block[482], number(block[483:495])
        while more:
            extra = self._input.read(BLOCK)
            if not extra or len(segments) > MAX_SEGMENTS:
                raise invalid(f"the sparse map of {entry.shown} is cut off or too long")
            segments += _segments(extra[:504])
            more = extra[504]
        entry.kind = REGULAR
        _set_sparse(entry, segments, real_size, entry.size)

    def _pax_sparse(self, entry: Entry, extension: _Extension) -> None:
        records = dict(extension.records)
        real = records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size")
        if real is None:
            return
        real_size = decimal(real)
        entry.name = records.get(b"GNU.sparse.name", entry.name)
        if records.get(b"GNU.sparse.major") == b"1":
            segments = self._sparse_map(entry)
        elif b"GNU.sparse.map" in records:
            values = [decimal(v) for v in records[b"GNU.sparse.map"].split(b",") if v]
            segments = _pairs(values)
        else:
            segments = _pairs([decimal(v) for k, v in extension.records if k in _SPARSE_00])
        _set_sparse(entry, segments, real_size, self._left)

    def _sparse_map(self, entry: Entry) -> list[Segment]:
        """PAX 1.0: decimal lines at the head of the data, padded to whole blocks."""
        lines: list[bytes] = []
        rest = b""
        wanted = 1
        while len(lines) < wanted:
            if self._left < BLOCK or wanted > 2 * MAX_SEGMENTS + 1:
                raise invalid(f"the sparse map of {entry.shown} is cut off or too long")
            rest += b"".join(bytes(p) for p in self.data(BLOCK))
            *complete, rest = rest.split(b"\n")
            lines += complete
            if lines:
                wanted = 1 + 2 * decimal(lines[0])
        return _pairs([decimal(line) for line in lines[1:wanted]])


def _long_name(extension: _Extension, body: bytes) -> None:
    extension.name = body.split(b"\0", 1)[0]


def _long_link(extension: _Extension, body: bytes) -> None:
    extension.link = body.split(b"\0", 1)[0]


def _pax(extension: _Extension, body: bytes) -> None:
    extension.records += pax_records(body)


def _pax_global(extension: _Extension, body: bytes) -> None:
    """A global header (git archive's comment, mostly) says nothing about a layer's files: left out."""


_EXTENSIONS: dict[bytes, Callable[[_Extension, bytes], None]] = {
    b"L": _long_name,
    b"K": _long_link,
    b"x": _pax,
    b"X": _pax,
    b"g": _pax_global,
    b"V": _pax_global,
}
_SPARSE_00 = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


def number(text: bytes) -> int:
    """A numeric header field: octal text or GNU base-256. Never negative but for times."""
    if text[0] & 0x80:
        value = int.from_bytes(text, "big", signed=False) & ((1 << (8 * len(text) - 1)) - 1)
        if text[0] & 0x40:  # two's complement below the marker bit
            value -= 1 << (8 * len(text) - 1)
        return value
    digits = text.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit():
        raise invalid(f"{shown(text)!r} is no number in a header of the layer's archive")
    try:
        return int(digits, 8)
    except ValueError as error:
        raise invalid(f"{shown(text)!r} is no octal number in the layer's archive") from error


def decimal(text: bytes) -> int:
    """A decimal number of a PAX record, not negative."""
    if not text.isdigit() or len(text) > 20 or (value := int(text)) > MAX_NUMBER:
        raise invalid(f"{shown(text)!r} is no size in the layer's archive")
    return value


def timestamp(text: bytes) -> int:
    """A PAX time ("1700000000.25", perhaps negative) in nanoseconds."""
    whole, _, fraction = text.partition(b".")
    digits = whole.lstrip(b"-")
    if not (digits.isdigit() and len(digits) < 20 and (not fraction or fraction.isdigit())):
        raise invalid(f"{shown(text)!r} is no time in the layer's archive")
    nanoseconds = int(digits) * 10**9 + int(fraction[:9].ljust(9, b"0"))
    return -nanoseconds if whole.startswith(b"-") else nanoseconds


def pax_records(body: bytes) -> list[tuple[bytes, bytes]]:
    """The records "LENGTH KEY=VALUE\\n" of a PAX header, in order."""
    records = []
    at = 0
    while at < len(body) and body[at]:
        space = body.find(b" ", at, at + 21)
        length = decimal(body[at:space]) if space > 0 else 0
        key, equals, value = body[space + 1 : at + length - 1].partition(b"=")
        if not equals or not key or at + length > len(body) or body[at + length - 1] != 10:
            raise invalid("a broken PAX record in the layer's archive")
        records.append((key, value))
        at += length
    return records


def parse_header(block: bytes) -> Entry:
    """One header block, its checksum verified."""
    name, mode, uid, gid, size, mtime, check, kind, link, magic, _, _, major, minor, prefix, _ = (
        _FIELDS.unpack(block)
    )
    _verify(block, check)
    name = name.split(b"\0", 1)[0]
    if magic[:6] == b"ustar\0" and prefix[0]:
        name = prefix.split(b"\0", 1)[0] + b"/" + name
    if kind in _REGULAR_TYPES and kind != b"S":
        kind = DIRECTORY if kind != b"7" and name.endswith(b"/") else REGULAR
    entry = Entry(
        name=name,
        kind=kind,
        mode=number(mode) & 0o7777,
        uid=number(uid),
        gid=number(gid),
        size=number(size),
        mtime_ns=number(mtime) * 10**9,
        link=link.split(b"\0", 1)[0],
    )
    if kind in (CHAR, BLOCK_DEVICE):
        entry.device = (number(major), number(minor))
    if not 0 <= entry.size <= MAX_NUMBER:
        raise invalid(f"entry {entry.shown} says a size of {entry.size}")
    return entry


def _verify(block: bytes, check: bytes) -> None:
    unsigned = sum(block) - sum(check) + 8 * 32
    stated = number(check)
    if stated != unsigned:
        high = sum(
            1 for byte in block[:148] + block[156:] if byte & 0x80
        )  # some old writers sum signed bytes
        if stated != unsigned - 256 * high:
            raise invalid(
                "a header of the layer's archive has a wrong checksum: this is no tar, or a broken one"
            )


def _apply(entry: Entry, extension: _Extension) -> None:
    if extension.name is not None:
        entry.name = extension.name
    if extension.link is not None:
        entry.link = extension.link
    for key, value in extension.records:
        setter = _PAX_FIELDS.get(key)
        if setter:
            setter(entry, value)
        elif key.startswith(_XATTR):
            if entry.xattrs is None:
                entry.xattrs = {}
            entry.xattrs[key[len(_XATTR) :].decode("utf-8", "surrogateescape")] = value


def _set_path(entry: Entry, value: bytes) -> None:
    entry.name = value


def _set_link(entry: Entry, value: bytes) -> None:
    entry.link = value


def _set_size(entry: Entry, value: bytes) -> None:
    entry.size = decimal(value)


def _set_uid(entry: Entry, value: bytes) -> None:
    entry.uid = decimal(value)


def _set_gid(entry: Entry, value: bytes) -> None:
    entry.gid = decimal(value)


def _set_mtime(entry: Entry, value: bytes) -> None:
    entry.mtime_ns = timestamp(value)


_PAX_FIELDS: dict[bytes, Callable[[Entry, bytes], None]] = {
    b"path": _set_path,
    b"linkpath": _set_link,
    b"size": _set_size,
    b"uid": _set_uid,
    b"gid": _set_gid,
    b"mtime": _set_mtime,
}


def _segments(table: bytes) -> list[Segment]:
    """Segments of a GNU old-format table: pairs of 12-byte numbers, until the first empty one."""
    found = []
    for at in range(0, len(table) - 23, 24):
        if not table[at]:
            break
        found.append((number(table[at : at + 12]), number(table[at + 12 : at + 24])))
    return found


def _pairs(values: list[int]) -> list[Segment]:
    if len(values) % 2 or len(values) > 2 * MAX_SEGMENTS:
        raise invalid("a broken sparse map in the layer's archive")
    return list(zip(values[::2], values[1::2], strict=True))


def _set_sparse(entry: Entry, segments: list[Segment], real_size: int, stored: int) -> None:
    """Check the map against the file: in order, no overlap, within it, and as long as what is stored."""
    end = 0
    for offset, length in segments:
        if offset < end or length < 0:
            raise invalid(f"the sparse map of {entry.shown} is out of order")
        end = offset + length
    if end > real_size or sum(length for _, length in segments) != stored or real_size > MAX_NUMBER:
        raise invalid(f"the sparse map of {entry.shown} does not fit its size")
    entry.segments, entry.real_size = segments, real_size
