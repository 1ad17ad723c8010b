"""Runs in: nri. One plugin's socket: calls go out, requests come in, and a liar or a dead one is let go.

Owns the socket. Sans-IO parts: mux.py, ttrpc.py. A connection ends once, with a reason; whoever waits for
an answer then gets Gone. Refuses a plugin that does not read what it asked for.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from . import mux, ttrpc
from .interface import PLUGIN, PLUGIN_CALLS, RUNTIME, RUNTIME_CALLS

M = TypeVar("M", bound=Message)
LEFT = "it closed its connection"
MAX_UNREAD = 16 << 20  # bytes that wait for a plugin to read them

#: Answers a request of the plugin: method, request -> reply. Raises Refused.
Serve = Callable[[str, Message], Awaitable[Message]]


class Gone(Exception):
    """The plugin is disconnected: it died, lied, or did not answer in time."""


class Refused(Exception):
    """The other side answered with a failure."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Connection(asyncio.Protocol):
    """The protocol object of one socket. `on_gone` is called once, with the reason."""

    def __init__(self, serve: Serve, on_gone: Callable[[str], object]) -> None:
        self.closed = False
        self._serve = serve
        self._on_gone = on_gone
        self._demultiplexer = mux.Demultiplexer()
        self._caller = ttrpc.Caller()
        self._answerer = ttrpc.Answerer()
        self._waiting: dict[int, asyncio.Future[ttrpc.Answer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.Transport | None = None

    async def take(self, sock: socket.socket) -> None:
        """Serve on a connected socket, which it takes over."""
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self, sock)

    # -- asking ---------------------------------------------------------------------------------------

    async def call(self, method: str, request: Message, reply: type[M], timeout: float) -> M:
        """Ask the plugin. No answer in time ends the connection. Raises Refused, Gone."""
        if self.closed:
            raise Gone("it is disconnected")
        try:
            stream, data = self._caller.ask(PLUGIN, method, request.SerializeToString(), int(timeout * 1e9))
        except ValueError as error:
            raise Refused(ttrpc.Status.RESOURCE_EXHAUSTED, f"it cannot be told: {error}") from error
        future: asyncio.Future[ttrpc.Answer] = asyncio.get_running_loop().create_future()
        self._waiting[stream] = future
        self._send(mux.PLUGIN_SERVICE, data)
        try:
            async with asyncio.timeout(timeout):
                answer = await future
        except TimeoutError:
            self.close(f"{method}: no answer within {timeout:g} s")
            raise Gone(f"{method}: no answer within {timeout:g} s") from None
        finally:
            self._waiting.pop(stream, None)
        return self._reply(method, answer, reply)

    def _reply(self, method: str, answer: ttrpc.Answer, reply: type[M]) -> M:
        if answer.code:
            raise Refused(answer.code, answer.text)
        try:
            return reply.FromString(answer.payload)
        except DecodeError as error:
            self.close(f"{method}: what it answered is no {reply.DESCRIPTOR.name}")
            raise Gone(f"{method}: {error}") from error

    # -- asyncio.Protocol -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol."""
        try:
            for number, piece in self._demultiplexer.feed(data):
                self._piece(number, piece)
        except (mux.MuxError, ttrpc.ProtocolError) as error:
            self.close(f"it broke the protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol."""
        self.close(f"its socket failed: {exc}" if exc else LEFT)

    def _piece(self, number: int, piece: bytes) -> None:
        if number == mux.PLUGIN_SERVICE:
            for answer in self._caller.feed(piece):
                future = self._waiting.get(answer.stream)
                if future is not None and not future.done():
                    future.set_result(answer)
        elif number == mux.RUNTIME_SERVICE:
            for asked in self._answerer.feed(piece):
                task = asyncio.get_running_loop().create_task(self._answer(asked))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    # -- answering ------------------------------------------------------------------------------------

    async def _answer(self, asked: ttrpc.Asked) -> None:
        call = RUNTIME_CALLS.get(asked.method) if asked.service == RUNTIME else None
        try:
            if call is None:
                raise Refused(ttrpc.Status.UNIMPLEMENTED, f"there is no {asked.service}/{asked.method}")
            reply = await self._serve(asked.method, _decoded(call.request, asked.payload))
            data = self._answerer.answer(asked.stream, reply.SerializeToString())
        except ValueError as error:  # longer than a message can be
            data = self._answerer.refuse(asked.stream, ttrpc.Status.RESOURCE_EXHAUSTED, str(error))
        except Refused as error:
            data = self._answerer.refuse(asked.stream, error.code, error.text)
        self._send(mux.RUNTIME_SERVICE, data)

    # -- sending --------------------------------------------------------------------------------------

    def _send(self, number: int, message: bytes) -> None:
        if self.closed or self._transport is None:
            return
        if self._transport.get_write_buffer_size() > MAX_UNREAD:
            self.close("it does not read")
            return
        self._transport.write(mux.frames(number, message))

    def close(self, why: str) -> None:
        """End the connection."""
        if self.closed:
            return
        self.closed = True
        if self._transport is not None:
            self._transport.abort()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Gone(why))
        for task in self._tasks:
            task.cancel()
        self._on_gone(why)


def _decoded(kind: type[Message], payload: bytes) -> Message:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise Refused(ttrpc.Status.INVALID_ARGUMENT, f"no {kind.DESCRIPTOR.name}: {error}") from error


def reply_of(method: str) -> type[Message]:
    """The type that a plugin answers a call with."""
    return PLUGIN_CALLS[method].reply
