"""Runs in: the tests. The CRI log format and the file it goes to."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.log import Log
from tests.support.monitor_process import joined
from workers.monitor import log
from workers.monitor.containerlog import ContainerLog
from workers.monitor.log import LINE_LIMIT, Clock, Encoder, LogFile
from workers.monitor.stdio import open_log

STAMP = b"2026-01-02T03:04:05.000000006+01:00"
RECORD = re.compile(rb"\S+ (?:stdout|stderr) ([FP]) ([^\n]*)\n")
CHUNKS = st.lists(
    st.tuples(
        st.one_of(
            st.binary(max_size=200),
            st.text("ab\n\r ", max_size=60).map(str.encode),
            st.integers(0, 3 * LINE_LIMIT).map(lambda size: b"x" * size),
            st.sampled_from([LINE_LIMIT - 1, LINE_LIMIT, LINE_LIMIT + 1]).map(
                lambda size: b"y" * size + b"\n"
            ),
        ),
        st.booleans(),
    )
)


@pytest.fixture
def said(tmp_path: Path) -> ContainerLog:
    return ContainerLog(Log("monitor"), pod="p", container="c")


def encoded(*chunks: bytes, more: bool = False) -> bytes:
    encoder = Encoder("stdout")
    records = [part for chunk in chunks for part in encoder.feed(chunk, STAMP, more=more)]
    return b"".join(records + encoder.finish(STAMP))


@given(CHUNKS)
def test_any_bytes_come_back_exactly_in_records_of_bounded_length(chunks: list[tuple[bytes, bool]]) -> None:
    encoder = Encoder("stderr")
    parts = [part for chunk, more in chunks if chunk for part in encoder.feed(chunk, STAMP, more=more)]
    log = b"".join(parts + encoder.finish(STAMP))
    assert joined(log, "stderr") == b"".join(chunk for chunk, _ in chunks)
    records = RECORD.findall(log)
    assert b"".join(STAMP + b" stderr " + tag + b" " + text + b"\n" for tag, text in records) == log
    assert all(len(text) <= LINE_LIMIT for _, text in records)


def test_complete_lines_are_tagged_f_and_share_the_stamp_of_their_chunk() -> None:
    assert encoded(b"a\n\nb\n") == b"".join(
        STAMP + b" stdout F " + text + b"\n" for text in (b"a", b"", b"b")
    )


def test_a_line_begun_is_written_when_the_source_pauses_and_waits_when_it_does_not() -> None:
    encoder = Encoder("stdout")
    assert b"".join(encoder.feed(b"one\ntwo", STAMP, more=True)) == STAMP + b" stdout F one\n"
    assert b"".join(encoder.feed(b"-three", STAMP, more=False)) == STAMP + b" stdout P two-three\n"
    assert b"".join(encoder.feed(b"\n", STAMP, more=False)) == STAMP + b" stdout F \n"


def test_a_long_line_comes_in_pieces_whose_last_is_f() -> None:
    tags = RECORD.findall(encoded(b"z" * (2 * LINE_LIMIT + 1) + b"\n"))
    assert [(tag, len(text)) for tag, text in tags] == [(b"P", LINE_LIMIT), (b"P", LINE_LIMIT), (b"F", 1)]


def test_a_line_of_exactly_the_limit_is_one_record() -> None:
    assert [tag for tag, _ in RECORD.findall(encoded(b"z" * LINE_LIMIT + b"\n"))] == [b"F"]


def test_an_endless_line_is_never_kept_in_memory() -> None:
    encoder = Encoder("stdout")
    for _ in range(10):
        encoder.feed(b"w" * 100_000, STAMP, more=True)
        assert len(encoder.rest) < LINE_LIMIT


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("name", "offset"), [("UTC0", b"+00:00"), ("XXX-5:30", b"+05:30"), ("YYY3:30", b"-03:30")]
)
def test_stamps_are_rfc3339_with_nanoseconds_and_the_local_offset(
    zone: pytest.MonkeyPatch, name: str, offset: bytes
) -> None:
    zone.setenv("TZ", name)
    time.tzset()
    zone.setattr(log, "time_ns", lambda: 1_700_000_000_000_000_007)
    stamp = Clock().stamp()
    local = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(1_700_000_000)).encode()
    assert stamp == local + b".000000007" + offset


def test_the_stamp_turns_with_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    stamps = []
    for now in (999_999_999, 1_000_000_000):
        monkeypatch.setattr(log, "time_ns", lambda now=now: now)
        stamps.append(clock.stamp())
    assert stamps[0][17:29] == b"00.999999999"
    assert stamps[1][17:29] == b"01.000000000"


def test_the_directory_is_made_for_all_to_enter_and_the_file_for_the_group(
    tmp_path: Path, said: ContainerLog
) -> None:
    before = os.umask(0o022)
    try:
        LogFile(open_log(str(tmp_path / "a/b/0.log")), said.warning).close()
    finally:
        os.umask(before)
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a/b/0.log").stat().st_mode & 0o777 == 0o640


def test_an_existing_log_is_continued(tmp_path: Path, said: ContainerLog) -> None:
    (tmp_path / "0.log").write_bytes(b"old\n")
    file = LogFile(open_log(str(tmp_path / "0.log")), said.warning)
    file.write([b"new\n"])
    file.close()
    assert (tmp_path / "0.log").read_bytes() == b"old\nnew\n"


class Disk:
    """A disk that takes `room` bytes and then fails, until it has room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._write = os.write
        monkeypatch.setattr(log, "write", self.write)
        monkeypatch.setattr(os, "writev", lambda fd, parts: self.write(fd, b"".join(parts)))

    def write(self, fd: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = self._write(fd, bytes(data)[: self.room])
        self.room -= done
        return done


@given(
    rooms=st.lists(st.integers(0, 60), max_size=12),
    records=st.lists(st.text("abc", max_size=12).map(lambda t: t.encode() + b"\n"), min_size=1, max_size=30),
)
def test_whatever_fits_is_whole_records_and_the_rest_is_counted(
    tmp_path_factory: pytest.TempPathFactory, rooms: list[int], records: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("log") / "0.log"
    with pytest.MonkeyPatch.context() as patch:
        file = LogFile(open_log(str(path)))
        disk = Disk(patch, 0)
        for number, record in enumerate(records):
            disk.room = rooms[number % len(rooms)] if rooms else 0
            file.write([record])
        disk.room = 1000
        file.write([b"last\n"])
        file.close()
    content = path.read_bytes()
    assert content.endswith(b"last\n")
    kept = content.splitlines(keepends=True)
    assert len(content) == file.written
    assert file.written + file.dropped == sum(map(len, records)) + 5
    remaining = iter([*records, b"last\n"])
    assert all(
        any(record == written for written in remaining) for record in kept
    )  # a subsequence, each whole


def test_a_file_over_the_size_limit_is_counted_too(tmp_path: Path, said: ContainerLog) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file = LogFile(open_log(str(tmp_path / "0.log")), said.warning)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
        file.write([b"abc\ndef\nghi\n"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    file.write([b"jkl\n"])
    file.close()
    assert (tmp_path / "0.log").read_bytes() == b"abc\ndef\njkl\n"
    assert (file.written, file.dropped) == (12, 4)


def test_reopen_keeps_the_old_file_when_the_new_one_cannot_be_made(
    tmp_path: Path, said: ContainerLog
) -> None:
    path = tmp_path / "d" / "0.log"
    file = LogFile(open_log(str(path)), said.warning)
    path.parent.rename(tmp_path / "moved")
    (tmp_path / "d").write_text("in the way")
    with pytest.raises(OSError, match=r"exists|directory"):
        open_log(str(path))
    file.write([b"still\n"])
    file.close()
    assert (tmp_path / "moved/0.log").read_bytes() == b"still\n"


def test_another_file_is_gone_on_in_after_the_record_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LogFile(open_log(str(tmp_path / "0.log")))
    with monkeypatch.context() as patch:
        disk = Disk(patch, 2)
        file.append(b"abc\ndef\n")
        disk.room = 100
        file.replace(open_log(str(tmp_path / "1.log")))
        file.write([b"ghi\n"])
    file.close()
    assert (tmp_path / "0.log").read_bytes() == b"abc\n"
    assert (tmp_path / "1.log").read_bytes() == b"ghi\n"
    assert (file.written, file.dropped) == (8, 4)


@given(
    rooms=st.lists(st.integers(0, 60), max_size=12),
    records=st.lists(st.text("abc", max_size=12).map(lambda t: t.encode() + b"\n"), min_size=1, max_size=30),
)
def test_appending_and_writing_leave_the_same(
    tmp_path_factory: pytest.TempPathFactory, rooms: list[int], records: list[bytes]
) -> None:
    left = []
    for append in (False, True):
        path = tmp_path_factory.mktemp("log") / "0.log"
        with pytest.MonkeyPatch.context() as patch:
            file = LogFile(open_log(str(path)))
            disk = Disk(patch, 0)
            for number, record in enumerate(records):
                disk.room = rooms[number % len(rooms)] if rooms else 100
                file.append(record) if append else file.write([record])
            disk.room = 1000
            file.close()
        left.append((path.read_bytes(), file.written, file.dropped))
    assert left[0] == left[1]


def test_without_a_file_nothing_is_written_and_nothing_fails() -> None:
    file = LogFile(-1)
    file.append(b"x\n")
    file.write([b"x\n"])
    file.replace(-1)
    file.close()
    assert (file.written, file.dropped) == (0, 0)
