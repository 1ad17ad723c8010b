"""Runs in: the monitor.

The container's output: read ends of its pipes or the master of its terminal, and where their bytes go.
One read a turn and source, so that a loud container leaves the rest of the monitor alive. After the
container's end the sources are drained as long as bytes come, but not for ever: a process outside may hold
the other end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Callable, Sequence

from ipc.loop import Loop, Timer

PIPE_BYTES = 256 * 1024
READ_BYTES = 64 * 1024  # at once: with its records it stays below what malloc maps and unmaps each time
QUIET = 0.25  # seconds without a byte after which a drained source is given up
DRAIN_LIMIT = 2.0  # seconds of draining, bytes or not
LOG_MODE = 0o640
DIRECTORY_MODE = 0o755
#: No link is followed: what lies at a log's place may have come there by a pod that writes in that directory.
_LOG_FLAGS = (
    os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW
)
_INT = struct.Struct("i")

Take = Callable[[bytes, bool], object]


#: uid and gid on the host.
Owner = tuple[int, int]


def make_pipe(size: int = PIPE_BYTES, owner: Owner = (0, 0)) -> tuple[int, int]:
    """Return (read end, write end), close-on-exec, of `size` where the kernel allows. Raises OSError.

    `owner` may open it again by /dev/stdout. Runtimes see to that, but not each of them in every case.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    if owner != (0, 0):
        os.fchown(write_fd, *owner)
    os.set_blocking(read_fd, False)
    with contextlib.suppress(PermissionError):  # over pipe-max-size or the user's share: the default serves
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, size)
    return read_fd, write_fd


def waiting_bytes(fd: int) -> int:
    """Return how many bytes can be read from a pipe or terminal now."""
    try:
        return int(_INT.unpack(fcntl.ioctl(fd, termios.FIONREAD, _INT.pack(0)))[0])
    except OSError:
        return 0


class Source:
    """One descriptor being read. `take(chunk, more)` gets its bytes, `ended` is called at its end."""

    def __init__(self, loop: Loop, fd: int, take: Take, ended: Callable[[], object]) -> None:
        self.fd = fd
        self.open = True
        self.last_byte = loop.time()
        self._loop = loop
        self._take = take
        self._ended = ended
        loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        try:
            chunk = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: the last process left the terminal
            chunk = b""
        if not chunk:
            self.close()
            return
        self.last_byte = self._loop.time()
        # Only a line begun asks whether the source has its rest.
        self._take(chunk, not chunk.endswith(b"\n") and waiting_bytes(self.fd) > 0)

    def close(self) -> None:
        """Stop reading, close the descriptor, tell. May be called again."""
        if self.open:
            self.open = False
            self._loop.remove_reader(self.fd)
            os.close(self.fd)
            self._ended()


class Drain:
    """Waits, after a process ended, until its sources end, fall silent or have had their time."""

    def __init__(self, loop: Loop, sources: Sequence[Source], done: Callable[[], object]) -> None:
        self._loop = loop
        self._sources = sources
        self._done = done
        self._since = loop.time()
        self._timer: Timer | None = None
        self._over = False
        self.check()

    def check(self) -> None:
        """Look again; also to be called when a source has ended."""
        if self._over:
            return
        if self._timer is not None:
            self._timer.cancel()
        left = self._left()
        if left > 0:
            self._timer = self._loop.call_later(left, self.check)
            return
        self._over = True
        for source in self._sources:
            source.close()
        self._loop.call_soon(self._done)

    def _left(self) -> float:
        alive = [source.last_byte for source in self._sources if source.open]
        if not alive:
            return 0.0
        quiet_until = max(self._since, *alive) + QUIET
        return min(quiet_until, self._since + DRAIN_LIMIT) - self._loop.time()


def open_log(path: str) -> int:
    """Open the log file, make it and its directory if they are not there. Raises OSError."""
    os.makedirs(os.path.dirname(path), mode=DIRECTORY_MODE, exist_ok=True)
    return os.open(path, _LOG_FLAGS, LOG_MODE)
