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
import signal
import struct
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    SCM_RIGHTS,
    SOCK_NONBLOCK,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    socketpair,
)
from collections.abc import Callable, Sequence
from os import WNOHANG, close, read, waitpid, waitstatus_to_exitcode, write
from select import EPOLLIN, EPOLLPRI, epoll
from signal import set_wakeup_fd
from time import time_ns

from ipc.fds import close_all
from ipc.kernel import bare_fork
from workers.monitor.link import (
    ANSWER,
    CHILD,
    COUNT,
    COUNTS,
    FEED,
    GONE,
    LEAVE,
    PACKET,
    REOPEN,
    SHUT,
    STDIO,
    STRANGER,
    TAKE,
    TAKEN,
    TAKEN_BYTES,
)
from workers.monitor.log import LINE_LIMIT, Clock, LogFile, LoggedStream, Trouble
from workers.monitor.oom import Followed, OomWatch
from workers.monitor.stdio import PIPE_BYTES, READ_BYTES, waiting_bytes

REHEARSALS = 24  # after which CPython 3.11 has specialised what it will
UNUSED = 600.0  # seconds that a keeper waits for its container
NEWLINE = 0x0A
ENDED_CHILD = bytes((signal.SIGCHLD,))  # what the interpreter's handler writes into hands_link
_FDS = struct.Struct("8i")
_FDS_BYTES = _FDS.size
_ROOM = CMSG_SPACE(_FDS_BYTES)
_LINK = SOCK_SEQPACKET | SOCK_NONBLOCK


