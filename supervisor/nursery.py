"""Runs in: the supervisor, and in the nursery, a quiet child of it that forks the monitors.

Every page that the supervisor writes between two forks is one that the monitors forked before do not share
with those after. It is forked when the first monitor is wanted, has made ready what all need, and
executes nothing but its few lines; its monitors share nearly everything. It forks twice, so that a monitor is
the supervisor's child. It ends with the supervisor; when it fails, the next monitor gets a new one.
"""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ipc.log import Log
from supervisor import spawn
from supervisor.worker import Ground

ANSWER_TIMEOUT = 10.0  # seconds; the supervisor waits for it
WORDS_LIMIT = 4096
_PID_LIMIT = 16

#: What a child does: with the words and the descriptors of its request, and what was prepared.
Birth = Callable[[Any, Sequence[str], Sequence[int]], object]


class Nursery:
    """The supervisor's side. `prepare` and `birth` run in the nursery and in its children."""

    def __init__(self, ground: Ground, prepare: Callable[[], Any], birth: Birth) -> None:
        self._ground = ground
        self._prepare = prepare
        self._birth = birth
        self._sock: socket.socket | None = None
        self._pid = 0

    def fork(self, words: Sequence[str], fds: Sequence[int]) -> int:
        """Return the pid of a new child, which gets the words and the descriptors. Raises OSError."""
        if self._sock is None:
            self._open()
        assert self._sock is not None
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            self._sock.sendmsg(["\0".join(words).encode()], rights)
            if not select.select([self._sock], [], [], ANSWER_TIMEOUT)[0]:
                raise TimeoutError("the nursery does not answer")
            return int(self._sock.recv(_PID_LIMIT))
        except (OSError, ValueError) as error:
            self.close()
            raise OSError(f"the nursery has failed: {error}") from error

    def _open(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = Log("nursery", sink=self._ground.log_socket)

        def work() -> None:
            _nurse(theirs, self._prepare(), self._birth, log)

        with theirs:
            child = spawn.fork(spawn.Job("bulkhead: nursery", work, log, [theirs.fileno()]))
        self._pid = child.pid
        self._ground.reaper.watch(child.pid, lambda code: self._ended(child.pid, code))
        child.open_gate()
        self._sock = ours

    def _ended(self, pid: int, code: int) -> None:
        self._ground.log.warning("nursery ended", pid_of=pid, code=code)
        if pid == self._pid:
            self.close()

    def close(self) -> None:
        """End it; monitors live on. The next fork makes a new one."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            self._pid = 0


def _nurse(sock: socket.socket, prepared: Any, birth: Birth, log: Log) -> None:
    """The nursery's life: one request after the other, until the supervisor closes."""
    spawn.freeze()
    sock.setblocking(True)
    room = socket.CMSG_SPACE(4 * 4)
    while True:
        data, ancillary, _, _ = sock.recvmsg(WORDS_LIMIT, room, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return
        fds = list(memoryview(ancillary[0][2]).cast("i"))
        spawn.grandchild(partial(_born, sock, data, fds, lambda words, fds: birth(prepared, words, fds)), log)
        for fd in fds:
            os.close(fd)


def _born(
    sock: socket.socket, data: bytes, fds: list[int], birth: Callable[[list[str], list[int]], object]
) -> None:
    sock.send(b"%d" % os.getpid())
    os.close(sock.fileno())
    os.setsid()
    birth(data.decode().split("\0"), fds)
