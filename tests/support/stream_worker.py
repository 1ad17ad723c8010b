"""Runs in: the tests.

The stream worker, whole and in its real sandbox, on a TCP port of loopback; a cri that redeems any token that
a test has written down, and starts real processes for it with pipes or a pty.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ipc import channel
from ipc.blocking import Client
from ipc.channel import Peer
from ipc.errors import Code, RemoteError
from ipc.log import Log
from ipc.loop import Loop
from ipc.messages import Empty, control
from ipc.messages.cri import Redeemed, SessionOpen, TokenRedeem
from ipc.messages.monitor import SessionEnd, SessionOpened
from ipc.messages.stream import InfoGet, StreamInfo
from ipc.messages.supervisor import SandboxReport
from ipc.serve import Call, Connection, Server
from ipc.settings import StreamSettings
from ipc.table import ROOT, Handler, table
from tests.support import sandboxed
from tests.support.sandboxed import UIDS, Host


@dataclass
class Job:
    """What a token stands for: a command (exec, attach), or a port of this machine for every port."""

    kind: str
    redeemed: Redeemed
    command: list[str] = field(default_factory=list)
    port: int = 0
    error: str = ""


class FakeCri:
    """Redeems tokens and opens sessions, in a thread of the test's process."""

    def __init__(self, path: str) -> None:
        self.jobs: dict[str, Job] = {}
        self.opened = 0
        self._sessions: dict[str, Job] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self._ends: list[threading.Thread] = []
        self._loop = Loop()
        self._sock = _listening(path, UIDS["stream"])
        handlers = table(
            Handler(TokenRedeem, self._redeem, {"stream"}), Handler(SessionOpen, self._open, {"stream"})
        )
        self._server = Server(self._loop, handlers, {UIDS["stream"]: "stream"})
        self._server.listen(self._sock)
        self._stop, self._stopped = socket.socketpair()
        self._loop.add_reader(self._stopped.fileno(), self._loop.stop)
        self._thread = threading.Thread(target=self._loop.run)
        self._thread.start()

    def token(self, job: Job) -> str:
        token = f"token{len(self.jobs)}"
        self.jobs[token] = job
        return f"/{job.kind}/{token}"

    def _redeem(self, _call: Call, body: TokenRedeem) -> Redeemed:
        job = self.jobs.get(body.token)
        if job is None or job.kind != body.kind:
            raise RemoteError(Code.NOT_FOUND, "no such token")
        del self.jobs[body.token]
        self.jobs[body.token + "-used"] = job
        self._sessions[job.redeemed.session] = job
        return job.redeemed

    def _open(self, call: Call, body: SessionOpen) -> None:
        job = self._sessions[body.session]
        self.opened += 1
        if job.error:
            raise RemoteError(Code.FAILED_PRECONDITION, job.error)
        if job.kind == "portforward":
            self._connect(call, job)
            return
        fds = self._start(job)
        call.reply(SessionOpened(fds=list(fds)), fds=list(fds.values()))

    def _connect(self, call: Call, job: Job) -> None:
        sock = socket.socket()
        try:
            sock.connect(("127.0.0.1", job.port))
        except OSError as error:
            sock.close()
            raise RemoteError(Code.UNAVAILABLE, f"dial: {error}") from None
        call.reply(SessionOpened(fds=["socket"]), fds=[sock.detach()])

    def _start(self, job: Job) -> dict[str, int]:
        redeemed, ours, theirs = job.redeemed, dict[str, int](), dict[str, int]()
        if redeemed.tty:
            ours["terminal"], slave = pty.openpty()
            theirs = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        else:
            for name in ("stdin", "stdout", "stderr"):
                read_fd, write_fd = os.pipe()
                ours[name], theirs[name] = (write_fd, read_fd) if name == "stdin" else (read_fd, write_fd)
        process = subprocess.Popen(
            job.command,
            start_new_session=True,
            stdin=theirs["stdin"],
            stdout=theirs["stdout"],
            stderr=theirs["stderr"],
        )
        for fd in set(theirs.values()):
            os.close(fd)
        self.processes.append(process)
        ours["status"], status_fd = os.pipe()
        watcher = threading.Thread(target=_watch, args=(process, status_fd))
        watcher.start()
        self._ends.append(watcher)
        return ours

    def vanish(self) -> None:
        """End as cri, leave the processes."""
        if self._thread.is_alive():
            self._stop.send(b"x")
            self._thread.join(10)
            self._server.close()
            self._sock.close()

    def close(self) -> None:
        self.vanish()
        self._stop.close()
        self._stopped.close()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for watcher in self._ends:
            watcher.join(10)


