"""Runs in: the monitor.

The monitor's whole API: its table of handlers at `monitors/<id>/ctl.sock`, and `run`, which the supervisor
calls after the fork with everything loaded. It ends when the container's record is on disk and the runtime's
state is deleted, or when it was never asked to create one; no signal but SIGKILL ends it.
"""

from __future__ import annotations

import contextlib
import gc
import operator
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ipc import kernel, pools, wire
from ipc.errors import RemoteError
from ipc.kernel import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, bare_prctl
from ipc.log import Log
from ipc.loop import Loop
from ipc.messages import Body, Empty
from ipc.messages import monitor as messages
from ipc.serve import Call, Server
from ipc.settings import MonitorSettings
from ipc.table import ROOT, Handler, Handlers, table
from workers.monitor import hand, heir
from workers.monitor.container import Container
from workers.monitor.containerlog import ContainerLog
from workers.monitor.lastact import LastAct
from workers.monitor.link import Link
from workers.monitor.procfs import signal_number
from workers.monitor.reaper import Reaper
from workers.monitor.runtime import Launcher, OomScore, environment
from workers.monitor.sealed import Sealed

if TYPE_CHECKING:
    from workers.monitor.keeper import Keeper

CALLERS = frozenset({"cri", ROOT})
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
            Handler(messages.ExecOpen, self.exec_open, CALLERS),
            Handler(messages.AttachOpen, self.attach_open, CALLERS),
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

    def state(self, call: Call, _body: messages.StateGet) -> None:
        self._container.state(_answer(call))

    def log_reopen(self, call: Call, _body: messages.LogReopen) -> None:
        self._container.reopen_log(_answer(call, lambda _: Empty()))

    def exec_sync(self, call: Call, body: messages.ExecSync) -> None:
        call.doing = "exec"
        call.on_abandon(self._container.exec(body, _answer(call)).abandon)

    def exec_open(self, call: Call, body: messages.ExecOpen) -> None:
        call.doing = "exec"
        self._container.open_exec(body, call.reply)

    def attach_open(self, call: Call, body: messages.AttachOpen) -> None:
        self._container.attach(body, call.reply)


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
    kernel.bare_prctl(kernel.PR_GET_DUMPABLE)


class Ground(NamedTuple):
    """What a monitor inherits: its keeper, which has nothing yet, that one's life and the monitor's end, and
    what stops the holes around them. To be unpacked: a name is a page."""

    keeper: Keeper
    keep: Callable[..., bool]
    end: Callable[[], None]
    fillers: list[object]


def prepare_process(
    make_context: Callable[[str], Context],
    programs: Sequence[str] = (),
    group_fd: int = -1,
    *,
    rehearsed: bool = True,
) -> Ground:
    """What all monitors have in common: once, in whoever forks nothing but them, or in one alone.

    `make_context` gets the container's id; it is called where it is needed, not in a keeper.
    `programs`: those of OCI runtimes that are to be executed from sealed memory. `group_fd`: cgroup.procs of
    the group that monitors are in, -1 if they are in none.
    """
    gc.disable()  # a keeper has nothing to collect, and looking for it dirties pages
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # SIGCHLD only wakes, through the wake-up descriptor; a handler in C has neither code nor frame to dirty.
    signal.signal(signal.SIGCHLD, operator.is_)
    os.umask(0o022)
    os.chdir("/")
    score = OomScore()
    score.close()
    gc.collect()
    fillers = pools.fill()
    from workers.monitor.keeper import Keeper, rehearse  # not before: what a keeper uses is to stand together

    if rehearsed:
        rehearse()
    gc.collect()
    fillers += pools.fill()
    monitor = Monitor(make_context, score.normal, Sealed(programs))
    monitor.keeper = keeper = Keeper(monitor.hand, monitor.trouble, monitor.recover)
    keeper.group_fd = group_fd
    ground = Ground(keeper, keeper.keep, monitor.end, fillers)
    gc.freeze()
    return ground


def run(names: Sequence[str], fds: Sequence[int], ground: Ground) -> None:
    """A monitor's life. `names`: its kind, container, pod, directory; and more, if it succeeds one that died.

    `fds`: the directory's lock, close-on-exec, held to the end, which is how others see that it lives; the
    listening socket, which a successor has in its vault; the vault, if there is one.
    `ground`: what `prepare_process` returned in the process that forked this one.
    """
    bare_prctl(PR_SET_CHILD_SUBREAPER, 1)
    keeper, keep, end, _ = ground
    inherit = None
    listener, vault = fds[1], fds[2] if len(fds) > 2 else -1
    if len(names) > 4:
        listener, inherit = heir.inheritance(keeper, names[3], listener, vault)
    if keep(names, listener, vault, inherit):
        end()


