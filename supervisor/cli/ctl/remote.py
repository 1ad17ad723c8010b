"""Runs in: bulkheadctl, when something is streamed.

exec and attach as a client: streams by name over SPDY/3.1 (v4) or WebSocket (v5), the terminal in raw mode,
its size, the exit code. Standard input is read only while the server takes what is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import termios
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from fcntl import ioctl
from typing import Protocol

from ipc.streams import spdy, websocket
from supervisor.cli.ctl.connection import CtlError
from supervisor.cli.ctl.link import PIECE, Link

STDIN, STDOUT, STDERR, ERROR, RESIZE = CHANNELS = ("stdin", "stdout", "stderr", "error", "resize")
SPDY_PROTOCOL, WEBSOCKET_PROTOCOL = "v4.channel.k8s.io", "v5.channel.k8s.io"
DETACH = b"\x10\x11"  # ctrl-p, ctrl-q


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    stdin: bool
    tty: bool
    detachable: bool = False

    def names(self) -> list[str]:
        """The streams of the session."""
        flags = {ERROR: True, STDIN: self.stdin, STDOUT: True, STDERR: not self.tty, RESIZE: self.tty}
        return [name for name, wanted in flags.items() if wanted]


class Streams(Protocol):
    """The streams of a session, by name. `closed` when the server has said goodbye."""

    closed: bool

    def send(self, name: str, data: bytes) -> list[bytes]: ...

    def end(self, name: str) -> list[bytes]: ...

    def receive(self, data: bytes) -> Iterator[tuple[str, bytes]]: ...

    def answers(self) -> list[bytes]: ...


class SpdyStreams:
    """Streams that are opened one by one."""

    def __init__(self, link: Link, wanted: Wanted) -> None:
        self.closed = False
        link.spdy(SPDY_PROTOCOL)
        self._connection = spdy.Connection(client=True)
        self._ids = {name: self._connection.open({"streamtype": name}) for name in wanted.names()}
        self._names = {stream: name for name, stream in self._ids.items()}

    def send(self, name: str, data: bytes) -> list[bytes]:
        self._connection.send(self._ids[name], data)
        return self._connection.output()

    def end(self, name: str) -> list[bytes]:
        self._connection.end(self._ids[name])
        return self._connection.output()

    def receive(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        for event in self._connection.receive(data):
            if isinstance(event, spdy.Data):
                yield self._names.get(event.stream, ""), event.data
            self.closed = self.closed or isinstance(event, spdy.GoneAway)

    def answers(self) -> list[bytes]:
        return self._connection.output()


class WebSocketStreams:
    """Channels by number."""

    def __init__(self, link: Link, _wanted: Wanted) -> None:
        self.closed = False
        self._connection = websocket.Connection(WEBSOCKET_PROTOCOL, link.websocket(WEBSOCKET_PROTOCOL))

    def send(self, name: str, data: bytes) -> list[bytes]:
        self._connection.send(CHANNELS.index(name), data)
        return self._connection.output()

    def end(self, name: str) -> list[bytes]:
        self._connection.end(CHANNELS.index(name))
        return self._connection.output()

    def receive(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        for event in self._connection.receive(data):
            if isinstance(event, websocket.Data) and 0 <= event.channel < len(CHANNELS):
                yield CHANNELS[event.channel], event.data
            self.closed = self.closed or isinstance(event, websocket.Closed)

    def answers(self) -> list[bytes]:
        return self._connection.output()


TRANSPORTS: dict[str, type[SpdyStreams] | type[WebSocketStreams]] = {
    "spdy": SpdyStreams,
    "websocket": WebSocketStreams,
}


@contextlib.contextmanager
def raw_terminal(wanted: bool) -> Iterator[None]:
    """Standard input's terminal, if it is one, in raw mode; as it was, afterwards."""
    if not wanted or not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextlib.contextmanager
