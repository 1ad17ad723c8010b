"""Runs in: the supervisor.

The supervisor's end of the control channel that each worker has: it takes the hello and the news of a bound
socket, and it pings, reloads and stops. The pair is made before the fork, so nobody else can speak on it. A
worker that does not answer is the business of supervisor/kinds.py.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from ipc.channel import Peer
from ipc.errors import RemoteError
from ipc.fds import FdSet
from ipc.log import Log
from ipc.loop import Loop
from ipc.messages import Body, Empty, control
from ipc.messages.supervisor import SandboxReport
from ipc.serve import Call, Connection
from ipc.table import Handler, table

Hello = Callable[[SandboxReport], object]
Bound = Callable[[str], object]


class Control:
    """One worker's channel. What `on_hello`, `on_bound` and `on_drain` raise (RemoteError) it is told."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        kind: str,
        pid: int,
        *,
        on_hello: Hello,
        on_bound: Bound,
        on_drain: Callable[[], object],
        on_close: Callable[[], object],
        log: Log,
        asked: int = 0,
    ) -> None:
        self._on_hello = on_hello
        self._on_bound = on_bound
        self._on_drain = on_drain
        callers = frozenset({kind})
        handlers = table(
            Handler(control.Hello, self._hello, callers),
            Handler(control.SocketBound, self._bound, callers),
            Handler(control.Drain, self._drain, callers),
        )
        self._connection = Connection(
            loop, sock, Peer(pid, 0, 0, kind), handlers, max_requests=8, log=log, asked=asked
        )
        self._connection.on_close(on_close)

    def _hello(self, _call: Call, body: control.Hello) -> Empty:
        self._on_hello(body.report)
        return Empty()

    def _bound(self, _call: Call, body: control.SocketBound) -> Empty:
        self._on_bound(body.path)
        return Empty()

    def _drain(self, _call: Call, _body: control.Drain) -> Empty:
        self._on_drain()
        return Empty()

    def ping(self, done: Callable[[control.Health | RemoteError], object], timeout: float) -> None:
        """Ask for health; `done` gets the answer, or what went wrong."""

        def answered(answer: Body | RemoteError, _fds: FdSet) -> None:
            assert isinstance(answer, control.Health | RemoteError)
            done(answer)

        self._connection.ask(control.Ping(), answered, timeout=timeout)

    def stop(self, grace: float) -> None:
        """Tell the worker to end in order."""
        self._connection.ask(control.Stop(grace_ms=int(grace * 1000)), _ignore, timeout=grace + 5)

    def reload(self, settings: bytes, done: Callable[[Body | RemoteError], object]) -> None:
        """Tell the worker its new settings."""
        self._connection.ask(
            control.Reload(settings=settings), lambda answer, _fds: done(answer), timeout=30.0
        )

    def begin(self, done: Callable[[Body | RemoteError], object]) -> None:
        """Tell a worker that stands by that it is its turn."""
        self._connection.ask(control.Begin(), lambda answer, _fds: done(answer), timeout=30.0)

    def hand_over(self, path: str, done: Callable[[Body | RemoteError], object], timeout: float) -> None:
        """Tell cri to leave its state to the one that stands by at `path`."""
        self._connection.ask(control.HandOver(path=path), lambda answer, _fds: done(answer), timeout=timeout)

    def fileno(self) -> int:
        """The descriptor of the channel."""
        return self._connection.fileno()

    @property
    def asked(self) -> int:
        """How many requests were asked here."""
        return self._connection.asked

    def close(self) -> None:
        """End the channel."""
        self._connection.close()


def _ignore(_answer: Body | RemoteError, _fds: FdSet) -> None:
    """The process's end is the answer that counts."""
