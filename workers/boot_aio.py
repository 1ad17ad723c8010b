"""Runs in: cri, image, stream, ops, after workers/boot.py.

The skeleton of asyncio workers: server, control channel, idle exit, orderly stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from ipc import aio
from ipc.errors import Code, RemoteError
from ipc.fds import FdSet
from ipc.heap import Heap
from ipc.mapped import Mapped
from ipc.messages import Empty, control
from ipc.table import Handler
from workers.boot import HELLO_TIMEOUT, SUPERVISOR, Context, control_table, take_common


class Drain(Protocol):
    """What outlives a worker's being told to stop, and its supervisor."""

    def begin(self) -> bool:
        """Accept no more; True if something goes on."""

    async def wait(self) -> None:
        """Return when nothing goes on any more."""


class AioService:
    """An asyncio worker's server and control channel: `await start()`, then `await wait()`.

    With `drain`, an order of the supervisor, or its death, lets what was begun go on to its end; only a
    signal cuts that short.
    """

    def __init__(
        self,
        context: Context[Any],
        handlers: Mapping[str, Handler],
        *,
        on_reload: Callable[[bytes], object] | None = None,
        doing: Callable[[], str] | None = None,
        on_stop: Callable[[], Awaitable[object]] | None = None,
        busy: Callable[[], bool] | None = None,
        idle_exit: float | None = None,
        drain: Drain | None = None,
        on_hand_over: Callable[[str], Awaitable[object]] | None = None,
        counters: Callable[[], dict[str, int]] | None = None,
    ) -> None:
        self.server = aio.Server(handlers, context.settings.uids, log=context.log)
        self._context = context
        self._on_reload = on_reload
        self._on_stop = on_stop
        self._doing = doing or (lambda: "")
        self._busy = busy or (lambda: False)
        self._idle_exit = idle_exit
        self._grace = 5.0
        self._drain = drain
        self._counters = counters or dict
        self._heap = Heap()
        self._mapped = Mapped()
        self._stop = asyncio.Event()
        self._now = asyncio.Event()
        self._control: aio.Connection | None = None
        self._on_hand_over = on_hand_over
        self._turn = asyncio.Event()

    async def start(self) -> None:
        """Say hello to the supervisor, then accept, unless another worker's end must come first (`turn`).

        Raises RemoteError if the supervisor refuses.
        """
        assert self._context.control is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop_now)
        handlers = control_table(
            self._ping, self._told_to_stop, self._reload, begin=self._begin, hand_over=self._hand_over
        )
        self._control = aio.Connection(
            self._context.control, SUPERVISOR, handlers, log=self._context.log, on_bug=self._bug
        )
        self._control.on_close = lambda _connection: self._stop.set()
        await self.tell(control.Hello(report=self._context.report))
        if not self._context.standby:
            self._accept()

    async def turn(self) -> None:
        """Of a worker that stands by: wait for its turn, then accept. Raises aio.Lost if it is to end
        instead."""
        ends = [asyncio.create_task(self._turn.wait()), asyncio.create_task(self._stop.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        if not self._turn.is_set():
            raise aio.Lost("told to end before its turn came")
        self._accept()

    def _accept(self) -> None:
        if self._context.listener is not None:
            self.server.start(self._context.listener)

    async def tell(self, request: control.Hello | control.SocketBound | control.Drain) -> None:
        """Tell the supervisor something over the control channel. Raises RemoteError, aio.Lost."""
        assert self._control is not None
        await self._control.ask(request, FdSet(), time.monotonic() + HELLO_TIMEOUT)

    def stop(self) -> None:
        """Make wait() return."""
        self._stop.set()

    async def wait(self) -> None:
        """Serve until told to stop or idle for `idle_exit` seconds; raises the first bug of a handler."""
        idle = asyncio.create_task(self._watch_idle())
        stop = asyncio.create_task(self._stop.wait())
        try:
            ends: set[asyncio.Future[Any]] = {stop, idle, self.server.failed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self.server.failed.done():
                self.server.failed.result()
            self.server.drain()
            if self._context.listener is not None:
                self._context.listener.close()  # a supervisor that is gone must find its places free
            await self._drained()
            if self._on_stop is not None:
                await self._on_stop()
            await self.server.close(self._grace)
        finally:
            for task in (idle, stop):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def _stop_now(self) -> None:
        self._now.set()
        self._stop.set()

    async def _drained(self) -> None:
        """Let what was begun go on to its end; raises a bug of it."""
        if self._drain is None or not self._drain.begin():
            return
        with contextlib.suppress(aio.Lost, RemoteError):
            await self.tell(control.Drain())
        over = [asyncio.create_task(self._drain.wait()), asyncio.create_task(self._now.wait())]
        ends: set[asyncio.Future[Any]] = {*over, self.server.failed}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in over:
                task.cancel()

    async def _watch_idle(self) -> None:
        if self._idle_exit is None:
            await asyncio.Event().wait()
        assert self._idle_exit is not None
        last_busy = time.monotonic()
        while time.monotonic() - last_busy < self._idle_exit:
            await asyncio.sleep(min(1.0, self._idle_exit / 4))
            if self.server.connections or self._busy():
                last_busy = time.monotonic()

    async def _ping(self, _call: aio.Call, _body: control.Ping) -> control.Health:
        counters = {**self._counters(), "served": self.server.served}  # the supervisor recycles by it
        asyncio.get_running_loop().call_soon(self._heap.settle)
        asyncio.get_running_loop().call_soon(self._mapped.settle)
        return control.Health(requests=self.server.in_flight(), doing=self._doing(), counters=counters)

    async def _told_to_stop(self, _call: aio.Call, body: control.Stop) -> Empty:
        self._grace = body.grace_ms / 1000
        self._stop.set()
        return Empty()

    async def _begin(self, _call: aio.Call, _body: control.Begin) -> Empty:
        self._turn.set()
        return Empty()

    async def _hand_over(self, _call: aio.Call, body: control.HandOver) -> Empty:
        if self._on_hand_over is None:
            raise RemoteError(Code.UNIMPLEMENTED, f"a {self._context.kind} worker has nothing to hand over")
        self.server.drain()
        await self._on_hand_over(body.path)
        return Empty()

    async def _reload(self, _call: aio.Call, body: control.Reload) -> Empty:
        take_common(self._context, body.settings)
        if self._on_reload is not None:
            self._on_reload(body.settings)
        return Empty()

    def _bug(self, error: BaseException) -> None:
        if not self.server.failed.done():
            self.server.failed.set_exception(error)


async def serve_aio(
    context: Context[Any],
    handlers: Mapping[str, Handler],
    *,
    on_stop: Callable[[], Awaitable[object]] | None = None,
    on_reload: Callable[[bytes], object] | None = None,
    busy: Callable[[], bool] | None = None,
    idle_exit: float | None = None,
) -> None:
    """Serve `handlers` on the context's listener until told to stop, or idle for `idle_exit` seconds."""
    service = AioService(
        context, handlers, on_stop=on_stop, on_reload=on_reload, busy=busy, idle_exit=idle_exit
    )
    await service.start()
    await service.wait()
