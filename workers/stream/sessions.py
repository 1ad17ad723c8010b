"""Runs in: stream.

One session from the agreed protocol to its end: exec and attach (RemoteCommand), port-forward (PortForward).
It opens the container's side at cri when the client is ready, moves bytes with bounded buffers, and closes
both sides in order. Whoever is slow is waited for by his own source and nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from ipc.errors import RemoteError
from ipc.fds import FdSet
from ipc.messages.cri import Redeemed
from ipc.messages.monitor import SessionEnd, SessionOpened
from ipc.settings import StreamSettings
from ipc.streams.websocket import TUNNEL
from workers.stream import clients, portforward, remotecommand
from workers.stream.descriptors import Sink, Source
from workers.stream.remotecommand import STDIN, STDOUT, Outcome, Wanted
from workers.stream.upgrade import SPDY, Agreed
from workers.stream.wire import Wire

Open = Callable[[int], Awaitable[tuple[SessionOpened, FdSet]]]

STATUS_LIMIT = 4096
QUIET = 0.5  # seconds without output after which an ended session waits for no more of it
_DOING = {"exec": "executing command in container", "attach": "attaching to container"}


@dataclass(frozen=True)
class Terms:
    """What a session is: its kind, what its token was given for, what its client speaks."""

    kind: str
    redeemed: Redeemed
    agreed: Agreed


async def ended(wire: Wire, idle_timeout: float) -> None:
    """Return when the client is gone, or nothing has moved for too long."""
    while not wire.lost.is_set():
        left = wire.touched + idle_timeout - time.monotonic()
        if left <= 0:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                await wire.lost.wait()


def named(opened: SessionOpened, fds: FdSet) -> dict[str, int]:
    """The descriptors by name, taken out of the set."""
    return {name: fds.take(index) for index, name in enumerate(opened.fds) if index < len(fds)}


class RemoteCommand:
    """exec or attach."""

    def __init__(
        self, terms: Terms, wire: Wire, open_: Open, settings: StreamSettings, on_lag: Callable[[], object]
    ) -> None:
        redeemed = terms.redeemed
        self._on_lag = on_lag
        self._kind, self._agreed, self._wire, self._open = terms.kind, terms.agreed, wire, open_
        self._settings = settings
        self._wanted = Wanted(
            stdin=redeemed.stdin, stdout=redeemed.stdout, stderr=redeemed.stderr, tty=redeemed.tty
        )
        self._stdin = Sink(on_full=lambda: wire.hold(self), on_room=lambda: wire.release(self))
        self._sizes: remotecommand.Sizes | None = remotecommand.Sizes() if redeemed.tty else None
        self._size: tuple[int, int] | None = None
        self._terminal = -1
        self._sources: dict[str, Source] = {}
        self._status: Source | None = None
        self._client = self._connected()

    def _connected(self) -> clients.SpdyClient | clients.WebSocketClient:
        protocol = self._agreed.protocol
        if self._agreed.transport == SPDY:
            expected = self._wanted.spdy_streams(protocol)
            most = self._settings.max_streams
            return clients.SpdyClient(self._wire, expected, most, self._data, self._end)
        return clients.WebSocketClient(self._wire, protocol, self._wanted, self._data, self._end)

    # -- from the client ------------------------------------------------------------------------------

    def _data(self, name: str, data: bytes) -> None:
        if name == STDIN:
            self._stdin.write(data)
        elif self._sizes is not None:
            try:
                for size in self._sizes.receive(data)[-1:]:
                    self._size = size
                    self._resize()
            except remotecommand.BadSize:
                self._sizes = None

    def _end(self, name: str) -> None:
        if name == STDIN:
            self._stdin.end()

    def _resize(self) -> None:
        if self._terminal >= 0 and self._size is not None:
            width, height = self._size
            with contextlib.suppress(OSError):  # the container's side has ended
                fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    # -- life -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the container's side has ended, or the client is gone."""
        self._wire.receive_with(self._client.receive)
        gone = asyncio.create_task(ended(self._wire, self._settings.idle_timeout))
        work = asyncio.create_task(self._work())
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
            self._close()

    async def _work(self) -> None:
        try:
            async with asyncio.timeout(self._settings.creation_timeout):
                await self._client.ready()
        except TimeoutError:
            return  # as the peers do it: closed without a status
        try:
            self._adopt(*await self._open(0))
        except RemoteError as error:
            await self._finish(self._failed(error.text))
            return
        pumps = [asyncio.create_task(self._pump(name)) for name in self._sources]
        try:
            outcome = await self._outcome()
            for source in self._sources.values():
                source.end_when_quiet(QUIET)
            await asyncio.gather(*pumps)
            await self._finish(outcome)
        except ConnectionError:
            pass  # the client is gone: nobody is left to tell
        finally:
            for pump in pumps:
                pump.cancel()

    def _adopt(self, opened: SessionOpened, fds: FdSet) -> None:
        roles = named(opened, fds)
        self._terminal = roles.pop("terminal", -1)
        if self._terminal >= 0:
            for name in (STDIN, STDOUT):
                if name not in roles and getattr(self._wanted, name):
                    roles[name] = fcntl.fcntl(self._terminal, fcntl.F_DUPFD_CLOEXEC, 0)
            self._resize()
        for name in self._wanted.outputs():
            if name in roles:
                self._sources[name] = Source(roles.pop(name))
        if STDIN in roles:
            self._stdin.attach(roles.pop(STDIN), ends=self._terminal < 0)
        else:
            self._stdin.drop()
        if "status" in roles:
            self._status = Source(roles.pop("status"))
        FdSet(roles.values()).close()

    async def _pump(self, name: str) -> None:
        source = self._sources[name]
        while data := await source.read():
            self._client.send(name, data)
            await self._wire.drain()

    async def _outcome(self) -> Outcome:
        """How the container's side says that it ended."""
        raw = b""
        while self._status is not None and (data := await self._status.read()):
            raw += data
            if len(raw) > STATUS_LIMIT:
                break
        try:
            end = msgspec.msgpack.decode(raw, type=SessionEnd)
        except msgspec.DecodeError:
            return self._failed("the container's monitor is gone")
        if end.lagged:
            self._on_lag()
        if end.error:
            return self._failed(end.error)
        return Outcome(exit_code=end.exit_code if self._kind == "exec" else 0)

    def _failed(self, text: str) -> Outcome:
        return Outcome(error=f"error {_DOING[self._kind]}: {text}")

    async def _finish(self, outcome: Outcome) -> None:
        status = remotecommand.status(outcome, self._agreed.protocol)
        if status:
            self._client.send(remotecommand.ERROR, status)
        self._client.close(self._wanted.outputs())
        await self._wire.finish()

    def _close(self) -> None:
        self._stdin.close()
        for source in (*self._sources.values(), *([self._status] if self._status else [])):
            source.close()
        FdSet([self._terminal] if self._terminal >= 0 else []).close()


