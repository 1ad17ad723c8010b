"""Runs in: every worker, first code after the fork.

The skeleton that all workers share. A worker's main module has two functions: `prepare(context)`, still
root, imports and opens what it needs; `run(context, state)` serves, with the sandbox shut. What stands
between them is the supervisor's (`enter`). It owns the control channel to the supervisor: hello, health,
stop, reload. It refuses nothing and decides nothing. The asyncio half is workers/boot_aio.py, so that workers
without asyncio stay small.
"""

from __future__ import annotations

import gc
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from ipc import log
from ipc.channel import Peer
from ipc.errors import RemoteError
from ipc.heap import Heap
from ipc.log import LEVELS, Log
from ipc.loop import Loop
from ipc.messages import Body, Empty, control
from ipc.messages.supervisor import JobState, SandboxReport
from ipc.serve import Call, Connection, Server
from ipc.settings import Common
from ipc.table import Handler, table

S = TypeVar("S", bound=Common)
SUPERVISOR = Peer(0, 0, 0, "supervisor")
HELLO_TIMEOUT = 10.0


@dataclass
class Context(Generic[S]):
    """What the supervisor hands to a worker. The sockets are the worker's own from here on.

    `listener` listens at `<run_root>/ipc/<kind>.sock`; `control` is one end of a pair; `extra` holds further
    listening sockets by name. `report` is filled in when the sandbox is shut. `standby`: another worker of
    the kind still owns what this one will own.
    """

    kind: str
    settings: S
    log: Log
    listener: socket.socket | None = None
    control: socket.socket | None = None
    extra: dict[str, socket.socket] = field(default_factory=dict)
    report: SandboxReport = field(default_factory=lambda: SandboxReport(uid=0, gid=0))
    standby: bool = False


class WorkerModule(Protocol):
    """What workers/X/main.py offers, and `STANDS_BY = True` if it waits for its turn by itself."""

    def prepare(self, context: Context[Any]) -> Any: ...

    def run(self, context: Context[Any], state: Any) -> None: ...


def main(module: WorkerModule, context: Context[Any], enter: Callable[[], SandboxReport]) -> None:
    """A worker's life: prepare, shut the sandbox, run. Returns when the worker is to exit cleanly."""
    log.set_log(context.log)
    state = module.prepare(context)
    gc.collect()
    gc.freeze()  # what is loaded now stays: no collection looks at it again, in this process or its children
    context.report = enter()
    if not context.standby or getattr(module, "STANDS_BY", False) or stand_by(context):
        module.run(context, state)


def stand_by(context: Context[Any]) -> bool:
    """Say hello, answer pings, touch nothing until told to begin. False if the worker is to end instead."""
    assert context.control is not None
    loop, begun = Loop(), []

    def begin(_call: Call, _body: control.Begin) -> Empty:
        begun.append(True)
        loop.call_soon(loop.stop)
        return Empty()

    def stop(_call: Call, _body: control.Stop) -> Empty:
        loop.call_soon(loop.stop)
        return Empty()

    def reload(_call: Call, body: control.Reload) -> Empty:
        context.settings = msgspec.msgpack.decode(body.settings, type=type(context.settings))
        return Empty()

    def ping(_call: Call, _body: control.Ping) -> control.Health:
        return control.Health(doing="standing by")

    handlers = control_table(ping, stop, reload, begin=begin)
    connection = Connection(loop, context.control, SUPERVISOR, handlers, log=context.log)
    connection.on_close(loop.stop)
    connection.ask(control.Hello(report=context.report), _must_be_welcome, timeout=HELLO_TIMEOUT)
    loop.run()
    if begun:
        connection.detach()
    loop.close()
    return bool(begun)


def _must_be_welcome(answer: Body | RemoteError, _fds: object) -> None:
    if isinstance(answer, RemoteError):
        raise answer


# -- selector workers -------------------------------------------------------------------------------------


