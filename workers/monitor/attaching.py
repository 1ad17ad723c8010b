"""Runs in: the monitor, in a hand.

Clients that attach to the container's own streams. The keeper sends a copy of each piece of output that it
reads, as one packet; here it waits for each client by itself, in a bounded buffer. Neither the container nor
its log ever waits: a client that does not keep up is let go, and counted. What clients type goes into the
container's standard input as fast as that takes it; those of a terminal have the terminal itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable

from ipc.fds import close_all
from ipc.loop import Loop
from ipc.messages.monitor import AttachOpen, SessionEnd, SessionOpened
from workers.monitor.containerlog import ContainerLog
from workers.monitor.execsessions import Opened, Status
from workers.monitor.link import FEED_BYTES, FEED_PACKET, Link
from workers.monitor.stdio import READ_BYTES, make_pipe

BUFFER = 1024 * 1024  # bytes that wait for one client, besides what its pipe holds
OUTPUTS = ("stdout", "stderr")  # a packet begins with the number of its stream
LAGGED = "the client did not keep up with the container's output"
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
PACKETS = 16  # that are taken in one turn


class Output:
    """One stream of one client: a pipe and what waits for it. `changed` is called when something has gone."""

    def __init__(self, loop: Loop, changed: Callable[[], object]) -> None:
        self._loop = loop
        self._changed = changed
        self.reader, self._fd = make_pipe()
        os.set_blocking(self._fd, False)
        self._pieces: deque[memoryview] = deque()
        self.waiting = 0
        self._ended = False

    def take(self, chunk: memoryview) -> None:
        """Pass on now or later; an empty chunk is the end."""
        if self._fd < 0:
            return
        self._ended = self._ended or not chunk
        if chunk:
            self._pieces.append(chunk)
            self.waiting += len(chunk)
        if len(self._pieces) <= 1:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._pieces:
                written = os.write(self._fd, self._pieces[0])
                self.waiting -= written
                rest = self._pieces.popleft()[written:]
                if rest:
                    self._pieces.appendleft(rest)
        except BlockingIOError:
            self._loop.add_writer(self._fd, self._flush)
            return
        except OSError:  # nobody reads
            self.close()
            self._changed()
            return
        self._loop.remove_writer(self._fd)
        if self._ended:
            self.close()
        self._changed()

    def close(self) -> None:
        """Close, whatever waits. May be called again."""
        fd, self._fd = self._fd, -1
        self._pieces.clear()
        self.waiting = 0
        if fd >= 0:
            self._loop.remove_writer(fd)
            os.close(fd)


class Input:
    """What a client types, on its way into the container's standard input. `ended`: he types no more."""

    def __init__(self, loop: Loop, stdin_fd: int, ended: Callable[[], object]) -> None:
        self._loop = loop
        self._stdin_fd = stdin_fd
        self._ended = ended
        self._rest = b""
        self._fd, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        try:
            self._rest = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        if not self._rest:
            self.close()
            self._ended()
            return
        self._loop.remove_reader(self._fd)
        self._write()

    def _write(self) -> None:
        try:
            self._rest = self._rest[os.write(self._stdin_fd, self._rest) :]
        except BlockingIOError:
            pass
        except OSError:  # the container reads no more
            self.close()
            return
        if self._rest:
            self._loop.add_writer(self._stdin_fd, self._write)
        else:
            self._loop.remove_writer(self._stdin_fd)
            self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Take no more. May be called again."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._stdin_fd)
            close_all([self._fd, self._stdin_fd])
            self._fd = -1


class Client:
    """One who attached."""

    def __init__(self, loop: Loop, over: Callable[[Client], object]) -> None:
        self.outputs: dict[str, Output] = {}
        self.input: Input | None = None
        self.status = Status(loop, self._gone)
        self._loop = loop
        self._over = over
        self._end: SessionEnd | None = None

    def add_output(self, name: str) -> int:
        """Give it a stream; return the client's end."""
        output = self.outputs[name] = Output(self._loop, self._moved)
        return output.reader

    def take(self, name: str, chunk: memoryview) -> bool:
        """Pass a piece of output on; False if the client lags too far behind."""
        output = self.outputs.get(name)
        if output is None:
            return True
        output.take(chunk)
        return output.waiting <= BUFFER

    def finish(self, end: SessionEnd) -> None:
        """The session ends when what waits has been taken."""
        self._end = end
        if self.input is not None:
            self.input.close()
        for output in list(self.outputs.values()):
            output.take(memoryview(b""))
        self._moved()

    def _moved(self) -> None:
        if self._end is not None and not any(output.waiting for output in self.outputs.values()):
            self.drop(self._end)

    def _gone(self) -> None:
        self.drop(SessionEnd())

    def drop(self, end: SessionEnd) -> None:
        """End it now, whatever waits. Nothing if that was done."""
        self._end = None
        for output in self.outputs.values():
            output.close()
        if self.input is not None:
            self.input.close()
        self.status.tell(end)
        over, self._over = self._over, _nothing
        over(self)


