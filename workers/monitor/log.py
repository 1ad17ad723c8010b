"""Runs in: the monitor. The encoder is sans-IO.

The CRI log format: `<RFC3339Nano, local offset> <stream> <F|P> <text>`, one record a line. A line that is not
complete when its source pauses, or longer than LINE_LIMIT, is written in pieces tagged P; joining the pieces
of one stream gives back its bytes exactly. What cannot be written is dropped whole and counted: a full disk
must not block a container.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from os import write
from time import localtime, strftime, time_ns

LINE_LIMIT = 16 * 1024  # bytes of text in one record, as the other runtimes have it
Records = list[bytes | memoryview]  # buffers that make up whole records, for one writev


Trouble = Callable[..., object]  # an event and its fields, as in ipc.log


class Clock:
    """Makes time stamps; the part down to the second is made once a second."""

    __slots__ = ("_head", "_second", "_zone")

    def __init__(self) -> None:
        self._second = -1
        self._head = b""
        self._zone = b""

    def stamp(self) -> bytes:
        """Return the wall clock's time as RFC 3339 with nanoseconds and the local offset."""
        second, nanosecond = divmod(time_ns(), 1_000_000_000)
        if second != self._second:
            self._turn(second)
        return b"%s.%09d%s" % (self._head, nanosecond, self._zone)

    def _turn(self, second: int) -> None:
        text = strftime("%Y-%m-%dT%H:%M:%S%z", localtime(second)).encode()
        self._second, self._head, self._zone = second, text[:-5], text[-5:-2] + b":" + text[-2:]


class Encoder:
    """One stream's bytes in, whole records out."""

    __slots__ = ("_partial", "label", "rest")

    def __init__(self, stream: str) -> None:
        self.label = f" {stream} F ".encode()
        self._partial = f" {stream} P ".encode()
        self.rest = b""

    def feed(self, chunk: bytes, stamp: bytes, *, more: bool) -> Records:
        """Return the records of `chunk`. `more`: the source holds further bytes, so a line begun may wait."""
        cut = chunk.rfind(b"\n") + 1
        if not cut:
            return self._begin(self.rest + chunk, stamp, more=more)
        begun, self.rest = self.rest, b""
        if _has_long_line(chunk, cut, len(begun)):
            lines: Records = [self._line(line, stamp) for line in (begun + chunk[: cut - 1]).split(b"\n")]
        else:
            lines = self._lines(begun, chunk, cut, stamp)
        return lines if cut == len(chunk) else lines + self._begin(chunk[cut:], stamp, more=more)

    def finish(self, stamp: bytes) -> Records:
        """Return the record of what is left at the stream's end."""
        rest, self.rest = self.rest, b""
        return self._pieces(rest, stamp)

    def _begin(self, text: bytes, stamp: bytes, *, more: bool) -> Records:
        """Keep the beginning of a line, or write as much of it as must be written."""
        keep = len(text) % LINE_LIMIT if more else 0
        cut = len(text) - keep
        self.rest = text[cut:]
        return self._pieces(text[:cut], stamp) if cut else []

    def _lines(self, begun: bytes, chunk: bytes, cut: int, stamp: bytes) -> Records:
        # The hot path: one pass over the bytes. What replace() put after the last newline, and the line
        # begun behind it, are cut off without a copy.
        head = stamp + self.label
        body = memoryview(chunk.replace(b"\n", b"\n" + head))
        return [head, begun, body[: len(body) - len(head) - (len(chunk) - cut)]]

    def _line(self, line: bytes, stamp: bytes) -> bytes:
        # The last piece is never empty unless the line is: F carries the remainder.
        cut = max(0, len(line) - 1) // LINE_LIMIT * LINE_LIMIT
        return b"".join((*self._pieces(line[:cut], stamp), stamp, self.label, line[cut:], b"\n"))

    def _pieces(self, text: bytes, stamp: bytes) -> Records:
        head = stamp + self._partial
        return [b"%s%s\n" % (head, text[at : at + LINE_LIMIT]) for at in range(0, len(text), LINE_LIMIT)]