def size_changes() -> Iterator[socket.socket]:
    """A socket that can be read when the terminal's size has changed."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    old_wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    old_handler = signal.signal(signal.SIGWINCH, lambda _number, _frame: None)
    try:
        yield ours
    finally:
        signal.signal(signal.SIGWINCH, old_handler)
        signal.set_wakeup_fd(old_wakeup)
        ours.close()
        theirs.close()


class Session:
    """One exec or attach."""

    def __init__(self, link: Link, transport: str, wanted: Wanted) -> None:
        self._link = link
        self._wanted = wanted
        self._streams: Streams = TRANSPORTS[transport](link, wanted)
        self._status = b""
        self._typed = b""  # the end of what was typed
        self._reading = wanted.stdin
        self._detached = False

    def run(self) -> int:
        """Serve to the end; the exit code. Raises CtlError."""
        self._take(b"")  # what came with the answer to the upgrade
        with raw_terminal(self._wanted.tty), size_changes() as changes, selectors.PollSelector() as selector:
            self._resize()
            selector.register(changes, selectors.EVENT_READ, self._changed)
            selector.register(self._link, selectors.EVENT_READ, self._move)
            while not self._over():
                self._watch(selector)
                wait = 0 if self._link.pending else None
                for key, _events in selector.select(wait):
                    key.data(key.fileobj)
                self._move(self._link)
        return 0 if self._detached else exit_code(self._status)

    def _over(self) -> bool:
        return self._streams.closed or self._link.ended or self._detached

    def _watch(self, selector: selectors.PollSelector) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._link.waiting else 0)
        selector.modify(self._link, events, self._move)
        reading = self._reading and not self._link.full
        if reading and 0 not in selector.get_map():
            selector.register(0, selectors.EVENT_READ, self._typing)
        elif not reading and 0 in selector.get_map():
            selector.unregister(0)

    def _move(self, _link: object) -> None:
        self._link.flush()
        data = self._link.receive()
        if data and not self._streams.closed:
            self._take(data)

    def _take(self, data: bytes) -> None:
        try:
            for name, piece in self._streams.receive(data):
                self._arrived(name, piece)
        except (spdy.ProtocolError, websocket.ProtocolError) as error:
            raise CtlError(f"the server breaks the protocol: {error}") from error
        self._link.send(self._streams.answers())

    def _arrived(self, name: str, data: bytes) -> None:
        if name == ERROR:
            self._status += data
        elif name in {STDOUT, STDERR}:
            _write(1 if name == STDOUT else 2, data)

    def _typing(self, _fd: object) -> None:
        data = os.read(0, PIECE)
        recent = self._typed + data
        if self._wanted.detachable and self._wanted.tty and DETACH in recent:
            self._detached = True
            return
        self._typed = recent[-1:]
        if data:
            self._link.send(self._streams.send(STDIN, data))
        else:
            self._reading = False
            self._link.send(self._streams.end(STDIN))

    def _changed(self, changes: object) -> None:
        assert isinstance(changes, socket.socket)
        changes.recv(PIECE)
        self._resize()

    def _resize(self) -> None:
        if self._wanted.tty and (size := terminal_size()) is not None:
            text = json.dumps({"Width": size[0], "Height": size[1]}).encode()
            self._link.send(self._streams.send(RESIZE, text))


def terminal_size() -> tuple[int, int] | None:
    """Columns and rows of the terminal we stand in, None if that is none."""
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            rows, columns = struct.unpack("HHHH", ioctl(fd, termios.TIOCGWINSZ, bytes(8)))[:2]
            if rows and columns:
                return columns, rows
    return None


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def exit_code(status: bytes) -> int:
    """The exit code out of a v4 status. Raises CtlError if it tells of a failure, or there is none."""
    try:
        told = json.loads(status)
    except ValueError:
        raise CtlError("the connection ended before the command did") from None
    if told.get("status") == "Success":
        return 0
    if told.get("reason") == "NonZeroExitCode":
        return int(told["details"]["causes"][0]["message"])
    raise CtlError(str(told.get("message", "it failed")))
