"""Runs in: the supervisor.

The end of everybody's log: a datagram socket whose packets are lines, written to standard error. It owns
`<run_root>/ipc/log.sock`. It parses nothing: it adds the sender's pid, which the kernel vouches for, takes
control characters out, and bounds every process to a rate, so that a worker gone mad fills no disk. When
standard error takes no more, lines are dropped and counted; the supervisor never waits for a reader.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ipc.log import LINE_LIMIT, Log
from ipc.loop import Loop
from supervisor.logwriter import LogWriter

RATE = 200.0  # lines a second and process
BURST = 2000.0
STDERR_LINE = 4096  # bytes kept of one line of a worker's standard error
_TURN = 64  # packets before the loop gets its turn
_SENDERS = 4096  # processes remembered
_CREDENTIALS = struct.Struct("iII")
#: Everything below space, and DEL, becomes "?": one packet is one line.
_CLEAN = bytes(c if c >= 32 and c != 127 else ord("?") for c in range(256))


@dataclass
class Bucket:
    """A token bucket: `tokens` lines may still be written at time `at`."""

    tokens: float
    at: float
    suppressed: int = 0

    def take(self, now: float) -> bool:
        """Take a token if there is one, else count."""
        self.tokens = min(BURST, self.tokens + (now - self.at) * RATE)
        self.at = now
        if self.tokens < 1.0:
            self.suppressed += 1
            return False
        self.tokens -= 1.0
        return True


class LogSink:
    """The socket and what it writes to. `uids` may log; others' packets are ignored."""

    def __init__(
        self,
        loop: Loop,
        path: str,
        uids: Collection[int],
        *,
        writer: LogWriter,
        clock: Callable[[], float] = time.monotonic,
        fd: int = -1,
    ) -> None:
        self.dropped = 0
        self._loop = loop
        self._uids = frozenset(uids) | {0}
        self._writer = writer
        self._clock = clock
        self._buckets: dict[int, Bucket] = {}
        self._sock = _bind(path) if fd < 0 else socket.socket(fileno=fd)
        loop.add_reader(self._sock.fileno(), self._readable)

    def fileno(self) -> int:
        """The descriptor of the socket."""
        return self._sock.fileno()

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_TURN):
                data, ancillary, _, _ = self._sock.recvmsg(
                    LINE_LIMIT, socket.CMSG_SPACE(_CREDENTIALS.size), socket.MSG_CMSG_CLOEXEC
                )
                self._received(data, ancillary)

    def _received(self, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid, uid, _ = _CREDENTIALS.unpack(raw[: _CREDENTIALS.size])
                if uid in self._uids:
                    self.line(pid, data)

    def line(self, pid: int, data: bytes) -> None:
        """Write one line of process `pid`, if its rate allows."""
        bucket = self._bucket(pid)
        if not bucket.take(self._clock()):
            return
        line = data.translate(_CLEAN) + b" pid=%d" % pid
        if bucket.suppressed:
            line += b" lines_suppressed=%d" % bucket.suppressed
            bucket.suppressed = 0
        if not self._writer.write(line):
            self.dropped += 1

    def _bucket(self, pid: int) -> Bucket:
        bucket = self._buckets.get(pid)
        if bucket is None:
            if len(self._buckets) >= _SENDERS:
                self._buckets.pop(next(iter(self._buckets)))
            bucket = self._buckets[pid] = Bucket(BURST, self._clock())
        return bucket

    def forget(self, pid: int) -> None:
        """The process is gone; its number may come again."""
        self._buckets.pop(pid, None)

    def close(self) -> None:
        """Write what is still there, then stop listening. The path stays for the next supervisor."""
        self._readable()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()


class Lines:
    """Sans-IO: cuts what comes through a pipe into lines; empty ones are left out, long ones are cut."""

    def __init__(self) -> None:
        self._tail = b""

    def take(self, data: bytes) -> list[bytes]:
        """Return the lines that are complete now."""
        *lines, tail = (self._tail + data).split(b"\n")
        self._tail = tail[:STDERR_LINE]
        return [line[:STDERR_LINE] for line in lines if line]

    def rest(self) -> list[bytes]:
        """Return what came without an end of line, at the end."""
        tail, self._tail = self._tail, b""
        return [tail] if tail else []


class SupervisorLog(Log):
    """The supervisor's own log: straight to the writer."""

    def __init__(self, level: str, writer: LogWriter) -> None:
        super().__init__("supervisor", level=level)
        self._writer = writer

    def emit(self, line: str) -> None:
        """Write one line; count it when nobody takes any more."""
        if self._writer.write(line.encode("utf-8", "replace")):
            self.dropped = 0
        else:
            self.dropped += 1


def _bind(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    sock.bind(path)
    os.chmod(path, 0o666)  # noqa: S103 - who may log is decided by the sender's uid
    return sock
