"""Runs in: the monitor, in a hand.

A process in the container, started by the runtime's detached exec, which makes it this process's own child:
its exit code is exact and a runtime that fails is told from a command that does. Everything that it started
and that can be told can be killed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Protocol

from ipc.errors import RemoteError
from ipc.fds import sealed_memfd
from workers.monitor import procfs
from workers.monitor.reaper import exit_code
from workers.monitor.runtime import FIRST_EXTRA_FD, Launcher, Outcome, Runtime, Streams, read_pid
from workers.monitor.stdio import Owner

RUNTIME_TIMEOUT = 120.0  # seconds that the runtime's own part of an exec may take
KILLED = 137


class Surroundings(Protocol):
    """What an exec needs of its container."""

    container_id: str
    directory: str
    runtime: Runtime
    launcher: Launcher

    @property
    def stdio_owner(self) -> Owner:
        """Who must be able to open its streams again."""

    def pids(self) -> list[int]:
        """Every process that may belong to the container."""

    def sessions(self) -> set[int]:
        """Sessions that are not an exec's own."""


class Process:
    """One process. `failed` is called if the runtime could not start it, else `ended` with its exit code.

    `pipes` are its streams as /proc names them ("pipe:[inode]"): who holds one is of its family.
    """

    def __init__(
        self,
        container: Surroundings,
        number: int,
        *,
        ended: Callable[[int], object],
        failed: Callable[[RemoteError], object],
    ) -> None:
        self.code: int | None = None
        self.pipes: set[str] = set()
        self._container = container
        self._ended = ended
        self._failed = failed
        self._pid_file = os.path.join(container.directory, f"exec-{os.getpid()}-{number}.pid")
        self._pid = 0
        self._session = 0
        self._condemned = False

    def start(self, process: bytes, streams: Streams, console: str = "") -> None:
        """Start it with these streams, or with a terminal that is handed over at `console`.

        Raises OSError and RemoteError if that cannot begin.
        """
        process_fd = sealed_memfd("process", process)
        reaper = self._container.launcher.reaper
        reaper.expect()
        try:
            streams.extra = (process_fd,)
            argv = self._container.runtime.argv(*self._command(console))
            self._container.launcher.call(argv, self._started, timeout=RUNTIME_TIMEOUT, streams=streams)
        except BaseException:
            reaper.expected()
            raise
        finally:
            os.close(process_fd)

    def _command(self, console: str) -> list[str]:
        options = ["--process", f"/proc/self/fd/{FIRST_EXTRA_FD}", "--pid-file", self._pid_file, "--detach"]
        terminal = ["--console-socket", console] if console else []
        return ["exec", *options, *terminal, self._container.container_id]

    def _started(self, outcome: Outcome) -> None:
        try:
            self._adopt(outcome)
        except RemoteError as error:
            self._failed(error)
        finally:
            self._container.launcher.reaper.expected()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._pid_file)

    def _adopt(self, outcome: Outcome) -> None:
        if not outcome.ok:
            raise outcome.error("exec")
        self._pid = read_pid(self._pid_file)
        fact = procfs.stat(self._pid)
        if fact is not None and fact.session not in self._container.sessions():
            self._session = fact.session
        self._container.launcher.reaper.claim(self._pid, self._reaped)
        if self._condemned:
            self.kill()

    def _reaped(self, code: int) -> None:
        self.code = exit_code(code)
        self._ended(self.code)

    def kill(self) -> None:
        """Kill it and its family, now or as soon as it is there."""
        self._condemned = True
        if self._pid and self.code is None:
            procfs.kill_family(self._pid, self._session, self._container.pids, self.pipes)


def pipe_name(fd: int) -> str:
    """A pipe as /proc names it."""
    return f"pipe:[{os.fstat(fd).st_ino}]"
