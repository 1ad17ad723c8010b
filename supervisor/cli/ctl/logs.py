"""Runs in: bulkheadctl.

Reads a CRI log file: joins partial records, follows through rotation (the path gets another inode, or the
file gets shorter), ends when the container has ended and everything was shown.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from supervisor.cli.ctl.connection import CtlError

POLL = 0.1


def show(path: str, *, follow: bool, tail: int, timestamps: bool, running: Callable[[], bool]) -> None:
    """Print the log's payload, stdout to stdout and stderr to stderr. Raises CtlError."""
    with _opened(path) as file:
        records: Iterable[bytes] = _whole_lines(file)
        for record in records if tail < 0 else deque(records, maxlen=tail):
            emit(record, timestamps)
        _flush()
        if follow:
            for record in _follow(path, file, running):
                emit(record, timestamps)
                _flush()


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise CtlError(f"cannot read {path}: {error.strerror}") from error


def emit(record: bytes, timestamps: bool) -> None:
    """Print one record: `TIME STREAM TAG PAYLOAD`; a partial one (tag P) without its line end."""
    parts = record.rstrip(b"\n").split(b" ", 3)
    if len(parts) < 4:
        return
    stamp, stream, tag, payload = parts
    out = sys.stderr.buffer if stream == b"stderr" else sys.stdout.buffer
    out.write((stamp + b" " if timestamps else b"") + payload + (b"" if tag.startswith(b"P") else b"\n"))


def _flush() -> None:
    sys.stdout.buffer.flush()
    sys.stderr.buffer.flush()


def _follow(path: str, file: BinaryIO, running: Callable[[], bool]) -> Iterator[bytes]:
    """Lines as they come; closes the file. After a rotation the rest of the old file comes first."""
    while True:
        alive = running()
        rotated = _rotated(path, file)  # asked first: what came into the old file until then is read below
        yield from _whole_lines(file)
        if rotated:
            file.close()
            file = _opened(path)
        elif alive:
            time.sleep(POLL)
        else:
            return file.close()


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    while True:
        position = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(position)
            return
        yield line


def _rotated(path: str, file: BinaryIO) -> bool:
    try:
        now = os.stat(path)
    except FileNotFoundError:
        return False
    return now.st_ino != os.fstat(file.fileno()).st_ino or now.st_size < file.tell()