def _has_long_line(chunk: bytes, end: int, begun: int) -> bool:
    """True if a line that ends before `end` is longer than LINE_LIMIT. Jumps in strides, not line by line.

    `begun` bytes of the first line came before the chunk.
    """
    start = -begun
    while end - start > LINE_LIMIT + 1:
        newline = chunk.rfind(b"\n", max(0, start), start + LINE_LIMIT + 1)
        if newline < 0:
            return True
        start = newline + 1
    return False


def _say_nothing(_event: str, **_fields: object) -> None:
    """Nobody to tell."""


class LogFile:
    """A file that `stdio.open_log` opened, -1 for none. Takes it over.

    `written` and `dropped` count bytes of records. `failing`: the last bytes could not be written.
    """

    __slots__ = ("_fd", "_torn", "dropped", "failing", "trouble", "written")

    def __init__(self, fd: int, trouble: Trouble = _say_nothing) -> None:
        self.written = 0
        self.dropped = 0
        self.failing = False
        self.trouble = trouble
        self._torn = b""  # the end of a record whose beginning is in the file
        self._fd = fd

    def append(self, data: bytes) -> None:
        """`write` in few words, as long as the file takes everything."""
        if self._fd < 0 or self._torn or self.failing:
            self.write([data])
            return
        try:
            done = write(self._fd, data)
        except OSError:
            done = 0
        self.written += done
        if done < len(data):
            self._go_on(data, done)

    def _go_on(self, data: bytes, begun: int) -> None:
        done = begun + self._write([data[begun:]], len(data) - begun)
        self.written += done - begun
        if done < len(data):
            self._cut(data, done)

    def write(self, records: Records) -> None:
        """Append whole records. What does not fit is dropped at a record's border, and counted."""
        if self._fd < 0 or not records:
            return
        if self._torn:
            records = [self._torn, *records]
        size = sum(map(len, records))
        done = self._write(records, size)
        self.written += done
        if done == size:
            self._torn = b""
            self._mend()
        else:
            self._cut(b"".join(records), done)

    def _write(self, records: Records, size: int) -> int:
        done = 0
        try:
            done = os.writev(self._fd, records)
            while done < size:
                done += write(self._fd, b"".join(records)[done:])
        except OSError as error:
            self._fail(error)
        return done

    def _cut(self, data: bytes, done: int) -> None:
        # Finish the record that is half in the file as soon as the file takes bytes again.
        begun = (done > 0 and data[done - 1] != 0x0A) or (done == 0 and bool(self._torn))
        end = data.index(b"\n", done) + 1 if begun else done
        self._torn = data[done:end]
        self.dropped += len(data) - end

    def _fail(self, error: OSError) -> None:
        if not self.failing:
            self.failing = True
            self.trouble("log cannot be written", error=error)

    def _mend(self) -> None:
        if self.failing:
            self.failing = False
            self.trouble("log is written again", bytes_dropped=self.dropped)

    def replace(self, fd: int) -> None:
        """Go on in another file, between two records. Takes it over."""
        self.finish()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def finish(self) -> None:
        """Write what is left of a record that is half in the file, or drop it."""
        if self._torn:
            self._finish_torn()

    def _finish_torn(self) -> None:
        torn, self._torn = self._torn, b""
        done = self._write([torn], len(torn))
        self.written += done
        self.dropped += len(torn) - done

    def close(self) -> None:
        """Bring the file to the disk and close it. Trouble is logged."""
        if self._fd < 0:
            return
        self.finish()
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS):  # what is no regular file has no disk
                self._fail(error)
        os.close(self._fd)
        self._fd = -1


class LoggedStream:
    """A container's stdout or stderr on its way into the log."""

    __slots__ = ("_file", "clock", "encoder", "label")

    def __init__(self, name: str, clock: Clock, file: LogFile) -> None:
        self.clock = clock
        self.encoder = Encoder(name)
        self.label = self.encoder.label  # of a whole line
        self._file = file

    def take(self, chunk: bytes, more: bool) -> None:
        """Log a chunk."""
        self._file.write(self.encoder.feed(chunk, self.clock.stamp(), more=more))

    def finish(self) -> None:
        """Log what was begun."""
        self._file.write(self.encoder.finish(self.clock.stamp()))
