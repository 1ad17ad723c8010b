"""Runs in: the tests.

A worker that starts on demand, whole and in its real sandbox, with everything around it faked: one process
plays the supervisor (its socket and the control channel) and cri.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ipc import channel
from ipc.channel import Peer
from ipc.log import Log
from ipc.loop import Loop
from ipc.messages import Empty, control
from ipc.messages.cri import CriInfo, InfoGet, RpcCount
from ipc.messages.supervisor import HostInfo, HostInfoGet, WorkerList, WorkersListed, WorkerState
from ipc.serve import Connection, Server
from ipc.settings import Common
from ipc.table import ROOT, Handler, table
from tests.support import sandboxed
from tests.support.sandboxed import UIDS, Host

HOST_INFO = HostInfo(
    cgroup_version=2,
    cgroup_driver="cgroupfs",
    cgroup_controllers=["cpu"],
    runtimes=[],
    kernel="6.1",
    boot_id="b",
    seccomp=True,
    apparmor=False,
    selinux=False,
    swap=False,
    oom_score_floor=0,
    capabilities=[],
    degraded=[],
)
CRI_INFO = CriInfo(
    pods={"ready": 2},
    containers={"running": 3},
    pulls=[],
    rpcs=[RpcCount(name="Status", total=1, errors=0, seconds=0.5)],
)


@dataclass
class Worker:
    """The running worker: its process, the path of its ipc socket and of its HTTP socket."""

    pid: int
    ipc: str
    http: str
    surroundings: int

    def wait(self, timeout: float = 10.0) -> int:
        """How it ended, as subprocess has it. Raises AssertionError if it does not."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError("the worker did not end")

    def lose_surroundings(self) -> None:
        """Kill the process that plays everybody else."""
        os.kill(self.surroundings, signal.SIGKILL)
        os.waitpid(self.surroundings, 0)
        self.surroundings = 0


@contextlib.contextmanager
def started(
    kind: str,
    settings: Callable[[Common], Common],
    host: Host,
    *,
    cri: bool = True,
    https: socket.socket | None = None,
) -> Iterator[Worker]:
    """A worker of `kind`, ended afterwards. Without `cri`, cri's socket is there and nobody answers. `https`:
    the listener that it has besides."""
    ipc = host.run_root / "ipc"
    sockets = {
        name: _listening(str(ipc / f"{name}.sock"), UIDS[kind]) for name in (kind, "supervisor", "cri")
    }
    http_path = str(host.run_root / "http.sock")
    http = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    http.bind(http_path)
    http.listen()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told = settings(Common(root=f"{host.base}/lib", run_root=str(host.run_root), uids={UIDS[kind]: kind}))

    def work() -> None:
        ours.close()
        extra = {"http": http} if https is None else {"http": http, "https": https}
        _work(kind, told, host, sockets[kind], theirs, extra)

    pid = _forked(work)
    theirs.close()
    surroundings = _forked(
        lambda: _surround(ours, sockets["supervisor"], sockets["cri"] if cri else None, pid)
    )
    ours.close()
    worker = Worker(pid, str(ipc / f"{kind}.sock"), http_path, surroundings)
    try:
        yield worker
    finally:
        for child in (worker.pid, worker.surroundings):
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        for sock in (*sockets.values(), http):
            sock.close()
        os.unlink(http_path)


def _listening(path: str, uid: int) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return channel.listen(path, mode=0o600, uid=uid, gid=0)


def _forked(function: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)
            function()
            os._exit(0)
        finally:
            os._exit(70)
    return pid


def _work(
    kind: str,
    settings: Common,
    host: Host,
    listener: socket.socket,
    control_socket: socket.socket,
    extra: dict[str, socket.socket],
) -> None:
    boot = importlib.import_module("workers.boot")
    module = importlib.import_module(f"workers.{kind}.main")
    context = boot.Context(
        kind=kind,
        settings=settings,
        log=Log(kind),
        listener=listener,
        control=control_socket,
        extra=extra,
    )
    boot.main(module, context, lambda: sandboxed.enter(kind, host))


def _surround(
    control_socket: socket.socket, supervisor: socket.socket, cri: socket.socket | None, worker_pid: int
) -> None:
    loop = Loop()
    workers = [WorkerState(kind="ops", name="ops", state="ready", pid=worker_pid, restarts=1)]
    hello = table(Handler(control.Hello, lambda _call, _body: Empty(), {"worker"}))
    Connection(loop, control_socket, Peer(0, 0, 0, "worker"), hello)
    answers = table(
        Handler(WorkerList, lambda _call, _body: WorkersListed(workers=workers), {"ops"}),
        Handler(HostInfoGet, lambda _call, _body: HOST_INFO, {"ops"}),
    )
    uids = {uid: kind for kind, uid in UIDS.items() if uid} | {0: ROOT}
    Server(loop, answers, uids).listen(supervisor)
    if cri is not None:
        Server(loop, table(Handler(InfoGet, lambda _call, _body: CRI_INFO, {"ops"})), uids).listen(cri)
    loop.run()