def _watch(process: subprocess.Popen[bytes], status_fd: int) -> None:
    """As a monitor does: say how it ended; end it when nobody wants to know any more."""
    poll = select.poll()
    poll.register(status_fd, 0)
    while (code := process.poll()) is None:
        if poll.poll(20):
            process.kill()
    with contextlib.suppress(BrokenPipeError):
        end = SessionEnd(exit_code=code if code >= 0 else 128 - code)
        os.write(status_fd, msgspec.msgpack.encode(end))
    os.close(status_fd)


@dataclass
class Worker:
    """The running worker."""

    pid: int
    ipc: str
    port: int
    cri: FakeCri

    def dial(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=15)

    def info(self) -> StreamInfo:
        client = Client(self.ipc, timeout=10)
        with client:
            return client.call(InfoGet())

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def wait(self, timeout: float = 15.0) -> int:
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError("the worker did not end")


@contextlib.contextmanager
def started(host: Host, **settings: object) -> Iterator[Worker]:
    """A worker with these settings, ended afterwards."""
    ipc = host.run_root / "ipc"
    listener = _listening(str(ipc / "stream.sock"), 0)
    http = socket.create_server(("127.0.0.1", 0))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (ipc / "cri.sock").unlink()
    cri_path = str(ipc / "cri.sock")
    cri = FakeCri(cri_path)
    told = {"root": f"{host.base}/lib", "run_root": str(host.run_root), "uids": {0: ROOT}, **settings}
    pid = _spawn(host, told, {"listener": listener, "control": theirs, "http": http})
    theirs.close()
    supervisor = _Supervisor(ours)
    worker = Worker(pid, str(ipc / "stream.sock"), http.getsockname()[1], cri)
    try:
        yield worker
    finally:
        if worker.pid:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
        supervisor.thread.join(10)
        cri.close()
        for sock in (listener, http):
            sock.close()


class _Supervisor:
    """Says welcome on the control channel, until the worker is gone."""

    def __init__(self, control_socket: socket.socket) -> None:
        self.thread = threading.Thread(target=self._run, args=(control_socket,))
        self.thread.start()

    @staticmethod
    def _run(control_socket: socket.socket) -> None:
        loop = Loop()
        hello = table(Handler(control.Hello, lambda _call, _body: Empty(), {"worker"}))
        connection = Connection(loop, control_socket, Peer(0, 0, 0, "worker"), hello)
        connection.on_close(loop.stop)
        loop.run()


def _listening(path: str, uid: int) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return channel.listen(path, mode=0o600, uid=uid, gid=0)


def _spawn(host: Host, settings: dict[str, object], sockets: dict[str, socket.socket]) -> int:
    """A process of its own from the start: threads of the tests must not be forked."""
    fds = {name: sock.fileno() for name, sock in sockets.items()}
    order = msgspec.json.encode({"base": str(host.base), "settings": settings, "fds": fds})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.stream_worker"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        pass_fds=tuple(fds.values()),
    )
    assert process.stdin is not None
    process.stdin.write(order)
    process.stdin.close()
    process.returncode = 0  # reaped by Worker
    return process.pid


def main() -> None:
    """The worker's process."""
    order = msgspec.json.decode(sys.stdin.buffer.read())
    sockets = {name: socket.socket(fileno=fd) for name, fd in order["fds"].items()}
    boot = importlib.import_module("workers.boot")
    module = importlib.import_module("workers.stream.main")
    context = boot.Context(
        kind="stream",
        settings=msgspec.convert(order["settings"], StreamSettings, strict=False),
        log=Log("stream"),
        listener=sockets["listener"],
        control=sockets["control"],
        extra={"http": sockets["http"]},
    )
    before: set[str] = set()

    def shut() -> SandboxReport:
        report = sandboxed.enter("stream", Host(Path(order["base"])))
        before.update(sys.modules)
        return report

    boot.main(module, context, shut)
    late = sorted(set(sys.modules) - before)
    if late:
        sys.stderr.write(f"late imports: {' '.join(late)}\n")
    sys.stderr.flush()
    os._exit(1 if late else 0)


if __name__ == "__main__":
    main()
