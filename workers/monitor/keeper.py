"""Runs in: the monitor, the keeper itself, for nearly all of its life.

It holds what must not end before the container does: the lock, the socket, the read ends of the output, the
log, the parenthood of the container's init. It writes the log, reaps, and forks a hand (workers/monitor/
hand.py) for whoever connects; it decodes no message and knows no runtime. There are as many keepers as
containers, and a forked Python process dirties a page for nearly every object it uses, since reference
counts stand in the objects: so this one uses few, says what it means in place, and has no loop but epoll. It
and workers/monitor/log.py are loaded when all else is, by the process that forks monitors, so that what they
are made of stands together (ipc/pools.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import time
from _socket import AF_UNIX, CMSG_SPACE, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SOCK_SEQPACKET, SOL_SOCKET, socketpair
from collections.abc import Callable

from ipc.fds import close_all
from ipc.kernel import bare_fork
from workers.monitor.link import (
    ANSWER,
    CHILD,
    COUNT,
    COUNTS,
    GONE,
    LEAVE,
    PACKET,
    REOPEN,
    STRANGER,
    TAKE,
    TAKEN,
)
from workers.monitor.log import LINE_LIMIT, Clock, LogFile, LoggedStream, Trouble
from workers.monitor.oom import Followed, OomWatch
from workers.monitor.stdio import READ_BYTES, waiting_bytes

WARMING = 24  # runs after which CPython 3.11 has specialised what it will
UNUSED = 600.0  # seconds that a keeper waits for its container
NEWLINE = 0x0A
EPOLLIN, EPOLLPRI = select.EPOLLIN, select.EPOLLPRI
_FDS = CMSG_SPACE(8 * 4)


class Keeper:
    """What is kept. Made before the fork, of which `open` is the child's part: what many of them have before
    they begin stands in shared pages, or at least together.

    `hand` is run in a forked child and does not return; `trouble` logs what goes wrong.
    """

    __slots__ = (
        "_early", "_epoll", "_hand", "_ready", "code", "file", "finished_ns", "hand_pid", "hands_link",
        "init_fd", "init_pid", "leaving", "link", "listener", "oom", "outputs", "stdin_fd", "streams",
        "taken", "wake_fd", "wakeup_fd",
    )  # fmt: skip

    def __init__(self) -> None:
        self.streams: dict[int, LoggedStream] = {}  # those that are open, by descriptor
        self.outputs: list[LoggedStream] = []
        self.file = LogFile(-1)
        self.stdin_fd = -1
        self.oom = OomWatch("", 0)
        self.hand_pid = 0
        self.init_pid = 0
        self.init_fd = -1  # pidfd of an init that is no child of ours
        self.taken = False
        self.code: int | None = None  # of the init: -N for signal N, None if nobody knows
        self.finished_ns = 0
        self.leaving = False
        self.listener = -1
        self.wake_fd = self.wakeup_fd = -1
        self._early: dict[int, tuple[int, int]] = {}  # ends of children until the init is known
        clock = Clock()
        self._ready = [LoggedStream(name, clock, self.file) for name in ("stdout", "stderr")]
        self._hand: Callable[[Keeper], object]

    def open(self, listener: int, hand: Callable[[Keeper], object], trouble: Trouble) -> None:
        """Make what is this process's own. Raises OSError."""
        self.listener = listener
        self._hand = hand
        self.file.trouble = trouble
        # The C type: the class above it costs a quarter of what the keeper may have.
        self.link, self.hands_link = socketpair(AF_UNIX, SOCK_SEQPACKET)
        self.wake_fd, self.wakeup_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll = select.epoll()

    def keep(self) -> bool:
        """Keep until the container's init has ended: True; False if there is nothing to be kept."""
        epoll, streams, read = self._epoll, self.streams, os.read
        link = self.link.fileno()
        signal.set_wakeup_fd(self.wakeup_fd, warn_on_full_buffer=False)
        for fd in (self.listener, self.wake_fd, link):
            epoll.register(fd, EPOLLIN)
        while not self.finished_ns:
            events = epoll.poll(-1 if self.taken else UNUSED)
            for fd, _ in events:
                if fd in streams:
                    try:
                        chunk = read(fd, READ_BYTES)
                    except BlockingIOError:
                        continue
                    except OSError:  # EIO: the last process left the terminal
                        chunk = b""
                    self._log(fd, chunk)
                elif fd == self.wake_fd:
                    self._reap()
                elif fd == self.listener:
                    self._fork()
                elif fd == link:
                    self._obey()
                else:
                    self._look(fd)
            if not self.hand_pid and (self.leaving or not events):
                return False
        return True

    def _log(self, fd: int, chunk: bytes) -> None:
        """Log what a stream brought. A few whole lines, the most common, are logged with few words."""
        stream, file = self.streams[fd], self.file
        if not chunk:
            self._epoll.unregister(fd)
            os.close(fd)
            del self.streams[fd]
        elif stream.begun or file.strained or len(chunk) > LINE_LIMIT or chunk[-1] != NEWLINE:
            stream.take(chunk, chunk[-1] != NEWLINE and waiting_bytes(fd) > 0)
        else:
            head = stream.clock.stamp() + stream.label
            file.append(head + chunk[:-1].replace(b"\n", b"\n" + head) + b"\n")

    def _reap(self) -> None:
        """Reap whatever has ended: a zombie in the container's PID namespace keeps its init from dying."""
        os.read(self.wake_fd, 512)
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid == self.hand_pid:
                    self.hand_pid = 0
                    if status:
                        self._forget_answers()
                    self._epoll.register(self.listener, EPOLLIN)
                elif pid == self.init_pid:
                    self.finished_ns, self.code = time.time_ns(), os.waitstatus_to_exitcode(status)
                elif not self.taken:
                    self._early[pid] = time.time_ns(), os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            return

    def _forget_answers(self) -> None:
        """A hand died: what it had asked is not for the next one."""
        self.hands_link.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.hands_link.recv(PACKET):
                pass

    def _fork(self) -> None:
        """Somebody connects: leave him and the socket to a hand until that ends."""
        self._epoll.unregister(self.listener)
        self.hand_pid = bare_fork()
        if not self.hand_pid:
            self._hand(self)
            os._exit(0)

    def _obey(self) -> None:
        """Do what a hand says."""
        kind, data, fds = self.hear()
        if kind == TAKE:
            self._take(data, fds)
        elif kind == REOPEN:
            self.file.replace(fds[0])
            self.link.send(ANSWER)
        elif kind == COUNT:
            self.link.send(ANSWER + COUNTS.pack(self.file.written, self.file.dropped))
        elif kind == LEAVE:
            self.leaving = True

    def hear(self) -> tuple[bytes, bytes, list[int]]:
        """Return what a hand says: kind, text, descriptors."""
        data, ancillary, _, _ = self.link.recvmsg(PACKET, _FDS, MSG_CMSG_CLOEXEC)
        raw = ancillary[0][2] if ancillary else b""
        return data[:1], data[1:], list(struct.unpack(f"{len(raw) // 4}i", raw))

    def _take(self, data: bytes, fds: list[int]) -> None:
        """A container was created: its descriptors, its init, the memory group that is to be followed."""
        pid, kin, stdin, log, oom, oom_fds, others = TAKEN.unpack(data[: TAKEN.size])
        if log:
            self.file.replace(fds.pop(0))
        if stdin:
            self.stdin_fd = fds.pop(0)
        if kin == STRANGER:
            self.init_fd = fds.pop(0)
            self._epoll.register(self.init_fd, EPOLLIN)
        if oom:
            self._follow_oom(OomWatch(data[TAKEN.size :].decode(), oom, Followed(fds[:oom_fds], others)))
            del fds[:oom_fds]
        for fd in fds:  # a terminal is one
            self.streams[fd] = self._ready.pop(0)
            self.outputs.append(self.streams[fd])
            self._epoll.register(fd, EPOLLIN)
        self.taken = True
        if pid in self._early:
            self.finished_ns, self.code = self._early[pid]
        elif kin == GONE:
            self.finished_ns = time.time_ns()
        elif kin == CHILD:
            self.init_pid = pid
        self._early.clear()

    def _follow_oom(self, oom: OomWatch) -> None:
        self.oom = oom
        for fd in oom.event_fds:
            self._epoll.register(fd, EPOLLPRI if oom.version == 2 else EPOLLIN)

    def _look(self, fd: int) -> None:
        """Something rare: the end of an init that is somebody else's, a change of the OOM count."""
        if fd == self.init_fd:
            self.finished_ns = time.time_ns()
            self._epoll.unregister(fd)
        elif fd in self.oom.fds and not self.oom.changed():
            for each in self.oom.event_fds:
                self._epoll.unregister(each)
            self.oom.close()

    def hand_over(self) -> None:
        """Give the watching up: the container's end is the work of a loop that can do more."""
        self._epoll.close()
        signal.set_wakeup_fd(-1)


def warm_up() -> None:
    """Run what a keeper runs until the interpreter has specialised it, which writes into the code: before
    the forks, so that the keepers share that. Raises OSError."""
    for _ in range(WARMING):
        _keep_nothing()


def _keep_nothing() -> None:
    keeper = Keeper()
    listener, ended = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(1, os.EFD_CLOEXEC)
    keeper.open(listener, lambda _: None, print)
    outputs = [os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) for _ in range(2)]
    for _, write_fd in outputs:
        os.write(write_fd, b"first\nsecond\n")
        os.close(write_fd)
    fds = [os.memfd_create("log", os.MFD_CLOEXEC), ended, *(read_fd for read_fd, _ in outputs)]
    rights = [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
    keeper.hands_link.sendmsg([TAKE + TAKEN.pack(0, STRANGER, False, True, 0, 0, -1)], rights)
    close_all(fds)
    os.write(keeper.wakeup_fd, b"\0")
    keeper.keep()
    keeper.hand_over()
    close_all([listener, keeper.wake_fd, keeper.wakeup_fd, keeper.init_fd, *keeper.streams])
    keeper.file.replace(-1)
    keeper.link.close()
    keeper.hands_link.close()
