"""Runs in: cri, image, stream, ops.

The asyncio face: a client that reconnects and sends idempotent requests again, and a server.
asyncio's own unix streams refuse SEQPACKET, so sockets are watched with add_reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from ipc import calls, wire
from ipc.channel import Channel, Peer, PeerStalled, address, peer_of
from ipc.errors import Code, RemoteError, moved
from ipc.fds import FdSet, close_all
from ipc.log import Log
from ipc.messages import Body, Request
from ipc.messages.supervisor import InFlight
from ipc.table import Handler

R = TypeVar("R", bound=Body)
CONNECT_RETRY = 0.01  # seconds between attempts while the listener's backlog is full
MOVES = 100  # successors that one request is sent after


class Lost(ConnectionError):
    """The connection ended before the answer came."""


class Call:
    """One request in the hands of its handler.

    `reply_fds` are sent along with the reply and closed by ipc; `fds` came with the request.
    """

    def __init__(self, connection: Connection, asked: calls.Asked) -> None:
        self.caller = connection.peer.kind
        self.peer_pid = connection.peer.pid
        self.fds = asked.fds
        self.type = asked.handler.request.NAME
        self.deadline = asked.deadline_ns / 1e9 if asked.deadline_ns else None
        self.doing = ""
        self.since = time.monotonic()
        self.reply_fds: list[int] = []
        self._connection = connection
        self._number = asked.number

    @property
    def remaining(self) -> float | None:
        """Seconds to the deadline, None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def update(self, body: Body) -> None:
        """Report progress to the caller."""
        self._connection.update(self._number, body)


