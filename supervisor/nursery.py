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

from ipc.fds import close_all
from ipc.kernel import bare_fork
from ipc.log import Log
from supervisor import spawn
from supervisor.worker import Ground

FIRST_TIMEOUT = 10.0  # seconds until the first answer, for which it makes itself ready
ANSWER_TIMEOUT = 2.0  # seconds until any other; the supervisor waits for it, and so does everybody else
LAST_WORD = 1.0  # seconds that a child has which was asked just before its nursery was killed
REST = 0.1  # seconds after a request, when the next child is forked: others are busy with this one until then
HURRY = b"."  # a request for a child to be forked now
WORDS_LIMIT = 4096
_PID_LIMIT = 16
_FDS = struct.Struct("4i")  # at most: two or three of the request, and the pipe for the answer
_ROOM = socket.CMSG_SPACE(_FDS.size)
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)

#: What a child does, with the words and the two or three descriptors of its request.
Life = Callable[[Sequence[str], Sequence[int]], object]
#: Makes ready what all children of a kind need, in the nursery, and returns their life. A function with all
#: that it needs around it: every attribute that it had to look up would be pages of its own to each child.
Prepare = Callable[[], Life]
#: What is done before a child begins: with its pid, and the descriptors.
Birth = Callable[[int, Sequence[int]], object]


def _nothing(_pid: int, _fds: Sequence[int]) -> None:
    """No birth needs a word."""


def readable(fd: int, seconds: float) -> bool:
    """Wait until a descriptor can be read; False if it cannot after so long.

    By poll(2): select(2) knows no descriptor above 1023, and the supervisor has one for each monitor.
    """
    return bool(_poll_of(fd).poll(int(seconds * 1000)))


def _poll_of(fd: int) -> select.poll:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return poll


class Nursery:
    """The supervisor's side. `pid`: of the process, 0 while there is none."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._prepares: dict[str, Prepare] = {}
        self._births: dict[str, Birth] = {}
        self._ready = False  # it has answered once
        self._waiting = 0  # pid of the last child that has begun to wait for a request
        self._sock: socket.socket | None = None
        self.pid = 0

    def add(self, kind: str, prepare: Prepare, birth: Birth = _nothing) -> None:
        """Before the first fork: what children of a kind do, and here what nobody may find undone, whoever
        dies: it is done before a child can begin.

        What prepares last leaves its children the smallest.
        """
        self._prepares[kind], self._births[kind] = prepare, birth

    def fork(self, words: Sequence[str], fds: Sequence[int]) -> int:
        """Return the pid of a new child, whose kind is the first of the words. Raises OSError."""
        # One that is dead, or that hangs, gets a successor at once.
        pid = self._ask(words, fds) or self._ask(words, fds)
        if not pid:
            raise OSError("two nurseries died over a request")
        return pid

    def _ask(self, words: Sequence[str], fds: Sequence[int]) -> int:
        """Return the pid; 0 if nursery or child has died, and then no child lives: it would have answered."""
        sock = self._sock or self._open()
        answer_fd, theirs = os.pipe2(os.O_CLOEXEC)
        answer = b""
        try:
            pid = self._await_child(sock)
            if pid:
                self._births[words[0]](pid, fds)
                rights = struct.pack(f"{len(fds) + 1}i", *fds, theirs)
                sock.sendmsg(["\0".join(words).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                os.close(theirs)
                theirs = -1
                answer = self._patient(answer_fd) and os.read(answer_fd, _PID_LIMIT)
                self._waiting = 0
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            close_all([answer_fd, *([theirs] if theirs >= 0 else [])])
        if not answer:
            self.close()
        return int(answer or 0)

    def _await_child(self, sock: socket.socket) -> int:
        """Return the pid of the child that waits for a request, 0 if nobody forks one. Raises OSError."""
        self._hear()
        if not self._waiting:
            sock.send(HURRY)
            if self._patient(sock.fileno()):
                self._hear()
        return self._waiting

    def _hear(self) -> None:
        """Take note of the child that waits; each has told its pid."""
        assert self._sock is not None
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while told := self._sock.recv(_PID_LIMIT, socket.MSG_DONTWAIT):
                self._waiting = int(told)

    def _patient(self, fd: int) -> bytes:
        """Wait until there is something to read. A nursery that hangs is killed; b"" if nothing came then."""
        patience = ANSWER_TIMEOUT if self._ready else FIRST_TIMEOUT
        if not readable(fd, patience):
            self._ground.log.warning("nursery hangs and is killed", pid_of=self.pid, seconds=patience)
            os.kill(self.pid, signal.SIGKILL)
            # It forks no more. A child that has taken the request answers now, or dies.
            if not readable(fd, LAST_WORD):
                return b""
        self._ready = True
        return b"."

    def kill(self) -> None:
        """End it though it hangs."""
        self.close()

    def end(self) -> None:
        """End it and see it gone, and the child that waits in it: a group with somebody in it stays."""
        pid = self.pid
        if pid:
            self._hear()
            self.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            if self._waiting:
                _await_end(self._waiting)

    def _open(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log = Log("nursery", sink=self._ground.log_socket)

        def work() -> None:
            _nurse(theirs, self._prepares, log)

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
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # it is not reaped yet, or `_ended` would have closed
            self._sock.close()
            self._sock = None
            self.pid = 0


def _nurse(sock: socket.socket, prepares: Mapping[str, Prepare], log: Log) -> None:
    """The nursery's life: one child after the other, until the supervisor ends it.

    A child takes its request itself: it is forked ahead and waits at the supervisor's socket; the next one is
    forked when it has told, through a pipe, that it has taken one, and a moment later, unless another request
    is there. In one function and few words: whatever it touches, no two of its children share; and what is
    looked up before the fork is not looked up in each of them.
    """
    spawn.freeze()
    lives = {kind: prepare() for kind, prepare in prepares.items()}
    sock.setblocking(True)
    taken, takers = os.pipe()
    sock_fd, rest_ms, fds_bytes = sock.fileno(), int(REST * 1000), _FDS.size
    rest, send, receive, unpack = _poll_of(sock_fd).poll, sock.send, sock.recvmsg, _FDS.unpack
    getpid, write, close = os.getpid, os.write, os.close
    while True:
        pid = bare_fork()
        if not pid:
            break
        os.waitpid(pid, 0)
        os.read(taken, 1)
        rest(rest_ms)
    status = spawn.BUG_STATUS
    try:
        if bare_fork():  # the supervisor becomes the parent of the other one
            os._exit(0)
        close(taken)
        send(b"%d" % getpid())
        data = HURRY
        while data == HURRY:
            data, ancillary, _, _ = receive(WORDS_LIMIT, _ROOM, _CLOEXEC)
        if data:
            write(takers, b".")
            close(takers)
            close(sock_fd)
            raw = ancillary[0][2]
            fds = unpack(raw.ljust(fds_bytes, b"\0"))[: len(raw) // 4]
            words = data.decode().split("\0")
            write(fds[-1], b"%d" % getpid())
            close(fds[-1])
            lives[words[0]](words, fds[:-1])
        status = 0
    except BrokenPipeError:  # nobody waits for it any more
        status = spawn.GATE_STATUS
    except BaseException as error:  # noqa: BLE001 - a child never runs its parent's clean-up
        log.bug("process ended by a bug", error)
    finally:
        os._exit(status)


def _await_end(pid: int) -> None:
    """Wait for the end of a child that nobody can ask any more."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        readable(pidfd, LAST_WORD)
        os.close(pidfd)
