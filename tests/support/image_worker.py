"""Runs in: the tests, and as a program of its own (a supervisor in miniature, which becomes the worker).

The image worker as its own process in its real sandbox, called as `cri` calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from ipc import aio
from ipc.channel import Peer, listen
from ipc.fds import FdSet
from ipc.log import Log
from ipc.messages import Empty, control
from ipc.messages.supervisor import SandboxReport
from ipc.settings import ImageSettings
from ipc.table import Handler, table
from tests.support.sandboxed import UIDS, Host, enter
from workers import boot

REPO = Path(__file__).resolve().parents[2]


class Worker:
    """A running image worker; `settings` may be changed before it starts."""

    def __init__(self, where: Host, **changes: Any) -> None:
        paths = where.paths
        self._where = where
        self.settings = ImageSettings(
            root=paths["root"],
            run_root=paths["run_root"],
            uids={UIDS["cri"]: "cri", UIDS["ops"]: "ops", UIDS["image"]: "image"},
            registries_conf=paths["registries_conf"],
            registries_conf_dir=paths["registries_conf_dir"],
            certs_dirs=paths["certs_dirs"].split(":"),
            read_timeout=5.0,
            retries=1,
            idle_exit=30.0,
        )
        self.settings = msgspec.structs.replace(self.settings, **changes)
        self.path = self.settings.ipc_socket("image")
        self.report = SandboxReport(uid=0, gid=0)
        self.control: aio.Connection | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[aio.Client]:
        """The worker after its hello, and a client that is `cri` to it. It must end well when told to."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = listen(self.path, uid=UIDS["cri"])
        os.chmod(self._where.base, 0o755)
        with theirs, listener:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.image_worker", str(self._where.base)],
                cwd=REPO,
                stdin=subprocess.PIPE,
                pass_fds=(theirs.fileno(), listener.fileno()),
                stderr=subprocess.PIPE,
            )
            head = f"{theirs.fileno()} {listener.fileno()}\n".encode()
            assert self.process.stdin is not None
            self.process.stdin.write(head + msgspec.json.encode(self.settings))
            self.process.stdin.close()
            self.process.stdin = None
        said_hello = asyncio.Event()

        async def hello(_call: aio.Call, body: control.Hello) -> Empty:
            self.report = body.report
            said_hello.set()
            return Empty()

        handlers = table(Handler(control.Hello, hello, {"image"}))
        self.control = aio.Connection(ours, Peer(0, 0, 0, "image"), handlers)
        client = aio.Client(self.path)
        try:
            async with asyncio.timeout(20):
                await said_hello.wait()
            with acting_as("cri"):
                await client._connect(None)
            yield client
            await client.close()
            await self.stop()
        finally:
            self.control.close()
            if self.process.poll() is None:
                self.process.kill()
            self.stderr = self.process.communicate()[1].decode()
            sys.stderr.write(self.stderr)

    async def stop(self) -> None:
        """Tell it to stop, and wait for the end."""
        assert self.control is not None
        if not self.control.closed:
            await self.control.ask(control.Stop(grace_ms=1000), FdSet(), None)
        assert await self.wait() == 0

    async def wait(self) -> int:
        """Its exit status."""
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, 20)


@contextlib.contextmanager
def acting_as(kind: str) -> Any:
    """Connect as another user: SO_PEERCRED tells the effective uid at that moment."""
    os.seteuid(UIDS[kind])
    try:
        yield
    finally:
        os.seteuid(0)


def main() -> None:
    """The worker's process: modules that are loaded after the sandbox is shut are told on stderr."""
    where = Host(Path(sys.argv[1]))
    head, _, settings = sys.stdin.buffer.read().partition(b"\n")
    control_fd, listener_fd = map(int, head.split())
    from workers.image import main as module

    context = boot.Context(
        kind="image",
        settings=msgspec.json.decode(settings, type=ImageSettings),
        log=Log("image"),
        control=socket.socket(fileno=control_fd),
        listener=socket.socket(fileno=listener_fd),
    )
    before: set[str] = set()

    def shut() -> SandboxReport:
        report = enter("image", where)
        before.update(sys.modules)
        return report

    boot.main(module, context, shut)
    late = sorted(set(sys.modules) - before)
    if late:
        sys.stderr.write(f"late imports: {' '.join(late)}\n")
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
