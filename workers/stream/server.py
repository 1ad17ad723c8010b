"""Runs in: stream.

Accepts clients, reads what they ask, redeems their token at cri and runs their session. It owns the table of
sessions and the limits of clients that have none yet: how long they may take, how many may be there at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from ipc import aio
from ipc.errors import Code, RemoteError
from ipc.fds import FdSet
from ipc.log import Log
from ipc.messages.cri import Redeemed, SessionOpen, TokenRedeem
from ipc.messages.monitor import SessionOpened
from ipc.messages.stream import SessionState
from ipc.settings import StreamSettings
from ipc.tls import Certificates
from workers.stream import sessions, upgrade
from workers.stream.sessions import Terms
from workers.stream.upgrade import Asked, Refused, Upgrade
from workers.stream.wire import Wire

REDEEM_TIMEOUT = 10.0
OPEN_TIMEOUT = 60.0  # to start an exec, to connect to a port
IDLE_CLOSE = 30.0
ACCEPTS = 16  # connections taken at a time
RETRY = 0.2  # seconds without accepting when there are no more descriptors

#: What a client is answered whose token cri does not take.
STATUSES = {
    Code.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Code.PERMISSION_DENIED: HTTPStatus.NOT_FOUND,
    Code.INVALID_ARGUMENT: HTTPStatus.NOT_FOUND,
    Code.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
}


@dataclass
class Entry:
    """A row of the table of sessions."""

    terms: Terms
    wire: Wire
    since: float

    def state(self, now: float) -> SessionState:
        """The row as operators see it."""
        return SessionState(
            kind=self.terms.kind,
            transport=self.terms.agreed.transport,
            protocol=self.terms.agreed.protocol,
            pod_id=self.terms.redeemed.pod_id,
            container_id=self.terms.redeemed.container_id,
            age_ms=int((now - self.since) * 1000),
            idle_ms=int((now - self.wire.touched) * 1000),
            bytes_in=self.wire.bytes_in,
            bytes_out=self.wire.bytes_out,
        )


class StreamServer:
    """Serves on one listening socket. `failed` ends with the first bug of a session."""

    def __init__(self, settings: StreamSettings, log: Log, certificates: Certificates) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: Told when another worker is needed: there are newer certificates, which this one cannot read.
        self.on_outdated: Callable[[], object] = lambda: None
        self._settings = settings
        self._log = log
        self._certificates = certificates
        self._cri = aio.Client(settings.ipc_socket("cri"), idle_close=IDLE_CLOSE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._entries: dict[int, Entry] = {}
        self.lagged = 0  # clients that were let go, since they did not keep up with the output
        self._numbers = 0
        self._seen = 0
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._accepting = False

    # -- life -----------------------------------------------------------------------------------------

    def start(self, listener: socket.socket) -> None:
        """Accept on a listening TCP socket. Takes it over."""
        listener.setblocking(False)
        self._listener = listener
        self._accept_on()

    def begin(self) -> bool:
        """Accept no more and let go of the listener; True if there are clients."""
        self._accept_off()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        return bool(self._tasks)

    async def wait(self) -> None:
        """Return when the last client has gone. Raises the first bug of a session."""
        while self._tasks and not self.failed.done():
            await asyncio.wait({*self._tasks, self.failed}, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Accept no more; end every session."""
        self.begin()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._cri.close()

    def busy(self) -> bool:
        """Whether anybody is here, or was since the last time this was asked."""
        active = bool(self._tasks) or self._numbers != self._seen
        self._seen = self._numbers
        return active

    @property
    def connections(self) -> int:
        """How many clients there are, those without a session among them."""
        return len(self._tasks)

    def table(self) -> list[SessionState]:
        """The sessions that are open."""
        now = time.monotonic()
        return [entry.state(now) for entry in self._entries.values()]

    # -- accepting ------------------------------------------------------------------------------------

    def _accept_on(self) -> None:
        if self._listener is not None and not self._accepting:
            self._accepting = True
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept_off(self) -> None:
        if self._listener is not None and self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        assert self._listener is not None
        if self._certificates.outdated():
            self._accept_off()  # who comes now waits for the next worker
            self.on_outdated()
            return
        for _ in range(ACCEPTS):
            if len(self._tasks) >= self._settings.max_connections:
                self._accept_off()  # the rest waits in the kernel's queue, until somebody leaves
                return
            try:
                sock, _address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no more descriptors: a little later there may be
                self._log.warning("cannot accept", why=error)
                self._accept_off()
                self._loop.call_later(RETRY, self._accept_on)
                return
            self._started(sock)

    def _started(self, sock: socket.socket) -> None:
        self._numbers += 1
        task = self._loop.create_task(self._serve(sock, self._numbers))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.failed.done():
            self.failed.set_exception(error)
        if not self.failed.done() and self._listener is not None:
            self._accept_on()

    # -- one client -----------------------------------------------------------------------------------

    async def _serve(self, sock: socket.socket, number: int) -> None:
        wire = Wire()
        try:
            if await self._connect(wire, sock):
                await self._answer(wire, number)
        finally:
            self._entries.pop(number, None)
            wire.abort()

    async def _connect(self, wire: Wire, sock: socket.socket) -> bool:
        """Make the connection asyncio's, with TLS if configured."""
        timeout = self._settings.head_timeout
        try:
            context = self._certificates.context()
            await self._loop.connect_accepted_socket(
                lambda: wire, sock, ssl=context, ssl_handshake_timeout=timeout if context else None
            )
        except OSError as error:  # the handshake failed, or took too long
            self._log.info("client refused", why=error)
            sock.close()
            return False
        return True

    async def _answer(self, wire: Wire, number: int) -> None:
        request = Upgrade()
        try:
            asked = await self._asked(wire, request)
            if asked is None:
                return
            redeemed = await self._redeem(asked)
            agreed = upgrade.negotiate(asked)
        except Refused as refused:
            wire.write([upgrade.render(refused)])
            await wire.finish()
            return
        head, trailing = request.switch(agreed)
        wire.write([head])
        wire.early = trailing + wire.early
        await self._session(Entry(Terms(asked.kind, redeemed, agreed), wire, time.monotonic()), number)

    async def _asked(self, wire: Wire, request: Upgrade) -> Asked | None:
        """What the client asks; None if it asks nothing in time. Raises Refused."""
        answer: asyncio.Future[Asked] = self._loop.create_future()

        def receive(data: bytes) -> None:
            try:
                asked = request.receive(data)
            except Refused as refused:
                wire.receive_nothing()
                answer.set_exception(refused)
                return
            if asked is not None:
                wire.receive_nothing()
                answer.set_result(asked)

        wire.receive_with(receive)
        lost = self._loop.create_task(wire.lost.wait())
        try:
            ends: set[asyncio.Future[Any]] = {answer, lost}
            await asyncio.wait(ends, timeout=self._settings.head_timeout, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else None
        finally:
            lost.cancel()
            answer.cancel()

    async def _redeem(self, asked: Asked) -> Redeemed:
        try:
            request = TokenRedeem(token=asked.token, kind=asked.kind)
            redeemed = await self._cri.call(request, timeout=REDEEM_TIMEOUT)
        except RemoteError as error:
            status = STATUSES.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
            fields = [("Retry-After", "60")] if status is HTTPStatus.TOO_MANY_REQUESTS else []
            raise Refused(status, "there is no such session", fields) from None
        redeemed.ports = redeemed.ports or asked.ports
        return redeemed

    def _lagged(self) -> None:
        self.lagged += 1

    async def _session(self, entry: Entry, number: int) -> None:
        self._entries[number] = entry

        async def open_(port: int) -> tuple[SessionOpened, FdSet]:
            request = SessionOpen(session=terms.redeemed.session, port=port)
            return await self._cri.call_fds(request, timeout=OPEN_TIMEOUT)

        terms = entry.terms
        words = {"kind": terms.kind, "pod": terms.redeemed.pod_id, "container": terms.redeemed.container_id}
        self._log.info("session", transport=terms.agreed.transport, protocol=terms.agreed.protocol, **words)
        session = sessions.make(terms, entry.wire, open_, self._settings, self._lagged)
        with contextlib.suppress(ConnectionError):
            await session.run()
        wire = entry.wire
        self._log.info("session ended", bytes_in=wire.bytes_in, bytes_out=wire.bytes_out, **words)
