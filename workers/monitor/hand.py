"""Runs in: a hand of the monitor, a child that the keeper forks when somebody connects.

It serves everybody who connects while it lives, with the table of workers/monitor/main.py over a Container,
and ends when nobody is connected and nothing is under way; the next one begins where `state.json` stands.
There is one at a time, so there is one writer of that. It dies with the keeper; when it dies alone, the calls
it served are lost and nothing else is.
"""

from __future__ import annotations

import _socket
import array
import os
import socket
from collections import deque
from collections.abc import Callable

import msgspec

from ipc.fds import close_all
from ipc.loop import Loop
from ipc.messages.monitor import ExitRecord
from workers.monitor import heir
from workers.monitor import link as k
from workers.monitor.container import Container
from workers.monitor.link import Taken

FIRST_WAIT = 1.0  # seconds for the connection it was forked for; it may be gone again
LAST_WORDS = 3.0  # seconds after the end for those who attached to take what waits for them
_ROOM = socket.CMSG_SPACE(4 * 4)
_RECORD = msgspec.json.Decoder(ExitRecord)
PATIENCE = 20  # seconds that its loop may stand still (a path on a dead mount, say) before the kernel ends it


class KeeperLink:
    """The keeper, from a hand."""

    def __init__(self, loop: Loop, sock: _socket.socket, vault_fd: int) -> None:
        self.over = False
        self._vault_fd = vault_fd
        self._loop = loop
        self._sock = sock
        self._asked: deque[Callable[[bytes, list[int]], object]] = deque()
        self._container: Container | None = None
        sock.setblocking(False)

    def serve(self, container: Container) -> None:
        """Begin to listen to the keeper, for this container."""
        self._container = container
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._container is not None
        try:
            data, fds = self._receive()
        except BlockingIOError:
            return
        kind, rest = data[:1], data[1:]
        if kind == k.ANSWER:
            self._asked.popleft()(rest, fds)
        elif kind == k.ENDED:
            self._container.init_ended()
        elif kind == k.RECORD:
            self._container.tell(_RECORD.decode(rest))
        elif kind in (k.OVER, b""):
            self.over = True

    def _receive(self) -> tuple[bytes, list[int]]:
        data, ancillary, _, _ = self._sock.recvmsg(k.PACKET, _ROOM, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for _level, _type, raw in ancillary:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        return data, fds.tolist()

    def _say(self, data: bytes, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([data], rights)
        finally:
            close_all(fds)

    def secure(self, what: Taken, fds: list[int]) -> None:
        """As Link has it."""
        if self._vault_fd >= 0:
            heir.deposit(self._vault_fd, what, fds)

    def take(self, what: Taken, fds: list[int]) -> None:
        """As Link has it."""
        *numbers, memory = what
        self._say(k.TAKE + k.TAKEN.pack(*numbers) + memory.encode(), fds)

    def reopen(self, fd: int, done: Callable[[], object]) -> None:
        """As Link has it."""
        self._asked.append(lambda _data, _fds: done())
        self._say(k.REOPEN, [fd])

    def count(self, done: Callable[[int, int], object]) -> None:
        """As Link has it."""
        self._asked.append(lambda data, _fds: done(*k.COUNTS.unpack(data)))
        self._say(k.COUNT, [])

    def stdio(self, done: Callable[[int, int], object]) -> None:
        """As Link has it."""

        def given(data: bytes, fds: list[int]) -> None:
            fd = fds[0] if fds else -1
            done(*((fd, -1) if data == b"\1" else (-1, fd)))

        self._asked.append(given)
        self._say(k.STDIO, [])

    def feed(self, fd: int) -> None:
        """As Link has it."""
        self._say(k.FEED, [fd])

    def shut_stdin(self) -> None:
        """As Link has it."""
        self._say(k.SHUT, [])
        if self._vault_fd >= 0:
            heir.without_stdin(self._vault_fd)

    def go(self) -> None:
        """As Link has it."""
        self._say(k.GO, [])

    def leave(self) -> None:
        """As Link has it."""
        self._say(k.LEAVE, [])
        self.over = True


def shed(keep: set[int]) -> None:
    """Close what is the keeper's: another holder of a lock, a pipe or a log would outlive it."""
    low = 3
    for fd in sorted(fd for fd in keep if fd >= 3):
        if low < fd:
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 20)
