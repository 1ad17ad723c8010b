"""Runs in: the supervisor.

Where log lines go in the end: to the journal in its own protocol, with priority and fields, if standard
error is connected to it; else to standard error, as they are or as JSON. A filter (a regular expression)
lets through only what it finds. Form and filter change live. Nothing here waits for a reader.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import socket
from collections.abc import Mapping

JOURNAL = "/run/systemd/journal/socket"
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}
FORMS = ("text", "json")
_PIECE = 4096  # PIPE_BUF: what a writable pipe takes without blocking
_TOKEN = re.compile(r'([A-Za-z_][\w.]*)=("(?:[^"\\]|\\.)*"|\S*)')
_ESCAPE = re.compile(r'\\(["\\])')
_NO_FIELD = re.compile(r"[^A-Z0-9_]")
#: What the journal has fields of its own for, or that MESSAGE says.
_OWN = frozenset({"time", "level"})


def fields_of(line: str) -> dict[str, str]:
    """The keys and values of a line (ipc/log.py writes them). What is no key=value is left out."""
    return {found[1]: _unquoted(found[2]) for found in _TOKEN.finditer(line)}


def _unquoted(value: str) -> str:
    return _ESCAPE.sub(r"\1", value[1:-1]) if value[:1] == '"' else value


def as_json(line: str) -> str:
    """A line as a JSON object."""
    return json.dumps(fields_of(line), ensure_ascii=False)


def as_entry(line: str) -> bytes:
    """A line as an entry of the journal (systemd's native protocol)."""
    fields = fields_of(line)
    told = line.split(" ", 2)[2] if line.startswith("time=") and line.count(" ") > 1 else line
    entry = {"MESSAGE": told, "PRIORITY": str(PRIORITIES.get(fields.get("level", ""), 6))}
    entry["SYSLOG_IDENTIFIER"] = "bulkhead"
    if fields.get("pid", "").isdigit():
        entry["OBJECT_PID"] = fields["pid"]
    for key, value in fields.items():
        if key not in _OWN:
            entry["BULKHEAD_" + _NO_FIELD.sub("_", key.upper())] = value
    return b"".join(f"{key}={value}\n".encode() for key, value in entry.items())


class LogWriter:
    """The end of the log. `out_fd` is where lines go that the journal does not take."""

    def __init__(
        self, out_fd: int = 2, environ: Mapping[str, str] | None = None, journal: str = JOURNAL
    ) -> None:
        self._out_fd = out_fd
        self._path = journal
        self._journal: socket.socket | None = None
        self._form = "text"
        self._filter: re.Pattern[str] | None = None
        if _is_journal(out_fd, (environ or {}).get("JOURNAL_STREAM", "")):
            with contextlib.suppress(OSError):
                self._journal = _connect(journal)

    def configure(self, form: str, pattern: str) -> None:
        """Take another form and another filter; "" filters nothing. The pattern has been checked."""
        self._form = form
        self._filter = re.compile(pattern) if pattern else None

    def write(self, line: bytes) -> bool:
        """Write one line, without its end. False if something of it is lost."""
        if self._form == "text" and self._filter is None and self._journal is None:
            return write_line(self._out_fd, line + b"\n")
        text = line.decode("utf-8", "replace")
        if self._filter is not None and not self._filter.search(text):
            return True
        if self._form == "json":
            return write_line(self._out_fd, as_json(text).encode() + b"\n")
        return self._sent(text) or write_line(self._out_fd, line + b"\n")

    def _sent(self, line: str) -> bool:
        if self._journal is None:
            return False
        try:
            self._journal.send(as_entry(line))
        except OSError as error:
            # ECONNREFUSED once when the journal has gone, then ENOTCONN. If it is full, or the entry is too
            # long, its stream may take the line.
            gone = error.errno in (errno.ECONNREFUSED, errno.ENOTCONN)
            return gone and self._sent_anew(line)
        return True

    def _sent_anew(self, line: str) -> bool:
        """The journal was restarted, and bound its socket anew."""
        try:
            journal = _connect(self._path)
            journal.send(as_entry(line))
        except OSError:
            return False
        if self._journal is not None:
            self._journal.close()
        self._journal = journal
        return True


def _is_journal(fd: int, stream: str) -> bool:
    """True if JOURNAL_STREAM (systemd.exec(5)) names what the descriptor is."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def write_line(fd: int, line: bytes) -> bool:
    """Write a line as far as nobody has to wait for it. False if something is missing."""
    return all(
        _writable(fd) and _write(fd, line[start : start + _PIECE]) for start in range(0, len(line), _PIECE)
    )


def _writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _write(fd: int, data: bytes) -> bool:
    try:
        return os.write(fd, data) == len(data)
    except OSError:
        return False  # the reader is gone, or the disk is full: nobody to tell