class PortForward:
    """Any number of connections into a pod over one client's connection."""

    def __init__(self, terms: Terms, wire: Wire, open_: Open, settings: StreamSettings) -> None:
        self._redeemed, self._agreed, self._wire, self._open = terms.redeemed, terms.agreed, wire, open_
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()
        self._client: portforward.SpdyClient | portforward.WebSocketClient | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting: list[tuple[Forwarded, int, int]] = []

    async def run(self) -> None:
        """Serve until the client is gone."""
        gone = asyncio.create_task(ended(self._wire, self._settings.idle_timeout))
        try:
            self._client = self._connected()
            for forwarded, handle, port in self._waiting:
                self._start(forwarded, handle, port)
            self._wire.receive_with(self._client.receive)
            await asyncio.wait({gone, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            self._client.goodbye()
        finally:
            gone.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self) -> portforward.SpdyClient | portforward.WebSocketClient:
        settings = self._settings
        most, timeout = settings.max_streams, settings.creation_timeout
        if self._agreed.transport == SPDY:
            return portforward.SpdyClient(self._wire, most, timeout, self._pair)
        if self._agreed.protocol == TUNNEL:
            return portforward.TunnelledClient(self._wire, most, timeout, self._pair)
        ports = self._redeemed.ports[: min(128, settings.max_streams // 2)]
        return portforward.WebSocketClient(self._wire, self._agreed.protocol, ports, self._pair)

    def _pair(self, handle: int, port: int) -> Forwarded:
        forwarded = Forwarded(self._wire, self._settings.stall_timeout, lambda: len(self._tasks) > 1)
        if self._client is None:
            self._waiting.append((forwarded, handle, port))
        else:
            self._start(forwarded, handle, port)
        return forwarded

    def _start(self, forwarded: Forwarded, handle: int, port: int) -> None:
        task = asyncio.create_task(self._forward(forwarded, handle, port))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._failed.done():
            self._failed.set_exception(error)

    async def _forward(self, forwarded: Forwarded, handle: int, port: int) -> None:
        assert self._client is not None
        error = ""
        try:
            opened, fds = await self._open(port)
            with fds:
                error = await forwarded.run(named(opened, fds)["socket"], self._client, handle)
        except RemoteError as failure:
            error = failure.text
        except ConnectionError:
            pass  # the client is gone
        finally:
            forwarded.close()
            pod = f"pod {self._redeemed.pod_id}, uid {self._redeemed.pod_uid}"
            self._client.close(handle, error and f"error forwarding port {port} to {pod}: {error}")


class Forwarded:
    """One connection into a pod: what the client sends goes in, what comes out goes to the client."""

    def __init__(self, wire: Wire, stall_timeout: float, others: Callable[[], bool]) -> None:
        self._wire = wire
        self._stall_timeout = stall_timeout
        self._others = others
        self._sink = Sink(self._full, self._room, self._broken)
        self._over = asyncio.Event()  # the client sends no more, or its part cannot be delivered
        self._stalled = ""
        self._timer: asyncio.TimerHandle | None = None
        self._main: asyncio.Task[None] | None = None
        self._given_up = False

    # -- from the client ------------------------------------------------------------------------------

    def data(self, data: bytes) -> None:
        self._sink.write(data)

    def end(self) -> None:
        self._sink.end()
        self._over.set()

    def reset(self) -> None:
        self._sink.drop()
        self._give_up()

    def _full(self) -> None:
        self._wire.hold(self)
        self._timer = asyncio.get_running_loop().call_later(self._stall_timeout, self._stall)

    def _room(self) -> None:
        self._wire.release(self)
        if self._timer is not None:
            self._timer.cancel()

    def _stall(self) -> None:
        """It takes nothing and the client's other connections wait for it: they come first."""
        if self._others():
            self._stalled = f"nothing was taken for {self._stall_timeout:g} s"
            self._sink.drop()
            self._give_up()

    def _broken(self) -> None:
        self._over.set()

    def _give_up(self) -> None:
        self._given_up = True
        self._over.set()
        if self._main is not None:
            self._main.cancel()

    # -- life -----------------------------------------------------------------------------------------

    async def run(self, fd: int, client: portforward.Client, handle: int) -> str:
        """Move bytes both ways until both have ended; what went wrong, or nothing."""
        if self._given_up:
            os.close(fd)
            return self._stalled
        source = Source(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0))
        self._sink.attach(fd)
        self._main = asyncio.create_task(self._out(source, client, handle))
        try:
            await asyncio.wait({self._main})
            if not self._main.cancelled():
                self._main.result()
                await self._over.wait()
            return self._stalled
        finally:
            self._main.cancel()
            await asyncio.gather(self._main, return_exceptions=True)
            source.close()

    async def _out(self, source: Source, client: portforward.Client, handle: int) -> None:
        while data := await source.read():
            client.send(handle, data)
            await self._wire.drain()
        client.end(handle)

    def close(self) -> None:
        """Close the pod's side."""
        self._sink.close()
        if self._timer is not None:
            self._timer.cancel()


def make(
    terms: Terms, wire: Wire, open_: Open, settings: StreamSettings, on_lag: Callable[[], object]
) -> RemoteCommand | PortForward:
    """The session of a kind. `on_lag`: its client was let go, since it did not keep up with the output."""
    if terms.kind == "portforward":
        return PortForward(terms, wire, open_, settings)
    return RemoteCommand(terms, wire, open_, settings, on_lag)