class Keeper:
    """What is kept. Made before the fork, `keep` is the child's part: what many of them have before they
    begin stands in shared pages, or at least together.

    `hand` is run in a forked child and does not return; `trouble` logs what goes wrong; `recover` takes up
    what a hand that died has not handed over any more.
    """

    __slots__ = (
        "_early", "_epoll", "_hand", "_ready", "_recover", "code", "feed", "file", "finished_ns", "group_fd",
        "hand_pid",
        "hands_link", "init_fd", "init_pid", "leaving", "link", "listener", "names", "oom", "outputs",
        "stdin_fd", "streams", "taken", "vault",
    )  # fmt: skip

    def __init__(
        self, hand: Callable[[Keeper], object], trouble: Trouble, recover: Callable[[Keeper], object]
    ) -> None:
        self.streams: dict[int, LoggedStream] = {}  # those that are open, by descriptor
        self.outputs: list[LoggedStream] = []
        self.file = LogFile(-1, trouble)
        self.stdin_fd = -1
        self.oom = OomWatch("", 0)
        self.hand_pid = 0
        self.init_pid = 0
        self.init_fd = -1  # pidfd of an init that is no child of ours
        self.taken = False
        self.code: int | None = None  # of the init: -N for signal N, None if nobody knows
        self.finished_ns = 0
        self.leaving = False
        self.names: Sequence[str] = ()  # kind, container, pod, directory; and more, of a successor
        self.listener = -1
        self.group_fd = -1  # cgroup.procs of the group that it is in
        self.feed = -1  # where output goes too, while anybody is attached
        self.vault = -1  # what a successor would need (ipc/vault.py); hands fill it
        self._early: dict[int, tuple[int, int]] = {}  # ends of children until the init is known
        clock = Clock()
        self._ready = [LoggedStream(name, clock, self.file) for name in ("stdout", "stderr")]
        self._hand = hand
        self._recover = recover

    def keep(
        self, names: Sequence[str], listener: int, vault: int, inherit: Callable[[], object] | None
    ) -> bool:
        """Keep until the container's init has ended: True; False if there is nothing to be kept.

        `inherit` takes up what a keeper had that died. Raises OSError while it makes what is its own.
        """
        self.names, self.listener, self.vault = names, listener, vault
        # The C type: the class above it costs a quarter of what the keeper may have.
        self.link, self.hands_link = socketpair(AF_UNIX, _LINK)
        set_wakeup_fd(self.hands_link.fileno())
        self._epoll = poller = epoll()
        streams, link, size = self.streams, self.link.fileno(), READ_BYTES
        poller.register(listener, EPOLLIN)
        poller.register(link, EPOLLIN)
        if inherit is None:
            self._fork()  # whoever wanted it is about to connect
        else:
            inherit()
        while not self.finished_ns:
            events = poller.poll(-1 if self.taken else UNUSED)
            for fd, _ in events:
                if fd in streams:
                    try:
                        chunk = read(fd, size)
                    except BlockingIOError:
                        continue
                    except OSError:  # EIO: the last process left the terminal
                        chunk = b""
                    # From who writes much, all that a pipe holds: faster, for memory that others need not.
                    size = READ_BYTES if len(chunk) < READ_BYTES else PIPE_BYTES
                    self._log(fd, chunk)
                elif fd == link:
                    self._obey()
                elif fd == listener:
                    self._fork()
                else:
                    self._look(fd)
            if not self.hand_pid and (self.leaving or not events):
                return False
        return True

    def _log(self, fd: int, chunk: bytes) -> None:
        """Log what a stream brought. A few whole lines, the most common, are logged with few words."""
        stream, file = self.streams[fd], self.file
        if self.feed >= 0:
            self.send_on(stream, chunk)
        if not chunk:
            self._epoll.unregister(fd)
            close(fd)
            del self.streams[fd]
        elif stream.encoder.rest or len(chunk) > LINE_LIMIT or chunk[-1] != NEWLINE:
            stream.take(chunk, chunk[-1] != NEWLINE and waiting_bytes(fd) > 0)
        else:
            head = stream.clock.stamp() + stream.label
            file.append(head + chunk[:-1].replace(b"\n", b"\n" + head) + b"\n")

    def _reap(self) -> None:
        """Reap whatever has ended: a zombie in the container's PID namespace keeps its init from dying."""
        try:
            while True:
                pid, status = waitpid(-1, WNOHANG)
                if not pid:
                    return
                if pid == self.hand_pid:
                    self.hand_pid = 0
                    if status:
                        self._mourn(status)
                    self._epoll.register(self.listener, EPOLLIN)
                elif pid == self.init_pid:
                    self.finished_ns, self.code = time_ns(), waitstatus_to_exitcode(status)
                elif not self.taken:
                    self._early[pid] = time_ns(), waitstatus_to_exitcode(status)
        except ChildProcessError:
            return

    def _mourn(self, status: int) -> None:
        """A hand died: the answers to what it had asked are not for the next one."""
        self.file.trouble("a monitor's hand died", code=waitstatus_to_exitcode(status))
        with contextlib.suppress(BlockingIOError):
            while self.hands_link.recv(PACKET):
                pass
        if not self.taken:
            self._recover(self)

    def _fork(self) -> None:
        """Somebody connects: leave him and the socket to a hand until that ends."""
        self._epoll.unregister(self.listener)
        self.hand_pid = bare_fork()
        if not self.hand_pid:
            self._hand(self)
            os._exit(0)
        if self.group_fd >= 0:
            # It moves to where it is. The kernel lets who moves first after a pause wait for an RCU grace
            # period, 10 ms and more, and those who follow not: so this one waits, while the hand gets ready,
            # and not the OCI runtime when it moves the container. In place: a function would be another page.
            try:  # noqa: SIM105 - the same
                write(self.group_fd, b"0")
            except OSError:
                pass
            close(self.group_fd)
            self.group_fd = -1

    def _obey(self) -> None:
        """Do what a hand says, or the signal that a child has ended."""
        kind, data, fds = self.hear()
        if kind == ENDED_CHILD:
            self._reap()
        elif kind == TAKE:
            self.take(data, fds)
        elif kind == REOPEN:
            self.file.replace(fds[0])
            self.answer()
        elif kind == COUNT:
            self.answer(COUNTS.pack(self.file.written, self.file.dropped))
        elif kind == LEAVE:
            self.leaving = True
        else:
            self.oblige(kind, fds)

    def oblige(self, kind: bytes, fds: list[int]) -> None:
        """Do what those who attach need."""
        if kind == FEED:
            self.feed, old = fds[0], self.feed
            if old >= 0:
                close(old)
        elif kind == SHUT and self.stdin_fd >= 0:
            close(self.stdin_fd)
            self.stdin_fd = -1
        elif kind == STDIO:
            self._give_stdio()

    def _give_stdio(self) -> None:
        stdin = self.stdin_fd >= 0
        fds = [self.stdin_fd] if stdin else list(self.streams) if len(self.outputs) == 1 else []
        rights = [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        with contextlib.suppress(BlockingIOError):
            self.link.sendmsg([ANSWER + bytes((stdin,))], rights)

    def send_on(self, stream: LoggedStream, chunk: bytes) -> None:
        """Send output to those who attached. Whoever passes it on and does not keep up gets no more."""
        try:
            os.write(self.feed, bytes((self.outputs.index(stream),)) + chunk)
        except OSError:
            self.end_feed()

    def end_feed(self) -> None:
        """Send no more. Nothing if that was done."""
        if self.feed >= 0:
            close(self.feed)
            self.feed = -1

    def hear(self) -> tuple[bytes, bytes, list[int]]:
        """Return what a hand says: kind, text, descriptors."""
        data, ancillary, _, _ = self.link.recvmsg(PACKET, _ROOM, MSG_CMSG_CLOEXEC)
        raw = ancillary[0][2] if ancillary else b""
        return data[:1], data[1:], list(_FDS.unpack(raw.ljust(_FDS_BYTES, b"\0")))[: len(raw) // 4]

    def answer(self, data: bytes = b"") -> None:
        """Answer a hand. One that takes no more of them hangs, and will be no more."""
        with contextlib.suppress(BlockingIOError):
            self.link.send(ANSWER + data)

    def take(self, data: bytes, fds: list[int]) -> None:
        """A container was created: its descriptors, its init, the memory group that is to be followed."""
        pid, kin, stdin, log, oom, oom_fds, others = TAKEN.unpack(data[:TAKEN_BYTES])
        if log:
            self.file.replace(fds.pop(0))
        if stdin:
            self.stdin_fd = fds.pop(0)
        if kin == STRANGER:
            self.init_fd = fds.pop(0)
            self._epoll.register(self.init_fd, EPOLLIN)
        if oom:
            self._follow_oom(OomWatch(data[TAKEN_BYTES:].decode(), oom, Followed(fds[:oom_fds], others)))
            del fds[:oom_fds]
        for fd in fds:  # a terminal is one
            self.streams[fd] = self._ready.pop(0)
            self.outputs.append(self.streams[fd])
            self._epoll.register(fd, EPOLLIN)
        self.taken = True
        if pid in self._early:
            self.finished_ns, self.code = self._early[pid]
        elif kin == GONE:
            self.finished_ns = time_ns()
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
            self.finished_ns = time_ns()
            self._epoll.unregister(fd)
        elif fd in self.oom.fds and not self.oom.changed():
            for each in self.oom.event_fds:
                self._epoll.unregister(each)
            self.oom.close()

    def hand_over(self) -> None:
        """Give the watching up: the container's end is the work of a loop that can do more."""
        self._epoll.close()
        set_wakeup_fd(-1)


def rehearse() -> None:
    """Run what a keeper runs until the interpreter has specialised it, which writes into the code: before
    the forks, so that the keepers share that. Raises OSError."""
    for _ in range(REHEARSALS):
        _rehearse_once()


def _rehearse_once() -> None:
    bell = os.eventfd(1, os.EFD_CLOEXEC)  # somebody connects
    keeper = Keeper(_play_hand, print, print)
    keeper.keep((), bell, -1, None)
    keeper.hand_over()
    close_all([bell, *keeper.streams])
    keeper.file.replace(-1)
    keeper.link.close()
    keeper.hands_link.close()


def _play_hand(keeper: Keeper) -> None:
    os.eventfd_read(keeper.listener)
    outputs = [os.pipe() for _ in range(2)]
    for _, write_fd in outputs:
        os.write(write_fd, b"first\nsecond\n")
        os.close(write_fd)
    fds = [os.memfd_create("log", os.MFD_CLOEXEC), *(read_fd for read_fd, _ in outputs)]
    rights = [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
    keeper.hands_link.sendmsg([TAKE + TAKEN.pack(1, CHILD, False, True, 0, 0, -1)], rights)
    keeper.hands_link.send(LEAVE)  # which is done once this hand is reaped