class Monitor:
    """One monitor's parts, made when they are needed: its keeper needs none of them."""

    keeper: Keeper

    def __init__(self, make_context: Callable[[str], Context], normal_score: int, sealed: Sealed) -> None:
        self._make_context = make_context
        self._normal_score = normal_score
        self._sealed = sealed
        self._environment = environment(os.environ)

    def _begin(self, keeper: Keeper) -> None:
        gc.freeze()  # garbage of before the fork may own descriptors, whose numbers are others' now
        gc.enable()
        _, self._container_id, self._pod_id, self._directory, *_ = keeper.names
        self._context = self._make_context(self._container_id)
        self._listener = socket.socket(fileno=keeper.listener)

    def _log(self) -> ContainerLog:
        return ContainerLog(self._context.log, pod=self._pod_id, container=self._container_id)

    def trouble(self, event: str, **fields: object) -> None:
        """Log what goes wrong in the keeper."""
        _, container_id, pod_id, *_ = self.keeper.names
        ContainerLog(self._make_context(container_id).log, pod=pod_id, container=container_id).warning(
            event, **fields
        )

    def recover(self, keeper: Keeper) -> None:
        """A hand died before it gave the keeper anything."""
        heir.recover(keeper, keeper.names[3])

    def hand(self, keeper: Keeper) -> None:
        """Be a hand, in a forked child. Does not return."""
        status = 1
        try:
            self._serve_as_hand(keeper)
            status = 0
        except BaseException as error:  # noqa: BLE001 - a child never runs its parent's clean-up
            container_id = keeper.names[1]
            log = self._make_context(container_id).log
            log.bug("a monitor's hand ended by a bug", error, container=container_id)
        finally:
            os._exit(status)

    def _serve_as_hand(self, keeper: Keeper) -> None:
        self._begin(keeper)
        monitor_pid = os.getppid()
        bare_prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != monitor_pid:
            return
        signal.set_wakeup_fd(-1)
        log_fds = {sys.stderr.fileno(), self._context.log.fileno()}
        shared = {self._listener.fileno(), keeper.hands_link.fileno(), keeper.vault, *self._sealed.fds}
        hand.shed({*shared, *log_fds})
        loop = Loop()
        link = hand.KeeperLink(loop, keeper.hands_link, keeper.vault)
        container = self._container(loop, self._launcher(loop), link, monitor_pid)
        container.load()
        link.serve(container)
        server = self._server(loop, container)
        loop.turn(hand.FIRST_WAIT)
        while not link.over and (server.connections or not container.quiet):
            signal.alarm(hand.PATIENCE)  # a loop that does not turn is killed, and the next hand is forked
            loop.turn(hand.PATIENCE / 4)
        until = loop.time() + hand.LAST_WORDS
        while container.saying_goodbye and loop.time() < until:
            loop.turn(until - loop.time())
        server.close()

    def end(self) -> None:
        """The container's init has ended: see to the rest."""
        keeper = self.keeper
        keeper.hand_over()
        self._begin(keeper)
        loop = Loop()
        launcher = self._launcher(loop)

        def serve(act: LastAct) -> Container:
            container = self._container(loop, launcher, act, os.getpid())
            container.load()
            servers.append(self._server(loop, container))
            return container

        servers: list[Server] = []
        LastAct(keeper, loop, launcher, self._log(), directory=self._directory, serve=serve).play()
        for server in servers:
            server.close()

    def _launcher(self, loop: Loop) -> Launcher:
        reaper = Reaper(loop, handled=True)
        return Launcher(loop, reaper, self._normal_score, self._sealed, self._environment)

    def _container(self, loop: Loop, launcher: Launcher, link: Link, monitor_pid: int) -> Container:
        return Container(
            loop,
            launcher,
            self._log(),
            link,
            container_id=self._container_id,
            pod_id=self._pod_id,
            directory=self._directory,
            pipe_bytes=self._context.settings.log_buffer,
            monitor_pid=monitor_pid,
        )

    def _server(self, loop: Loop, container: Container) -> Server:
        server = Server(
            loop,
            Service(container).handlers(),
            self._context.settings.uids,
            max_requests=MAX_REQUESTS,
            log=self._context.log,
        )
        server.listen(self._listener)
        return server
