"""The end of the log: text, JSON, the journal with its fields, a filter; and which requests are told to be
slow.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.log import Log
from ipc.messages.supervisor import InFlight
from supervisor.logwriter import LogWriter, fields_of
from supervisor.slow import Slow

LINE = Log("cri").format("warning", "pull failed", {"image": 'a "b" \\c', "code": "internal"}) + " pid=7"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "out", os.O_CREAT | os.O_RDWR | os.O_APPEND)
    yield fd
    os.close(fd)


def written(fd: int) -> list[str]:
    return os.pread(fd, 65536, 0).decode().splitlines()


def stream_of(fd: int) -> dict[str, str]:
    status = os.fstat(fd)
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


def bound(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind(str(path))
    return sock


def test_what_is_quoted_comes_back(out: int) -> None:
    fields = fields_of(LINE)
    assert fields["image"] == 'a "b" \\c'
    assert (fields["level"], fields["worker"], fields["msg"], fields["pid"]) == (
        *("warning", "cri", "pull failed"),
        "7",
    )


def test_lines_are_text_or_json_and_change_live(out: int) -> None:
    writer = LogWriter(out)
    assert writer.write(LINE.encode())
    writer.configure("json", "")
    assert writer.write(LINE.encode())
    text, as_json = written(out)
    assert text == LINE
    assert json.loads(as_json) == fields_of(LINE)


def test_a_filter_lets_through_what_it_finds(out: int) -> None:
    writer = LogWriter(out)
    writer.configure("text", "worker=(image|network)")
    assert writer.write(LINE.encode())
    assert written(out) == []
    writer.configure("text", "worker=cri")
    assert writer.write(LINE.encode())
    assert written(out) == [LINE]


def test_the_journal_gets_priority_and_fields(out: int, tmp_path: Path) -> None:
    with bound(tmp_path / "journal") as journal:
        writer = LogWriter(out, stream_of(out), str(tmp_path / "journal"))
        assert writer.write(LINE.encode())
        entry = dict(line.split("=", 1) for line in journal.recv(65536).decode().splitlines())
    assert entry["PRIORITY"] == "4"
    assert entry["SYSLOG_IDENTIFIER"] == "bulkhead"
    assert entry["OBJECT_PID"] == "7"
    assert entry["BULKHEAD_WORKER"] == "cri"
    assert entry["BULKHEAD_IMAGE"] == 'a "b" \\c'
    assert entry["MESSAGE"] == LINE.split(" ", 2)[2]
    assert written(out) == []


def test_a_journal_that_restarts_is_found_again(out: int, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with bound(path):
        writer = LogWriter(out, stream_of(out), str(path))
    assert writer.write(LINE.encode())
    assert written(out) == [LINE]  # nobody there: its stream takes the line
    path.unlink()
    with bound(path) as journal:
        assert writer.write(LINE.encode())
        assert b"BULKHEAD_WORKER=cri" in journal.recv(65536)


def test_standard_error_that_is_no_journal_gets_lines(out: int, tmp_path: Path) -> None:
    with bound(tmp_path / "journal"):
        writer = LogWriter(out, {"JOURNAL_STREAM": "1:1"}, str(tmp_path / "journal"))
        assert writer.write(LINE.encode())
    assert written(out) == [LINE]


def test_a_slow_request_is_told_when_its_age_has_doubled() -> None:
    slow, told = Slow(), []
    for second in range(0, 100, 5):
        one = InFlight(type="PullImage", age_ms=second * 1000, doing="image.layer.fetch")
        told += [found.age_ms // 1000 for found in slow.look(7, 1000.0 + second, [one], 10.0)]
    assert told == [10, 20, 40, 80]
    other = InFlight(type="PullImage", age_ms=12_000)
    assert slow.look(8, 1100.0, [other], 10.0) == [other]
    assert slow.look(7, 1101.0, [], 10.0) == []
    assert slow.look(9, 1100.0, [other], 0.0) == []
    assert slow.look(9, 1100.0, [InFlight(type="GetContainerEvents", age_ms=10**6)], 10.0) == []
