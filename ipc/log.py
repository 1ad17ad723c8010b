"""Runs in: every process.

One event a line, key=value, told to the supervisor's log sink over a datagram socket. A line that cannot
be sent is counted and the count is told with the next one; logging never blocks and never fails.
Before a sink is set, lines go to standard error.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import traceback
from typing import Any

from ipc.channel import address

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
LINE_LIMIT = 16 * 1024
_PLAIN = re.compile(r"[^\s\"=\x00-\x1f\x7f]+\Z")


def quote(value: Any) -> str:
    """Return a value as it stands in a log line: bare if plain, else quoted with escapes."""
    text = value if isinstance(value, str) else str(value)
    if _PLAIN.match(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else repr(c)[1:-1] for c in escaped) + '"'


class Log:
    """A process's log. `sink` is the path of the supervisor's datagram socket, "" for standard error."""

    def __init__(self, kind: str, *, sink: str = "", level: str = "info") -> None:
        self.kind = kind
        self.level = LEVELS[level]
        self.dropped = 0
        self._sink = sink
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Connect to the sink now, while its path can still be reached. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            with address(self._sink) as short:
                sock.connect(short)
        except OSError:
            sock.close()
            raise
        if self._socket is not None:
            self._socket.close()
        self._socket = sock

    def fileno(self) -> int:
        """The descriptor of the connection to the sink, -1 without one."""
        return -1 if self._socket is None else self._socket.fileno()

    def debug(self, event: str, **fields: Any) -> None:
        self._write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write("error", event, fields)

    def bug(self, event: str, error: BaseException, **fields: Any) -> None:
        """Log an exception of ours with its stack."""
        stack = "".join(traceback.format_exception(error)).rstrip()
        self._write("error", event, {**fields, "bug": repr(error), "stack": stack})

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS[level] < self.level:
            return
        self.emit(self.format(level, event, fields))

    def format(self, level: str, event: str, fields: dict[str, Any]) -> str:
        """Return the line, without its end."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"
        parts = [f"time={stamp}", f"level={level}", f"worker={quote(self.kind)}", f"msg={quote(event)}"]
        parts += [f"{key}={quote(value)}" for key, value in fields.items()]
        if self.dropped:
            parts.append(f"lines_dropped={self.dropped}")
        return " ".join(parts)

    def emit(self, line: str) -> None:
        """Send one line; when the sink is full or gone, count it."""
        data = line.encode("utf-8", "replace")[:LINE_LIMIT]
        if not self._sink:
            os.write(sys.stderr.fileno(), data + b"\n")
        elif self._send(data):
            self.dropped = 0
        else:
            self.dropped += 1

    def _send(self, data: bytes) -> bool:
        try:
            if self._socket is None:
                self.connect()
            assert self._socket is not None
            self._socket.send(data)
        except (BlockingIOError, FileNotFoundError, PermissionError):
            return False
        except OSError:
            return self._send_again(data)
        return True

    def _send_again(self, data: bytes) -> bool:
        # The supervisor was restarted and bound the sink anew: monitors outlive it.
        try:
            self.connect()
            assert self._socket is not None
            self._socket.send(data)
        except OSError:
            return False
        return True


_log = Log("bulkhead")


def get() -> Log:
    """The process's log."""
    return _log


def set_log(log: Log) -> Log:
    """Make `log` the process's log (boot does, once)."""
    global _log
    _log = log
    return log
