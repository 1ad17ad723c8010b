"""Runs in: ops.

HTTP over listening sockets: reads one head, asks the route, writes one response. It owns the limits: how long
a client may take for the TLS handshake, to ask and to read, and how many may be there at once, for each
socket by itself, so that nobody on a network keeps out those on this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from ipc.log import Log
from ipc.tls import Certificates
from workers.ops import http1

Route = Callable[[], Awaitable[http1.Response]]
#: Answers all paths below one; it gets the last part of the path.
Below = Callable[[str], Awaitable[http1.Response]]

MAX_CONNECTIONS = 32  # of one door
HANDSHAKE_TIMEOUT = 5.0  # seconds for TLS
ASK_TIMEOUT = 5.0  # for a client to send its request
ANSWER_TIMEOUT = 30.0  # to make the response
READ_TIMEOUT = 10.0  # for a client to take it
ACCEPTS = 16  # connections taken at a time
RETRY = 0.2  # seconds without accepting when there are no more descriptors


@dataclass(eq=False)
class Door:
    """A listening socket. With `certificates` TLS is spoken there; `paths`: what is answered, None all."""

    listener: socket.socket
    certificates: Certificates | None = None
    paths: frozenset[str] | None = None
    clients: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def crowded(self) -> bool:
        """Whether as many are here as may be."""
        return len(self.clients) >= MAX_CONNECTIONS


class HttpServer:
    """Answers GET requests by path. `failed` ends with the first bug of a route.

    `on_outdated` is called when another worker is needed: there are certificates that this one cannot read.
    """

    def __init__(self, routes: Mapping[str, Route], below: Mapping[str, Below], log: Log) -> None:
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self.on_outdated: Callable[[], object] = lambda: None
        self._routes = routes
        self._below = below
        self._log = log
        self._doors: list[Door] = []
        self._served = 0
        self._seen = 0

    def open(self, door: Door) -> None:
        """Accept at a door. Takes its listener over."""
        door.listener.setblocking(False)
        self._doors.append(door)
        self._accept_at(door)

    async def close(self, grace: float) -> None:
        """Accept no more; give those that are being answered `grace` seconds."""
        doors, self._doors = self._doors, []
        for door in doors:
            self._loop.remove_reader(door.listener.fileno())
            door.listener.close()
        clients = {client for door in doors for client in door.clients}
        if clients:
            await asyncio.wait(clients, timeout=grace)
        for client in clients:
            client.cancel()

    def busy(self) -> bool:
        """Whether anybody is here, or was since the last time this was asked."""
        active = any(door.clients for door in self._doors) or self._served != self._seen
        self._seen = self._served
        return active

    # -- accepting ------------------------------------------------------------------------------------

    def _accept_at(self, door: Door) -> None:
        if door in self._doors:
            self._loop.add_reader(door.listener.fileno(), self._accept, door)

    def _accept(self, door: Door) -> None:
        if door.certificates is not None and door.certificates.outdated():
            self._loop.remove_reader(door.listener.fileno())  # who comes now waits for the next worker
            self.on_outdated()
            return
        for _ in range(ACCEPTS):
            try:
                sock, _address = door.listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no more descriptors: a little later there may be
                self._log.warning("cannot accept", why=error)
                self._loop.remove_reader(door.listener.fileno())
                self._loop.call_later(RETRY, self._accept_at, door)
                return
            self._accepted(door, sock)

    def _accepted(self, door: Door, sock: socket.socket) -> None:
        self._served += 1
        if door.crowded and door.certificates is not None:
            sock.close()  # a handshake would be work for somebody who gets nothing
            return
        client = self._loop.create_task(self._serve(door, sock, _crowded() if door.crowded else None))
        door.clients.add(client)
        client.add_done_callback(door.clients.discard)

    # -- one client -----------------------------------------------------------------------------------

    async def _serve(self, door: Door, sock: socket.socket, answer: http1.Response | None) -> None:
        reader = asyncio.StreamReader(limit=http1.HEAD_LIMIT)
        try:
            writer = await self._connect(door, sock, reader)
        except OSError as error:  # the handshake failed, or took too long
            self._log.info("client refused", why=error)
            sock.close()
            return
        try:
            response = answer or await self._response(door, reader)
            if response is not None:
                await _send(reader, writer, response)
        except (ConnectionError, ssl.SSLError):
            pass  # the client went away, or its certificate was refused: nobody is left to tell
        except Exception as error:  # noqa: BLE001 - a bug of ours: told to the owner, who ends the process
            if not self.failed.done():
                self.failed.set_exception(error)
        finally:
            writer.transport.abort()

    async def _connect(
        self, door: Door, sock: socket.socket, reader: asyncio.StreamReader
    ) -> asyncio.StreamWriter:
        """Make the connection asyncio's, with TLS where it is spoken. Raises OSError."""
        context = None if door.certificates is None else door.certificates.context()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT if context else None,
            ssl_shutdown_timeout=READ_TIMEOUT if context else None,
        )
        return asyncio.StreamWriter(transport, protocol, reader, self._loop)

    async def _response(self, door: Door, reader: asyncio.StreamReader) -> http1.Response | None:
        """The response to what a client asks, None if it asks nothing."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT):
                head = await reader.readuntil(http1.HEAD_END)
            return await self._route(door, http1.parse(head))
        except http1.Refused as refused:
            return http1.refusal(refused)
        except asyncio.LimitOverrunError:
            too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return http1.refusal(http1.Refused(too_large, f"more than {http1.HEAD_LIMIT} bytes of header"))
        except (asyncio.IncompleteReadError, TimeoutError):
            return None

    async def _route(self, door: Door, path: str) -> http1.Response:
        if door.paths is not None and path not in door.paths:
            known = ", ".join(sorted(door.paths))
            raise http1.Refused(HTTPStatus.FORBIDDEN, f"without a certificate of yours there is only {known}")
        route = self._routes.get(path) or self._route_below(path)
        if route is None:
            known = ", ".join(sorted([*self._routes, *(f"{parent}..." for parent in self._below)]))
            raise http1.Refused(HTTPStatus.NOT_FOUND, f"nothing is here; there is {known}")
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return await route()
        except TimeoutError:
            raise http1.Refused(HTTPStatus.GATEWAY_TIMEOUT, "no answer in time") from None

    def _route_below(self, path: str) -> Route | None:
        parent, _, name = path.rpartition("/")
        below = self._below.get(f"{parent}/")
        return functools.partial(below, name) if below is not None and name else None


def _crowded() -> http1.Response:
    text = f"{MAX_CONNECTIONS} clients are here already"
    return http1.refusal(http1.Refused(HTTPStatus.SERVICE_UNAVAILABLE, text))


async def _send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, response: http1.Response) -> None:
    """Write a response and wait until the client has taken it and closed, or has taken too long.

    What the client sends meanwhile is read and dropped: closing over unread bytes would reset the connection,
    and the response could be lost with it. TLS has no half that could be closed alone: its end is told, and
    the client's awaited, by the transport.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READ_TIMEOUT):
            writer.write(http1.render(response))
            await writer.drain()
            if not writer.can_write_eof():
                writer.close()
                await writer.wait_closed()
                return
            writer.write_eof()
            while await reader.read(http1.HEAD_LIMIT):
                pass
