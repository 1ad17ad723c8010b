"""Runs in: the monitor.

The monitor's whole API: its table of handlers at `monitors/<id>/ctl.sock`, and `run`, which the supervisor
calls after the fork with everything loaded. It ends when the container's record is on disk and the runtime's
state is deleted, or when it was never asked to create one; no signal but SIGKILL ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from typing import Protocol

from ipc import kernel, wire
from ipc.errors import RemoteError
from ipc.log import Log
from ipc.loop import Loop
from ipc.messages import Body, Empty
from ipc.messages import monitor as messages
from ipc.serve import Call, Server
from ipc.settings import MonitorSettings
from ipc.table import ROOT, Handler, Handlers, table
from workers.monitor.container import Container, Status
from workers.monitor.containerlog import ContainerLog
from workers.monitor.procfs import signal_number
from workers.monitor.reaper import Reaper
from workers.monitor.runtime import Launcher

CALLERS = frozenset({"cri", ROOT})
UNUSED = 600.0  # seconds that a monitor waits for its `create`
MAX_REQUESTS = 256
_IGNORED = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Context(Protocol):
    """What the supervisor hands over; `settings` are MonitorSettings."""

    settings: MonitorSettings
    log: Log


class Service:
    """The handlers, over one container."""

    def __init__(self, container: Container) -> None:
        self._container = container

    def handlers(self) -> Handlers:
        """Return the table: this is all that a monitor can be asked."""
        return table(
            Handler(messages.Create, self.create, CALLERS),
            Handler(messages.Start, self.start, CALLERS),
            Handler(messages.Stop, self.stop, CALLERS),
            Handler(messages.Wait, self.wait, CALLERS),
            Handler(messages.Delete, self.delete, CALLERS),
            Handler(messages.Update, self.update, CALLERS),
            Handler(messages.StateGet, self.state, CALLERS),
            Handler(messages.LogReopen, self.log_reopen, CALLERS),
            Handler(messages.ExecSync, self.exec_sync, CALLERS),
        )

    def create(self, call: Call, body: messages.Create) -> None:
        call.doing = "runtime create"
        self._container.create(body, _answer(call))

    def start(self, call: Call, body: messages.Start) -> None:
        call.doing = "runtime start"
        self._container.start(body, _answer(call))

    def stop(self, call: Call, body: messages.Stop) -> None:
        call.doing = "waiting for the container's end"
        self._container.stop(
            signal_number(body.signal), max(0, body.grace_ms) / 1000, _answer(call, _stopped)
        )

    def wait(self, call: Call, _body: messages.Wait) -> None:
        call.doing = "waiting for the container's end"
        self._container.wait(_answer(call, _stopped))

    def delete(self, call: Call, _body: messages.Delete) -> None:
        call.doing = "deleting"
        self._container.delete(_answer(call, lambda _record: Empty()))

    def update(self, call: Call, body: messages.Update) -> None:
        call.doing = "runtime update"
        self._container.update(body, _answer(call))

    def state(self, _call: Call, _body: messages.StateGet) -> messages.State:
        return self._container.state()

    def log_reopen(self, _call: Call, _body: messages.LogReopen) -> Empty:
        self._container.reopen_log()
        return Empty()

    def exec_sync(self, call: Call, body: messages.ExecSync) -> None:
        call.doing = "exec"
        call.on_abandon(self._container.exec(body, _answer(call)).abandon)


def _stopped(record: Body) -> Body:
    assert isinstance(record, messages.ExitRecord)
    return messages.Stopped(exit=record)


def _same(body: Body) -> Body:
    return body


def _answer(call: Call, shape: Callable[[Body], Body] = _same) -> Callable[[Body | RemoteError], None]:
    """Return what answers the call once, with `shape` put on a result."""

    def answer(result: Body | RemoteError) -> None:
        if isinstance(result, RemoteError):
            call.fail(result)
        else:
            call.reply(shape(result))

    return answer


def preload() -> None:
    """Make what is made on first use, so that all monitors share it. For the supervisor, before its forks."""
    for handler in Service.handlers(Service.__new__(Service)).values():
        with contextlib.suppress(RemoteError):  # not every request may be empty; its decoder is made anyhow
            wire.decode_body(handler.request, b"\x80")


def run(
    context: Context,
    *,
    container_id: str,
    pod_id: str,
    directory: str,
    lock_fd: int,
    listener: socket.socket,
) -> None:
    """A monitor's life. `lock_fd` is held to its end: that is how others see that it lives."""
    _prepare_process(lock_fd)
    loop = Loop()
    container = Container(
        loop,
        Launcher(loop, Reaper(loop)),
        ContainerLog(context.log, pod=pod_id, container=container_id),
        container_id=container_id,
        pod_id=pod_id,
        directory=directory,
        pipe_bytes=context.settings.log_buffer,
        over=loop.stop,
    )
    server = Server(
        loop,
        Service(container).handlers(),
        context.settings.uids,
        max_requests=MAX_REQUESTS,
        log=context.log,
    )
    server.listen(listener)
    loop.call_later(UNUSED, lambda: _leave_unused(loop, container))
    loop.run()
    server.close()


def _prepare_process(lock_fd: int) -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(lock_fd, False)
    os.umask(0o022)
    os.chdir("/")
    kernel.become_subreaper()


def _leave_unused(loop: Loop, container: Container) -> None:
    if container.status is Status.NEW:
        loop.stop()