class Service:
    """A selector worker's server and control channel on one loop."""

    def __init__(
        self,
        context: Context[Any],
        loop: Loop,
        handlers: Mapping[str, Handler],
        *,
        on_reload: Callable[[bytes], object] | None = None,
        doing: Callable[[], str] | None = None,
        on_stop: Callable[[], object] | None = None,
        queued: Callable[[], int] | None = None,
        jobs: Callable[[], list[JobState]] | None = None,
    ) -> None:
        self.server = Server(loop, handlers, context.settings.uids, log=context.log)
        self._context = context
        self._loop = loop
        self._on_reload = on_reload
        self._on_stop = on_stop
        self._doing = doing or (lambda: "")
        self._queued = queued or (lambda: 0)
        self._jobs = jobs or list
        self._heap = Heap()
        self._stopping = False

    def run(self) -> None:
        """Say hello, serve until told to stop."""
        assert self._context.control is not None
        self._loop.on_signal(signal.SIGTERM, lambda: self._stop(5.0))
        connection = Connection(
            self._loop, self._context.control, SUPERVISOR, self._control_handlers(), log=self._context.log
        )
        connection.on_close(self._loop.stop)
        if self._context.standby:  # it was said before
            self._accept()
        else:
            connection.ask(control.Hello(report=self._context.report), self._welcome, timeout=HELLO_TIMEOUT)
        self._loop.run()
        self.server.close()

    def _control_handlers(self) -> Mapping[str, Handler]:
        return control_table(self._ping, self._told_to_stop, self._reload)

    def _welcome(self, answer: Body | RemoteError, _fds: object) -> None:
        _must_be_welcome(answer, _fds)
        self._accept()

    def _accept(self) -> None:
        if self._context.listener is not None:
            self.server.listen(self._context.listener)

    def _ping(self, _call: Call, _body: control.Ping) -> control.Health:
        self._loop.call_soon(self._heap.settle)
        counters = {"queued": self._queued()}
        return control.Health(
            requests=self.server.in_flight(), doing=self._doing(), counters=counters, jobs=self._jobs()
        )

    def _told_to_stop(self, _call: Call, body: control.Stop) -> Empty:
        self._stop(body.grace_ms / 1000)
        return Empty()

    def _reload(self, _call: Call, body: control.Reload) -> Empty:
        take_common(self._context, body.settings)
        if self._on_reload is not None:
            self._on_reload(body.settings)
        return Empty()

    def _stop(self, grace: float) -> None:
        if not self._stopping:
            self._stopping = True
            self.server.drain()
            if self._on_stop is not None:
                self._on_stop()
            self._finish(time.monotonic() + grace)

    def _finish(self, until: float) -> None:
        if not self.server.in_flight() or time.monotonic() >= until:
            self._loop.call_soon(self._loop.stop)
        else:
            self._loop.call_later(0.02, lambda: self._finish(until))


def serve(
    context: Context[Any],
    loop: Loop,
    handlers: Mapping[str, Handler],
    *,
    on_reload: Callable[[bytes], object] | None = None,
    doing: Callable[[], str] | None = None,
    on_stop: Callable[[], object] | None = None,
    queued: Callable[[], int] | None = None,
    jobs: Callable[[], list[JobState]] | None = None,
) -> None:
    """Serve `handlers` on the context's listener until the supervisor or SIGTERM says stop."""
    service = Service(
        *(context, loop, handlers),
        on_reload=on_reload,
        doing=doing,
        on_stop=on_stop,
        queued=queued,
        jobs=jobs,
    )
    service.run()


def take_common(context: Context[Any], settings: bytes) -> None:
    """What every worker changes on a reload: how much it logs."""
    common = msgspec.msgpack.decode(settings, type=Common)
    context.log.level = LEVELS[common.log_level]
    context.log.info("settings taken", log_level=common.log_level)


# -- the control channel ----------------------------------------------------------------------------------


def control_table(
    ping: Callable[..., Any],
    stop: Callable[..., Any],
    reload: Callable[..., Any],
    *,
    begin: Callable[..., Any] | None = None,
    hand_over: Callable[..., Any] | None = None,
) -> Mapping[str, Handler]:
    """Return the handlers of the control channel, the same for every worker but one that stands by, and one
    that hands over."""
    callers = frozenset({"supervisor"})
    rows = [
        Handler(control.Ping, ping, callers),
        Handler(control.Stop, stop, callers),
        Handler(control.Reload, reload, callers),
    ]
    rows += [Handler(control.Begin, begin, callers)] if begin is not None else []
    rows += [Handler(control.HandOver, hand_over, callers)] if hand_over is not None else []
    return table(*rows)
