"""Runs in: pytest (a short run; HYPOTHESIS_PROFILE=fuzz makes it long). The archive reader and the
inflaters get anything: they answer with entries or a RemoteError, and never hand out more than came in."""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import RemoteError
from workers.storage import decompress, tarstream
from workers.storage.decompress import HashedSource
from workers.storage.tarstream import BLOCK, Input, TarReader

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    file = io.BytesIO()
    format_ = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=file, mode="w", format=format_) as tar:
        for name in draw(st.lists(NAMES, max_size=6)):
            header = tarfile.TarInfo(name)
            header.type = draw(st.sampled_from([b"0", b"1", b"2", b"3", b"5", b"6"]))
            header.linkname = draw(NAMES)
            header.uid = draw(st.integers(0, 2**40))
            content = draw(st.binary(max_size=1500)) if header.type == b"0" else b""
            header.size = len(content)
            if format_ == tarfile.PAX_FORMAT:
                keys = st.sampled_from(["GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "size", "x"])
                header.pax_headers = draw(
                    st.dictionaries(keys, st.text("0123456789,.-", max_size=12), max_size=3)
                )
            tar.addfile(header, io.BytesIO(content))
    return file.getvalue()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(archives()))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at] = draw(st.integers(0, 255))
        head = at // BLOCK * BLOCK  # mend the checksum, else nothing else would ever be looked at
        data[head + 148 : head + 156] = b" " * 8
        data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + BLOCK])
    return bytes(data[: draw(st.integers(0, len(data)))])


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def consume(data: bytes, size: int) -> list[tuple[bytes, bytes]]:
    reader = TarReader(Input(pieces(data, size)))
    found = []
    taken = 0
    for entry in reader:
        segments = [(0, entry.size)] if entry.segments is None else entry.segments
        content = b""
        if entry.kind == tarstream.REGULAR:
            content = b"".join(bytes(p) for _, n in segments for p in reader.data(n))
        taken += len(content)
        assert taken <= len(data)
        assert all(offset + length <= entry.real_size for offset, length in segments)
        found.append((entry.name, content))
    return found


@given(damaged(), st.integers(1, 2000))
def test_any_archive_gives_entries_or_a_refusal(data: bytes, size: int) -> None:
    with contextlib.suppress(RemoteError):
        consume(data, size)


@given(st.binary(max_size=3000))
def test_any_bytes_are_no_surprise(data: bytes) -> None:
    with contextlib.suppress(RemoteError):
        consume(data, 512)


@given(archives(), st.integers(1, 3000), st.integers(1, 3000))
def test_how_the_bytes_arrive_changes_nothing(data: bytes, one: int, other: int) -> None:
    outcomes: list[object] = []
    for size in (one, other):
        try:
            outcomes.append(consume(data, size))
        except RemoteError as error:
            outcomes.append(error.text)
    assert outcomes[0] == outcomes[1]


@given(
    st.binary(max_size=2000),
    st.integers(1, 500),
    st.sampled_from([b"", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"]),
)
def test_any_stream_is_inflated_or_refused_and_always_hashed(data: bytes, size: int, magic: bytes) -> None:
    blob = magic + data
    stream = io.BytesIO(blob)
    source = HashedSource(lambda limit: stream.read(min(size, limit)))
    try:
        for chunk in decompress.plain(source):
            assert len(chunk) <= decompress.CHUNK
    except RemoteError:
        pass
    source.drain()
    assert source.size == len(blob)


@given(st.binary(max_size=5000), st.integers(1, 6000), st.integers(0, 30))
def test_what_was_packed_comes_out(data: bytes, cut: int, padding: int) -> None:
    blob = gzip.compress(data[:cut]) + gzip.compress(data[cut:]) + bytes(padding)
    stream = io.BytesIO(blob)
    assert b"".join(decompress.plain(HashedSource(stream.read))) == data
