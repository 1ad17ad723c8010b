"""Runs in: the monitor.

The birth of a container: its bundle, the descriptors of its stdio, the runtime's `create`. It ends with a
container in the state "created", or with the runtime's own sentence and nothing left open. What the runtime
has made until it failed is the caller's to delete.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from ipc.errors import RemoteError, precondition
from ipc.fds import close_all
from ipc.loop import Loop
from ipc.messages.monitor import Create
from workers.monitor.console import ConsoleSocket
from workers.monitor.records import BUNDLE, CONFIG, write_file
from workers.monitor.runtime import Launcher, Outcome, Runtime, Streams, read_pid
from workers.monitor.stdio import Owner, make_pipe

PID_FILE = "pid"
CONSOLE = "tty.sock"  # no longer than ctl.sock, whose path is known to fit


@dataclass
class Born:
    """A created container; its descriptors are the caller's. `outputs`: stream name and read end."""

    pid: int
    outputs: list[tuple[str, int]] = field(default_factory=list)
    stdin_fd: int | None = None

    def fds(self) -> list[int]:
        """Every descriptor."""
        return [fd for _, fd in self.outputs] + ([] if self.stdin_fd is None else [self.stdin_fd])


def write_bundle(directory: str, spec: bytes) -> str:
    """Write the bundle, return its path. The directory's group, cri, may read it. Raises OSError."""
    bundle = os.path.join(directory, BUNDLE)
    os.makedirs(bundle, mode=0o750, exist_ok=True)
    write_file(os.path.join(bundle, CONFIG), spec, mode=0o640)
    return bundle


class Creation:
    """One `create`. `done(Born or RemoteError)` is called once, later. Raises OSError and RemoteError if it
    cannot begin."""

    def __init__(
        self,
        loop: Loop,
        launcher: Launcher,
        runtime: Runtime,
        *,
        container_id: str,
        directory: str,
        request: Create,
        pipe_bytes: int,
        done: Callable[[Born | RemoteError], object],
    ) -> None:
        self._loop = loop
        self._launcher = launcher
        self._pipe_bytes = pipe_bytes
        self._done = done
        self._born = Born(0)
        self._console: ConsoleSocket | None = None
        self._pid_file = os.path.join(directory, PID_FILE)
        bundle = write_bundle(directory, request.spec)
        command = ["create", "--bundle", bundle, "--pid-file", self._pid_file]
        try:
            if request.terminal:
                command += ["--console-socket", self._open_console(directory)]
            argv = runtime.argv(*command, container_id)
            self._launch(argv, request)
        except BaseException:
            self._drop()
            raise

    def _open_console(self, directory: str) -> str:
        self._console = ConsoleSocket(self._loop, os.path.join(directory, CONSOLE), self._terminal)
        return self._console.path

    def _terminal(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._born.outputs.append(("stdout", fd))

    def _launch(self, argv: list[str], request: Create) -> None:
        theirs: list[int] = []
        self._launcher.reaper.expect()
        try:
            streams = Streams() if request.terminal else self._pipes(theirs, request)
            self._launcher.call(argv, self._ended, timeout=request.timeout_ms / 1000, streams=streams)
        except BaseException:
            self._launcher.reaper.expected()
            raise
        finally:
            close_all(theirs)

    def _pipes(self, theirs: list[int], request: Create) -> Streams:
        owner = (request.stdio_uid, request.stdio_gid)
        for name in ("stdout", "stderr"):
            read_fd, write_fd = make_pipe(self._pipe_bytes, owner)
            self._born.outputs.append((name, read_fd))
            theirs.append(write_fd)
        stdout, stderr = theirs
        return Streams(self._stdin_pipe(theirs, owner) if request.stdin else None, stdout, stderr)

    def _stdin_pipe(self, theirs: list[int], owner: Owner) -> int:
        read_fd, self._born.stdin_fd = os.pipe2(os.O_CLOEXEC)
        os.fchown(read_fd, *owner)
        os.set_blocking(self._born.stdin_fd, False)
        theirs.append(read_fd)
        return read_fd

    def _ended(self, outcome: Outcome) -> None:
        try:
            self._done(self._judge(outcome))
        finally:
            self._launcher.reaper.expected()

    def _judge(self, outcome: Outcome) -> Born | RemoteError:
        try:
            if not outcome.ok:
                raise outcome.error("create")
            self._born.pid = read_pid(self._pid_file)
            self._finish_console()
        except RemoteError as error:
            self._drop()
            return error
        return self._born

    def _finish_console(self) -> None:
        if self._console is not None:
            self._console.receive_now()
            self._console.close()
            if not self._born.outputs:
                raise precondition("create: the OCI runtime handed over no terminal")

    def _drop(self) -> None:
        if self._console is not None:
            self._console.close()
        close_all(self._born.fds())
