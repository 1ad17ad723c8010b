"""Runs in: pytest. The archive reader against the standard library's, and against broken archives."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator

import pytest

from ipc.errors import Code, RemoteError
from workers.storage import tarstream
from workers.storage.tarstream import Entry, Input, TarReader
from workers.storage.whiteouts import shown


def chunked(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def read_all(data: bytes, size: int = 1 << 20) -> list[tuple[Entry, bytes]]:
    reader = TarReader(Input(chunked(data, size)))
    found = []
    for entry in reader:
        stored = sum(n for _, n in entry.segments) if entry.segments is not None else entry.size
        wanted = stored if entry.kind == tarstream.REGULAR else 0
        found.append((entry, b"".join(bytes(p) for p in reader.data(wanted))))
    return found


def archive(headers: list[tuple[tarfile.TarInfo, bytes]], format_: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as tar:
        for header, content in headers:
            tar.addfile(header, io.BytesIO(content))
    return file.getvalue()


def headers(format_: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    chance = random.Random(3)
    found = []
    for number in range(60):
        header = tarfile.TarInfo(
            f"d{number}/" + "n" * chance.choice((5, 90, 90 if format_ == tarfile.USTAR_FORMAT else 150))
        )
        content = chance.randbytes(chance.choice((0, 1, 511, 512, 513, 70_000)))
        header.size, header.mode = len(content), chance.randrange(0o10000)
        header.uid = chance.choice((0, 1000, 0o7777777, 2**31 if format_ != tarfile.USTAR_FORMAT else 1))
        header.mtime = chance.choice((0, 1_700_000_000, 2**34 if format_ != tarfile.USTAR_FORMAT else 5))
        found.append((header, content))
    return found


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [1, 100, 512, 10_000, 1 << 20])
def test_entries_are_what_tarfile_wrote_however_they_arrive(format_: int, size: int) -> None:
    wanted = headers(format_)[: 5 if size == 1 else 60]
    found = read_all(archive(wanted, format_), size)
    assert len(found) == len(wanted)
    for (entry, content), (header, expected) in zip(found, wanted, strict=True):
        assert entry.name == header.name.encode()
        assert (entry.mode, entry.uid, entry.size) == (header.mode, header.uid, len(expected))
        assert entry.mtime_ns == header.mtime * 10**9
        assert content == expected


def test_unread_data_is_skipped() -> None:
    data = archive(headers(tarfile.PAX_FORMAT), tarfile.PAX_FORMAT)
    assert len(list(TarReader(Input(chunked(data, 1000))))) == 60


def test_links_devices_and_old_directories_are_told_apart() -> None:
    members = []
    for kind, link in ((b"1", "target"), (b"2", "x" * 150), (b"3", ""), (b"4", ""), (b"5", ""), (b"6", "")):
        header = tarfile.TarInfo("name")
        header.type, header.linkname, header.devmajor, header.devminor = kind, link, 8, 3
        members.append((header, b""))
    v7 = bytearray(archive([(tarfile.TarInfo("dir"), b"")], tarfile.USTAR_FORMAT)[:512])
    v7[:4], v7[156:157] = b"dir/", b"\0"
    v7[148:156] = b" " * 8
    v7[148:156] = b"%06o\0 " % sum(v7)
    found = [entry for entry, _ in read_all(archive(members, tarfile.GNU_FORMAT)[: 512 * 8] + bytes(v7))]
    assert [entry.kind for entry in found] == [b"1", b"2", b"3", b"4", b"5", b"6", b"5"]
    assert [entry.link for entry in found[:2]] == [b"target", b"x" * 150]
    assert found[2].device == found[3].device == (8, 3)


def test_an_archive_may_end_without_its_two_empty_blocks_but_not_within_an_entry() -> None:
    header = tarfile.TarInfo("name")
    header.size = 1000
    data = archive([(header, b"x" * 1000)], tarfile.GNU_FORMAT)
    assert len(read_all(data[: 512 * 3])) == 1
    for cut in (100, 512, 700, 512 * 3 - 1):
        with pytest.raises(RemoteError) as caught:
            read_all(data[:cut])
        assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (slice(148, 156), b"0000000\0"),  # checksum
        (slice(124, 136), b"99999999999\0"),  # size, no octal number
        (slice(124, 136), b"\xff" * 12),  # size, negative
        (slice(108, 116), b"0x12345\0"),  # uid
        (slice(156, 157), b"Q"),  # type
    ],
)
def test_a_broken_header_is_refused(field: slice, value: bytes) -> None:
    block = bytearray(archive([(tarfile.TarInfo("name"), b"")], tarfile.GNU_FORMAT)[:512])
    block[field] = value
    if field.start != 148:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    with pytest.raises(RemoteError) as caught:
        read_all(bytes(block))
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_signed_checksums_of_old_writers_are_accepted() -> None:
    block = bytearray(archive([(tarfile.TarInfo("n\xe4me"), b"")], tarfile.GNU_FORMAT)[:512])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(b - 256 if b > 127 else b for b in block)
    assert read_all(bytes(block))[0][0].name == "n\xe4me".encode()


@pytest.mark.parametrize("body", [b"9 a=b\n", b"99999 path=x\n", b"6 path\n", b"x path=y\n", b"7 =abc\n"])
def test_broken_pax_records_are_refused(body: bytes) -> None:
    with pytest.raises(RemoteError):
        tarstream.pax_records(body)


def test_pax_records_and_times_are_read() -> None:
    assert tarstream.pax_records(b"12 path=abc\n11 a=b=c\nd\n") == [(b"path", b"abc"), (b"a", b"b=c\nd")]
    assert tarstream.timestamp(b"1700000000.123456789123") == 1_700_000_000_123_456_789
    assert tarstream.timestamp(b"-1.5") == -1_500_000_000
    assert tarstream.number(b"\x80\0\0\0\0\0\0\x01") == 1
    assert tarstream.number(b"\xff" * 12) == -1


def test_headers_about_headers_are_bounded() -> None:
    one = tarfile.TarInfo("x")
    one.pax_headers = {"comment": "y" * 600_000}
    block = archive([(one, b"")], tarfile.PAX_FORMAT)
    size = tarstream.parse_header(block[:512]).size
    extension = block[: 512 + -(-size // 512) * 512]
    with pytest.raises(RemoteError) as caught:
        read_all(extension * 3)
    assert "extension header" in caught.value.text


@pytest.mark.parametrize(
    ("segments", "real", "stored"),
    [
        ([(0, 5), (3, 5)], 100, 10),
        ([(0, 5)], 3, 5),
        ([(10, 5)], 100, 6),
        ([(5, 1), (0, 1)], 9, 2),
        ([(0, -1)], 9, -1),
    ],
)
def test_a_sparse_map_must_fit(segments: list[tuple[int, int]], real: int, stored: int) -> None:
    with pytest.raises(RemoteError):
        tarstream._set_sparse(Entry(b"x", b"0"), segments, real, stored)


def test_names_are_shown_without_control_characters() -> None:
    assert shown(b"a\x1b[2Jb\n\xff") == "a\\x1b[2Jb\\n\\xff"
