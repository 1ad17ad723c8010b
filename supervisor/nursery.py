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
from _socket import SocketType, socketpair
from collections.abc import Callable, Mapping, Sequence

from ipc.fds import close_all
from ipc.kernel import bare_fork
from ipc.log import Log
from supervisor import spawn
from supervisor.worker import Ground

FIRST_TIMEOUT = 10.0  # seconds until the first answer, for which it makes itself ready
ANSWER_TIMEOUT = 2.0  # seconds until any other; the supervisor waits for it, and so does everybody else
LAST_WORD = 1.0  # seconds that a child has which was asked just before its nursery was killed
REST = (
    0.05  # seconds after a request, when the next child is forked: others are busy with this one until then
)
WORDS_LIMIT = 4096
SELF = "self"  # before the words, if the child itself does what its birth takes
_PID_LIMIT = 16
_ROOM = socket.CMSG_SPACE(4 * struct.calcsize("i"))
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)

#: What a child does, with the words and the two or three descriptors of its request.
Life = Callable[[Sequence[str], Sequence[int]], object]
#: What is done in a child before it begins and anybody knows it: with its pid, and the descriptors.
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
        self._prepares: list[Callable[[], object]] = []
        self._lives: dict[str, tuple[Birth, Life]] = {}
        self._ready = False  # it has answered once
        self._answered = 0  # pid of the last that has answered a request
        self._waiting = 0  # pid of the last child that has begun to wait for a request
        self._sock: socket.socket | None = None
        self.pid = 0

    def add(self, kind: str, life: Life, prepare: Callable[[], object], birth: Birth = _nothing) -> None:
        """Before the first fork: what children of a kind do, in the nursery what makes them ready, and
        before the answer what nobody may find undone, whoever dies.

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
        """Return the pid; 0 if nursery or child has died, and then no child lives: it would have answered."""
        sock = self._sock or self._open()
        self._hear()
        answer_fd, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            birth, expected, self._waiting = self._lives[words[0]][0], self._waiting, 0
            if expected:  # done here: a child that does it has more pages of its own
                birth(expected, fds)
            else:
                words = [SELF, *words]
            rights = struct.pack(f"{len(fds) + 1}i", *fds, theirs)
            sock.sendmsg(["\0".join(words).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            os.close(theirs)
            theirs = -1
            answer = self._answer(answer_fd)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        finally:
            close_all([answer_fd, *([theirs] if theirs >= 0 else [])])
        if not answer:
            self.close()
        self._answered = int(answer or 0)
        if expected and answer and self._answered != expected:  # that was a child of the nursery before
            birth(self._answered, fds)
        return self._answered

    def _hear(self) -> None:
        """Take note of the child that waits; each has told its pid."""
        assert self._sock is not None
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while told := self._sock.recv(_PID_LIMIT, socket.MSG_DONTWAIT):
                # Who was forked for a request told it too, and waits no more.
                self._waiting = int(told) if int(told) != self._answered else self._waiting

    def _answer(self, fd: int) -> bytes:
        """Return the child's answer, b"" if there is none to come."""
        patience = ANSWER_TIMEOUT if self._ready else FIRST_TIMEOUT
        if not readable(fd, patience):
            self._ground.log.warning("nursery hangs and is killed", pid_of=self.pid, seconds=patience)
            os.kill(self.pid, signal.SIGKILL)
            # It passes nothing on any more. A child that it has passed this on to answers now, or dies.
            if not readable(fd, LAST_WORD):
                self.close()
                raise TimeoutError("the nursery does not answer")
        self._ready = True
        return os.read(fd, _PID_LIMIT)

    def kill(self) -> None:
        """End it though it hangs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # it is not reaped yet, or `_ended` would have closed
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

    In one function and few words: whatever it touches, no two of its children share. One child waits, forked
    while nobody else did, at one end of a socketpair; the nursery passes the next request on to it. If the
    nursery is gone before it did, so is the child.
    """
    spawn.freeze()
    for prepare in prepares:
        prepare()
    sock.setblocking(True)
    there, here = socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receive, sock_fd, there_fd = sock.recvmsg, sock.fileno(), there.fileno()
    poll, rest_ms = _poll_of(sock_fd).poll, int(REST * 1000)
    waiting = False
    while True:
        data = b""
        if waiting or poll(rest_ms):
            data, ancillary, _, _ = receive(WORDS_LIMIT, _ROOM, _CLOEXEC)
            if not data:
                return
        if not waiting:
            pid = bare_fork()
            if not pid:
                os.close(there_fd)
                if data:  # what came with the request is passed on
                    for (fd,) in struct.iter_unpack("i", ancillary[0][2]):
                        os.close(fd)
                _be_born(here, sock_fd, lives, log)
            os.waitpid(pid, 0)
            waiting = True
        if data:
            there.sendmsg([data], ancillary)
            waiting = False
            for (fd,) in struct.iter_unpack("i", ancillary[0][2]):
                os.close(fd)


def _be_born(here: SocketType, sock_fd: int, lives: Mapping[str, tuple[Birth, Life]], log: Log) -> None:
    """Fork once more, so that the supervisor is the parent, wait for a request, live. Does not return."""
    status = spawn.BUG_STATUS
    try:
        if bare_fork():
            os._exit(0)
        os.write(sock_fd, b"%d" % os.getpid())
        os.close(sock_fd)
        data, ancillary, _, _ = here.recvmsg(WORDS_LIMIT, _ROOM, _CLOEXEC)
        if data:
            *fds, answer_fd = (fd for (fd,) in struct.iter_unpack("i", ancillary[0][2]))
            words = data.decode().split("\0")
            if words[0] == SELF:
                del words[0]
                lives[words[0]][0](os.getpid(), fds)
            os.write(answer_fd, b"%d" % os.getpid())
            os.close(answer_fd)
            os.close(here.fileno())
            lives[words[0]][1](words, fds)
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
