"""Runs in: the supervisor, and in the nursery, a quiet child of it that forks the monitors and the pod inits.

Every page that the supervisor writes between two forks is one that those forked before do not share with
those after. The nursery is forked when the first of them is wanted, has made ready what all need, and
executes nothing but its few lines; its children share nearly everything. It forks twice, so that they are
the supervisor's children. It lives in the monitors' group, so that no monitor is ever in another: whoever
kills everything in the service's groups at any moment kills none. It ends with the supervisor; when it fails,
the next that is wanted gets a new one.
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

FIRST_TIMEOUT = 10.0  # seconds until the first answer, for which it makes itself ready
ANSWER_TIMEOUT = 2.0  # seconds until any other; the supervisor waits for it, and so does everybody else
LAST_WORD = 1.0  # seconds that a child has, which a nursery forked just before it was killed
WORDS_LIMIT = 4096
_PID_LIMIT = 16
_ROOM = socket.CMSG_SPACE(3 * struct.calcsize("i"))
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)

#: What a child does, with the words and the two or three descriptors of its request.
Life = Callable[[Sequence[str], Sequence[int]], object]
#: What is done, in a process of its own, before a child begins: with its pid, and the descriptors.
Birth = Callable[[int, Sequence[int]], object]


def _nothing(_pid: int, _fds: Sequence[int]) -> None:
    """No birth needs a word."""


class Nursery:
    """The supervisor's side. `pid`: of the process, 0 while there is none."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._prepares: list[Callable[[], object]] = []
        self._lives: dict[str, tuple[Birth, Life]] = {}
        self._ready = False  # it has answered once
        self._sock: socket.socket | None = None
        self.pid = 0

    def add(self, kind: str, life: Life, prepare: Callable[[], object], birth: Birth = _nothing) -> None:
        """Before the first fork: what children of a kind do, in the nursery what makes them ready, and
        between the two forks what nobody may find undone, whoever dies.

        What prepares last leaves its children the smallest.
        """
        self._lives[kind] = birth, life
        self._prepares.append(prepare)

    def fork(self, words: Sequence[str], fds: Sequence[int]) -> int:
        """Return the pid of a new child, whose kind is the first of the words. Raises OSError."""
        # One that is dead, or that hangs, gets a successor at once.
        pid = self._ask(words, fds) or self._ask(words, fds)
        if not pid:
            raise OSError("two nurseries died over a request")
        return pid

    def _ask(self, words: Sequence[str], fds: Sequence[int]) -> int:
        """Return the pid; 0 if the nursery has died, and then no child was born: it would hold the socket."""
        sock = self._sock or self._open()
        try:
            rights = struct.pack(f"{len(fds)}i", *fds)
            sock.sendmsg(["\0".join(words).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            answer = self._answer(sock)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        if not answer:
            self.close()
        return int(answer or 0)

    def _answer(self, sock: socket.socket) -> bytes:
        """Return the nursery's answer, b"" if it has died."""
        patience = ANSWER_TIMEOUT if self._ready else FIRST_TIMEOUT
        if not select.select([sock], [], [], patience)[0]:
            self._ground.log.warning("nursery hangs and is killed", pid_of=self.pid, seconds=patience)
            os.kill(self.pid, signal.SIGKILL)
            # It forks no more. A child that it has forked says its number now, or has no socket.
            if not select.select([sock], [], [], LAST_WORD)[0]:
                self.close()
                raise TimeoutError("the nursery does not answer")
        self._ready = True
        return sock.recv(_PID_LIMIT)

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
        self.pid, self._ready = child.pid, False
        self._ground.reaper.watch(child.pid, lambda code: self._ended(child.pid, code))
        self._place(child.pid)
        child.open_gate()
        self._sock = ours
        return ours

    def _place(self, pid: int) -> None:
        groups = self._ground.groups
        groups.make(groups.monitors)
        with contextlib.suppress(ProcessLookupError):
            groups.enter(groups.monitors, pid)

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
    sock: socket.socket,
    prepares: Sequence[Callable[[], object]],
    lives: Mapping[str, tuple[Birth, Life]],
    log: Log,
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
            words = data.decode().split("\0")
            birth, life = lives[words[0]]
            gate, opener = os.pipe()
            pid = bare_fork()
            if pid:
                os.close(sock_fd)  # if this process dies, nobody answers
                birth(pid, fds)
                os.write(opener, b".")
                os._exit(0)
            os.close(opener)
            if os.read(gate, 1):
                send(b"%d" % os.getpid())
                os.close(gate)
                os.close(sock_fd)
                life(words, fds)
            status = 0
        except BrokenPipeError:  # nobody waits for it any more
            status = spawn.GATE_STATUS
        except BaseException as error:  # noqa: BLE001 - a child never runs its parent's clean-up
            log.bug("process ended by a bug", error)
        finally:
            os._exit(status)
