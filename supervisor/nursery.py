"""Runs in: the supervisor, and in the nursery, a quiet child of it that forks the monitors and the pod inits.

Every page that the supervisor writes between two forks is one that those forked before do not share with
those after. The nursery is forked when the first of them is wanted, has made ready what all need, and
executes nothing but its few lines; its children share nearly everything. It forks twice, so that they are
the supervisor's children. It ends with the supervisor; when it fails, the next that is wanted gets a new one.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Mapping, Sequence

from ipc.kernel import bare_fork
from ipc.log import Log
from supervisor import spawn
from supervisor.worker import Ground

ANSWER_TIMEOUT = 10.0  # seconds; the supervisor waits for it
WORDS_LIMIT = 4096
_PID_LIMIT = 16
_ROOM = socket.CMSG_SPACE(3 * struct.calcsize("i"))
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)

#: What a child does, with the words and the two or three descriptors of its request.
Life = Callable[[Sequence[str], Sequence[int]], object]


class Nursery:
    """The supervisor's side. `pid`: of the process, 0 while there is none."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._prepares: list[Callable[[], object]] = []
        self._lives: dict[str, Life] = {}
        self._sock: socket.socket | None = None
        self.pid = 0

    def add(self, kind: str, life: Life, prepare: Callable[[], object]) -> None:
        """Before the first fork: what children of a kind do, and in the nursery what makes them ready.

        What prepares last leaves its children the smallest.
        """
        self._lives[kind] = life
        self._prepares.append(prepare)

    def fork(self, words: Sequence[str], fds: Sequence[int]) -> int:
        """Return the pid of a new child, whose kind is the first of the words. Raises OSError."""
        pid = self._ask(words, fds) or self._ask(words, fds)  # one that is dead gets a successor at once
        if not pid:
            raise OSError("two nurseries died over a request")
        return pid

    def _ask(self, words: Sequence[str], fds: Sequence[int]) -> int:
        """Return the pid; 0 if the nursery has died, and then no child was born: it would hold the socket."""
        sock = self._sock or self._open()
        try:
            rights = struct.pack(f"{len(fds)}i", *fds)
            sock.sendmsg(["\0".join(words).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            if not select.select([sock], [], [], ANSWER_TIMEOUT)[0]:
                self.kill()
                raise TimeoutError("the nursery does not answer")
            answer = sock.recv(_PID_LIMIT)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        if not answer:
            self.close()
        return int(answer or 0)

    def kill(self) -> None:
        """End it though it hangs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # it is not reaped yet, or `_ended` would have closed
        self.close()

    def end(self) -> None:
        """End it and see it gone: systemd starts no service in whose group somebody is left."""
        pid = self.pid
        if pid:
            self.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _open(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = Log("nursery", sink=self._ground.log_socket)

        def work() -> None:
            _nurse(theirs, self._prepares, self._lives, log)

        with theirs:
            child = spawn.fork(spawn.Job("bulkhead: nursery", work, log, [theirs.fileno()]))
        self.pid = child.pid
        self._ground.reaper.watch(child.pid, lambda code: self._ended(child.pid, code))
        child.open_gate()
        self._sock = ours
        return ours

    def _ended(self, pid: int, code: int) -> None:
        self._ground.log.warning("nursery ended", pid_of=pid, code=code)
        if pid == self.pid:
            self.close()

    def close(self) -> None:
        """End it; monitors live on. The next fork makes a new one."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            self.pid = 0


def _nurse(
    sock: socket.socket, prepares: Sequence[Callable[[], object]], lives: Mapping[str, Life], log: Log
) -> None:
    """The nursery's life: one request after the other, until the supervisor closes.

    In one function and few words: whatever it touches, no two of its children share.
    """
    spawn.freeze()
    for prepare in prepares:
        prepare()
    sock.setblocking(True)
    receive, send, sock_fd = sock.recvmsg, sock.send, sock.fileno()
    while True:
        data, ancillary, _, _ = receive(WORDS_LIMIT, _ROOM, _CLOEXEC)
        if not data:
            return
        fds = struct.unpack(f"{len(ancillary[0][2]) // 4}i", ancillary[0][2])
        pid = bare_fork()
        if pid:
            os.waitpid(pid, 0)
            for fd in fds:
                os.close(fd)
            continue
        status = spawn.BUG_STATUS
        try:
            if bare_fork():
                os._exit(0)
            send(b"%d" % os.getpid())
            os.close(sock_fd)
            words = data.decode().split("\0")
            lives[words[0]](words, fds)
            status = 0
        except BaseException as error:  # noqa: BLE001 - a child never runs its parent's clean-up
            log.bug("process ended by a bug", error)
        finally:
            os._exit(status)