def _nothing(_client: Client) -> None:
    """Told already."""


class Attached:
    """All who attached to one container. `terminal`, `stdin_once`: as it was created."""

    def __init__(self, loop: Loop, link: Link, log: ContainerLog) -> None:
        self.lagged = 0
        self.stdin_once = False
        self.terminal = False
        self.ending = False  # the container's init has ended
        self._loop = loop
        self._link = link
        self._log = log
        self._clients: dict[Client, None] = {}
        self._joining = 0
        self._typing: Client | None = None  # who has standard input that is there but once
        self._feed: socket.socket | None = None

    @property
    def busy(self) -> bool:
        """True while anybody is there."""
        return bool(self._clients) or self._joining > 0

    def join(self, request: AttachOpen, opened: Opened) -> None:
        """Somebody attaches: his descriptors are answered when the keeper has given its own."""
        self._joining += 1

        def given(stdin_fd: int, terminal_fd: int) -> None:
            self._joining -= 1
            self._admit(request, stdin_fd, terminal_fd, opened)

        self._link.stdio(given)

    def _admit(self, request: AttachOpen, stdin_fd: int, terminal_fd: int, opened: Opened) -> None:
        client = Client(self._loop, self._forget)
        fds = {"status": client.status.reader}
        wanted = {"stdout": request.stdout, "stderr": request.stderr and not self.terminal}
        fds |= {name: client.add_output(name) for name, asked in wanted.items() if asked}
        if request.stdin and stdin_fd >= 0:
            client.input = Input(self._loop, stdin_fd, lambda: self._stdin_ended(client))
            fds["stdin"] = client.input.writer
            self._typing = self._typing or client
        elif stdin_fd >= 0:
            os.close(stdin_fd)
        if terminal_fd >= 0:
            fds["terminal"] = terminal_fd
        self._clients[client] = None
        self._listen()
        opened(SessionOpened(fds=list(fds)), list(fds.values()))

    def _listen(self) -> None:
        """Let the keeper send what it reads."""
        if self._feed is not None:
            return
        self._feed, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(OSError):  # without the privilege a burst of the usual size must do
            theirs.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, FEED_BYTES)
        for end in (self._feed, theirs):
            end.setblocking(False)
        self._loop.add_reader(self._feed.fileno(), self._readable)
        self._link.feed(theirs.detach())

    def _readable(self) -> None:
        for _ in range(PACKETS):
            packet = self._next_packet()
            if packet is None:
                return
            if not packet:
                self._feed_ended()
                return
            for client in self._pass_on(packet):
                self._lag(client)

    def _next_packet(self) -> bytes | None:
        """The next packet, None if there is none now, empty at the end."""
        with contextlib.suppress(BlockingIOError):
            return None if self._feed is None else self._feed.recv(FEED_PACKET)
        return None

    def _pass_on(self, packet: bytes) -> list[Client]:
        """Give a packet to everybody; return those who lag too far behind."""
        name, chunk = OUTPUTS[packet[0]], memoryview(packet)[1:]
        return [client for client in list(self._clients) if not client.take(name, chunk)]

    def _lag(self, client: Client) -> None:
        self.lagged += 1
        self._log.warning("attached client let go", why=LAGGED, lagged=self.lagged)
        client.drop(SessionEnd(error=LAGGED, lagged=True))

    def _feed_ended(self) -> None:
        """The keeper sends no more: after the container's end that was all, before it we were too slow."""
        self._close_feed()
        if self.ending:
            return
        for client in list(self._clients):
            self._lag(client)

    def _close_feed(self) -> None:
        if self._feed is not None:
            self._loop.remove_reader(self._feed.fileno())
            self._feed.close()
            self._feed = None

    def _stdin_ended(self, client: Client) -> None:
        """A client types no more. Standard input that is there but once ends with the first who had it."""
        client.input = None
        if self.stdin_once and not self.terminal and client is self._typing:
            self._link.shut_stdin()
            for other in self._clients:
                if other.input is not None:
                    other.input.close()

    def _forget(self, client: Client) -> None:
        self._clients.pop(client, None)
        if client is self._typing:
            if client.input is not None:
                self._stdin_ended(client)
            self._typing = client if self.stdin_once else None
        if not self._clients:
            self._close_feed()

    def container_ended(self) -> None:
        """All output is on its way: what the feed still has is passed on, then the sessions end."""
        while packet := self._next_packet():
            self._pass_on(packet)
        self._close_feed()
        for client in list(self._clients):
            client.finish(SessionEnd())