class Connection:
    """One connected socket on the running loop; it asks and answers. Bugs in handlers go to `on_bug`."""

    def __init__(
        self,
        sock: socket.socket,
        peer: Peer,
        handlers: Mapping[str, Handler],
        *,
        max_requests: int = 256,
        log: Log | None = None,
        on_bug: Callable[[BaseException], object] | None = None,
    ) -> None:
        self.peer = peer
        self.closed = False
        self.draining = False  # as a server: what comes from now on is for the successor
        self.retired = False  # as a client: it ends with the last answer that is awaited
        self.on_close: Callable[[Connection], object] = lambda _self: None
        self.in_flight: dict[int, Call] = {}
        self.served = 0  # calls that are over
        self._loop = asyncio.get_running_loop()
        self._channel = Channel(sock)
        self._calls = calls.Calls(handlers, peer.kind, max_requests=max_requests)
        self._waiting: dict[
            int, tuple[asyncio.Future[tuple[Body, FdSet]], Callable[[Any], object] | None]
        ] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._log = log
        self._on_bug = on_bug
        self._loop.add_reader(self._channel.fileno(), self._readable)

    @property
    def idle(self) -> bool:
        """True while neither side waits for the other."""
        return not self._waiting and not self._tasks

    # -- asking ---------------------------------------------------------------------------------------

    async def ask(
        self,
        request: Request[R],
        fds: FdSet,
        deadline: float | None,
        on_update: Callable[[Any], object] | None = None,
    ) -> tuple[R, FdSet]:
        """Send one request and wait for its answer. Raises Lost, RemoteError."""
        if self.closed:
            fds.close()
            raise Lost("the connection is closed")
        number, packet = self._calls.ask(request, fds, 0 if deadline is None else int(deadline * 1e9))
        future: asyncio.Future[tuple[Body, FdSet]] = self._loop.create_future()
        self._waiting[number] = (future, on_update)
        self._send(packet)
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                body, received = await future
        except TimeoutError:
            raise RemoteError(Code.DEADLINE_EXCEEDED, f"{request.NAME}: no answer in time") from None
        finally:
            self._waiting.pop(number, None)
            cancel = self._calls.cancel(number)
            if cancel is not None and not self.closed:
                self._send(cancel)
            self._maybe_retire()
        return cast(R, body), received

    def abandon(self) -> None:
        """Close, and leave who waits for an answer waiting for good."""
        self._waiting.clear()
        self.close()

    def retire(self) -> None:
        """Ask nothing more; close once nothing is awaited any more."""
        self.retired = True
        self._maybe_retire()

    def _maybe_retire(self) -> None:
        if self.retired and self.idle:
            self.close()

    # -- answering ------------------------------------------------------------------------------------

    def update(self, number: int, body: Body) -> None:
        """Send a progress report (Call.update does)."""
        self._send(self._calls.update(number, body))

    async def _serve(self, call: Call, asked: calls.Asked) -> None:
        try:
            async with asyncio.timeout(call.remaining):
                body = await asked.handler.function(call, asked.body)
            self._answer(asked.number, body, FdSet(call.reply_fds))
        except TimeoutError:
            close_all(call.reply_fds)
            self._refuse(asked.number, RemoteError(Code.DEADLINE_EXCEEDED, f"{call.type}: deadline passed"))
        except RemoteError as error:
            close_all(call.reply_fds)
            self._refuse(asked.number, error)
        except asyncio.CancelledError:
            close_all(call.reply_fds)
            raise
        except Exception as error:  # noqa: BLE001 - a bug of ours: told to the owner, who ends the process
            close_all(call.reply_fds)
            self._refuse(asked.number, RemoteError(Code.INTERNAL, f"{call.type}: {error!r}"))
            if self._on_bug is not None:
                self._on_bug(error)

    def _served(self, call: Call, number: int) -> None:
        # A callback, not a `finally`: a task that is cancelled before its first step runs none of its code.
        call.fds.close()
        self.in_flight.pop(number, None)
        self.served += 1
        self._tasks.pop(number, None)

    def _answer(self, number: int, body: Body, fds: FdSet) -> None:
        try:
            packet = self._calls.reply(number, body, fds)
        except RemoteError as error:
            packet = self._calls.fail(number, error)
        self._send(packet)

    def _refuse(self, number: int, error: RemoteError) -> None:
        self._send(self._calls.fail(number, error))

    def _send(self, packet: calls.Packet | None) -> None:
        if packet is None or self.closed:
            if packet is not None:
                packet.fds.close()
            return
        try:
            self._channel.send(packet)
        except (OSError, PeerStalled) as error:
            self.close(str(error))
            return
        if self._channel.wants_write:
            self._loop.add_writer(self._channel.fileno(), self._writable)

    def _writable(self) -> None:
        try:
            self._channel.flush()
        except OSError as error:
            self.close(str(error))
            return
        if not self._channel.wants_write:
            self._loop.remove_writer(self._channel.fileno())

    # -- receiving ------------------------------------------------------------------------------------

    def _readable(self) -> None:
        for _ in range(16):
            if self.closed or not self._receive_one():
                return

    def _receive_one(self) -> bool:
        try:
            packet = self._channel.receive()
            if packet is None:
                self.close("")
                return False
            event = self._calls.receive(*packet)
        except BlockingIOError:
            return False
        except (OSError, wire.ProtocolError) as error:
            self.close(str(error))
            return False
        if event is not None:
            self._dispatch(event)
        return True

    def _dispatch(self, event: calls.Event) -> None:
        match event:
            case calls.Asked() if self.draining and not event.fds:  # descriptors cannot be sent again
                self._refuse(event.number, moved(event.handler.request.NAME))
            case calls.Asked():
                call = Call(self, event)
                self.in_flight[event.number] = call
                serving = self._loop.create_task(self._serve(call, event))
                self._tasks[event.number] = serving
                serving.add_done_callback(lambda _task: self._served(call, event.number))
            case calls.Cancelled(number):
                task = self._tasks.get(number)
                if task is not None:
                    task.cancel()
            case calls.Answered(number, body, fds):
                self._settle(number, (body, fds))
            case calls.Failed(number, error):
                self._settle(number, error)
            case calls.Updated(number, body):
                _future, on_update = self._waiting.get(number, (None, None))
                if on_update is not None:
                    on_update(body)
            case calls.Refused(packet, error, type_):
                if self._log is not None:
                    self._log.warning("request refused", type=type_, caller=self.peer.kind, error=error)
                self._send(packet)

    def _settle(self, number: int, result: tuple[Body, FdSet] | Exception) -> None:
        future, _ = self._waiting.get(number, (None, None))
        if future is None or future.done():
            if isinstance(result, tuple):
                result[1].close()
        elif isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def close(self, why: str = "") -> None:
        """End the connection: its handlers are cancelled, its askers get Lost."""
        if self.closed:
            return
        self.closed = True
        if why and self._log is not None:
            self._log.warning("connection closed", peer=self.peer.kind, pid=self.peer.pid, why=why)
        fd = self._channel.fileno()
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        self._channel.close()
        for task in list(self._tasks.values()):
            task.cancel()
        for number in self._calls.lost():
            self._settle(number, Lost(why or "the peer went away"))
        self.on_close(self)


