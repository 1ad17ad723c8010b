"""Runs in: ops.

HTTP over a listening Unix socket: reads one head, asks the route, writes one response. It owns the limits:
how long a client may take to ask and to read, how many may be there at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from workers.ops import http1

Route = Callable[[], Awaitable[http1.Response]]
#: Answers all paths below one; it gets the last part of the path.
Below = Callable[[str], Awaitable[http1.Response]]

MAX_CONNECTIONS = 32
ASK_TIMEOUT = 5.0  # seconds for a client to send its request
ANSWER_TIMEOUT = 30.0  # to make the response
READ_TIMEOUT = 10.0  # for a client to take it


class HttpServer:
    """Answers GET requests by path. `failed` ends with the first bug of a route."""

    def __init__(self, routes: Mapping[str, Route], below: Mapping[str, Below]) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._routes = routes
        self._below = below
        self._tasks: set[asyncio.Task[None]] = set()
        self._served = 0
        self._seen = 0
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket) -> None:
        """Accept on a listening stream socket. Takes it over."""
        listener.setblocking(False)
        self._server = await asyncio.start_unix_server(self._accepted, sock=listener, limit=http1.HEAD_LIMIT)

    async def close(self, grace: float) -> None:
        """Accept no more; give those that are being answered `grace` seconds."""
        if self._server is not None:
            self._server.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        for task in list(self._tasks):
            task.cancel()

    def busy(self) -> bool:
        """Whether anybody is here, or was since the last time this was asked."""
        active = bool(self._tasks) or self._served != self._seen
        self._seen = self._served
        return active

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        crowded = len(self._tasks) >= MAX_CONNECTIONS
        self._tasks.add(task)
        self._served += 1
        try:
            response = _crowded() if crowded else await self._response(reader)
            if response is not None:
                await _send(reader, writer, response)
        except ConnectionError:
            pass  # the client went away: nobody is left to tell
        except Exception as error:  # noqa: BLE001 - a bug of ours: told to the owner, who ends the process
            if not self.failed.done():
                self.failed.set_exception(error)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _response(self, reader: asyncio.StreamReader) -> http1.Response | None:
        """The response to what a client asks, None if it asks nothing."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT):
                head = await reader.readuntil(http1.HEAD_END)
            return await self._route(http1.parse(head))
        except http1.Refused as refused:
            return http1.refusal(refused)
        except asyncio.LimitOverrunError:
            too_large = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return http1.refusal(http1.Refused(too_large, f"more than {http1.HEAD_LIMIT} bytes of header"))
        except (asyncio.IncompleteReadError, TimeoutError):
            return None

    async def _route(self, path: str) -> http1.Response:
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
    and the response could be lost with it.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READ_TIMEOUT):
            writer.write(http1.render(response))
            writer.write_eof()
            await writer.drain()
            while await reader.read(http1.HEAD_LIMIT):
                pass