class Client:
    """Asks the server at `path`. Connects on demand, closes after `idle_close` seconds without a call.

    An idempotent request without descriptors is sent again when the peer dies, within its deadline and at
    most RESENDS times; any other ends as RemoteError(UNAVAILABLE). A cancelled
    wait is told to the peer. A peer that is being replaced has begun nothing of what it answers MOVED: its
    successor is asked.
    """

    RESENDS = 5

    def __init__(self, path: str, *, idle_close: float | None = None) -> None:
        self._path = path
        self._idle_close = idle_close
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._in_use = 0
        self._parked = False

    def park(self, *, abandon: bool) -> None:
        """Ask nothing any more: whoever wants to waits for good, as if the process had ended. `abandon`: so
        do those who wait for an answer; else what is asked already goes on."""
        self._parked = True
        if abandon and self._connection is not None:
            self._connection.abandon()

    async def call(
        self,
        request: Request[R],
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
        on_update: Callable[[Any], object] | None = None,
    ) -> R:
        """Send a request and return its reply; descriptors of the reply are closed. Raises RemoteError."""
        body, received = await self.call_fds(request, fds=fds, timeout=timeout, on_update=on_update)
        received.close()
        return body

    async def call_fds(
        self,
        request: Request[R],
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
        on_update: Callable[[Any], object] | None = None,
    ) -> tuple[R, FdSet]:
        """As `call`, and return the reply's descriptors. Takes over those that are sent."""
        deadline = None if timeout is None else time.monotonic() + timeout
        owned = FdSet(fds)
        resends = self.RESENDS if request.IDEMPOTENT and not owned else 0
        moves = MOVES
        if self._parked:
            await asyncio.Event().wait()
        self._in_use += 1
        try:
            while True:
                connection = await self._connect(deadline)
                try:
                    return await connection.ask(request, owned, deadline, on_update)
                except RemoteError as error:
                    if error.code is not Code.MOVED or not moves:
                        raise
                    moves -= 1
                    connection.retire()
                except Lost as error:
                    if self._parked:
                        await asyncio.Event().wait()
                    if not resends:
                        raise RemoteError(Code.UNAVAILABLE, f"{request.NAME}: {error}") from error
                    resends -= 1
        finally:
            owned.close()
            self._in_use -= 1
            self._rearm_idle()

    async def connect(self) -> None:
        """Connect now, before there is something to ask: a server that has to prepare itself begins.

        Raises RemoteError.
        """
        await self._connect(None)
        self._rearm_idle()

    async def _connect(self, deadline: float | None) -> Connection:
        async with self._connecting:
            if self._connection is None or self._connection.closed or self._connection.retired:
                sock = await _connected(self._path, deadline)
                self._connection = Connection(sock, Peer(0, 0, 0, "server"), {})
            return self._connection

    def _rearm_idle(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._idle_close is not None and not self._in_use and self._connection is not None:
            self._idle_timer = asyncio.get_running_loop().call_later(self._idle_close, self._close_idle)

    def _close_idle(self) -> None:
        if not self._in_use and self._connection is not None:
            self._connection.close()
            self._connection = None

    async def close(self) -> None:
        """End the connection; a later call makes a new one."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def _connected(path: str, deadline: float | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                with address(path) as short:
                    sock.connect(short)
                return sock
            except BlockingIOError:  # the backlog is full: nobody accepts just now
                if deadline is not None and time.monotonic() > deadline:
                    raise RemoteError(Code.DEADLINE_EXCEEDED, f"{path}: nobody accepted in time") from None
                await asyncio.sleep(CONNECT_RETRY)
    except OSError as error:
        sock.close()
        raise RemoteError(Code.UNAVAILABLE, f"cannot reach {path}: {error}") from error
    except BaseException:
        sock.close()
        raise


class Server:
    """Accepts connections and serves one table of handlers. `failed` ends with the first bug of a handler."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        uids: Mapping[int, str],
        *,
        max_requests: int = 256,
        log: Log | None = None,
    ) -> None:
        self.handlers = handlers
        self.connections: set[Connection] = set()
        self.last_activity = time.monotonic()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._uids = uids
        self._max_requests = max_requests
        self._log = log
        self._listeners: list[socket.socket] = []
        self._served_before = 0  # on connections that are gone

    def start(self, listener: socket.socket) -> None:
        """Accept on a listening SEQPACKET socket; it stays the caller's."""
        listener.setblocking(False)
        self._listeners.append(listener)
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.adopt(sock, peer_of(sock, self._uids))

    def adopt(self, sock: socket.socket, peer: Peer) -> Connection:
        """Serve on a socket that is connected already. Takes it over."""
        connection = Connection(
            sock, peer, self.handlers, max_requests=self._max_requests, log=self._log, on_bug=self._bug
        )
        connection.on_close = self._closed
        self.connections.add(connection)
        return connection

    @property
    def served(self) -> int:
        """How many calls were served since the start."""
        return self._served_before + sum(connection.served for connection in self.connections)

    def _closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._served_before += connection.served
        self.last_activity = time.monotonic()

    def _bug(self, error: BaseException) -> None:
        if self._log is not None:
            self._log.bug("handler failed", error)
        if not self.failed.done():
            self.failed.set_exception(error)

    def in_flight(self) -> list[InFlight]:
        """What is being served, for health answers."""
        now = time.monotonic()
        return [
            InFlight(
                type=call.type, age_ms=int((now - call.since) * 1000), peer=call.caller, doing=call.doing
            )
            for connection in self.connections
            for call in connection.in_flight.values()
        ]

    def stop_accepting(self) -> None:
        """Leave new connections to the next worker."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener.fileno())
        self._listeners.clear()

    def drain(self) -> None:
        """Leave new connections, and new requests of those that are here, to the next worker."""
        self.stop_accepting()
        for connection in self.connections:
            connection.draining = True

    async def close(self, grace: float = 0.0) -> None:
        """Drain, let running handlers finish for `grace` seconds, end every connection."""
        self.drain()
        end = time.monotonic() + grace
        while any(c.in_flight for c in self.connections) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.close()
        if self.failed.done():
            with contextlib.suppress(asyncio.CancelledError):
                self.failed.exception()
