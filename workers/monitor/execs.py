"""Runs in: the monitor.

ExecSync: a process in the container, started by the runtime's detached exec, which makes it the monitor's own
child: its exit code is exact and a runtime that fails is told from a command that does. Its output is
collected up to a limit. When its time is over or nobody waits for it, everything it started that can be told
is killed. A background child that keeps the pipes open delays the answer only shortly.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Protocol

from ipc.errors import Code, RemoteError
from ipc.fds import sealed_memfd
from ipc.loop import Loop, Timer
from ipc.messages.monitor import ExecDone, ExecSync
from workers.monitor import procfs
from workers.monitor.reaper import exit_code
from workers.monitor.runtime import FIRST_EXTRA_FD, Launcher, Outcome, Runtime, Streams, read_pid
from workers.monitor.stdio import Drain, Owner, Source, make_pipe

LIMIT = 16 * 1024 * 1024  # bytes of one stream, whatever the caller wants
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


class Collector:
    """Keeps the first `limit` bytes of a stream and counts the rest."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._chunks: list[bytes] = []
        self.dropped = 0

    def take(self, chunk: bytes, _more: bool) -> None:
        """Keep what there is room for."""
        kept = chunk[: self._left]
        if kept:
            self._chunks.append(kept)
            self._left -= len(kept)
        self.dropped += len(chunk) - len(kept)

    def bytes(self) -> bytes:
        """Return what was kept."""
        return b"".join(self._chunks)


class Exec:
    """One exec. `answer` is called exactly once, `gone` when nothing of it is left in the monitor."""

    def __init__(
        self,
        loop: Loop,
        container: Surroundings,
        number: int,
        request: ExecSync,
        *,
        answer: Callable[[ExecDone | RemoteError], object],
        gone: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._container = container
        self._answer = answer
        self._gone = gone
        self._pid_file = os.path.join(container.directory, f"exec-{os.getpid()}-{number}.pid")
        limit = min(request.limit, LIMIT)
        self._outputs = (Collector(limit), Collector(limit))
        self._sources: list[Source] = []
        self._pipes: set[str] = set()
        self._pid = 0
        self._session = 0
        self._code: int | None = None
        self._drain: Drain | None = None
        self._answered = False
        self._condemned = False
        self._timer: Timer | None = None
        self._start(request.process)
        if request.timeout_ms > 0:
            self._timer = loop.call_later(request.timeout_ms / 1000, self._timed_out)

    # -- starting -------------------------------------------------------------------------------------

    def _start(self, process: bytes) -> None:
        fds = [sealed_memfd("process", process)]
        try:
            for output in self._outputs:
                read_fd, write_fd = make_pipe(owner=self._container.stdio_owner)
                fds.append(write_fd)
                self._pipes.add(f"pipe:[{os.fstat(read_fd).st_ino}]")
                self._sources.append(Source(self._loop, read_fd, output.take, self._source_ended))
            self._container.launcher.reaper.expect()
            self._launch(*fds)
        except BaseException:
            self._close_sources()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def _launch(self, process_fd: int, stdout: int, stderr: int) -> None:
        container = self._container
        command = (
            "exec",
            "--process",
            f"/proc/self/fd/{FIRST_EXTRA_FD}",
            "--pid-file",
            self._pid_file,
            "--detach",
            container.container_id,
        )
        streams = Streams(stdout=stdout, stderr=stderr, extra=(process_fd,))
        try:
            container.launcher.call(
                container.runtime.argv(*command), self._started, timeout=RUNTIME_TIMEOUT, streams=streams
            )
        except RemoteError:
            container.launcher.reaper.expected()
            raise

    def _started(self, outcome: Outcome) -> None:
        try:
            self._adopt(outcome)
        except RemoteError as error:
            self._fail(error)
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
        self._container.launcher.reaper.claim(self._pid, self._ended)
        if self._condemned:
            self._kill()

    # -- ending ---------------------------------------------------------------------------------------

    def _ended(self, code: int) -> None:
        self._code = exit_code(code)
        if self._answered:
            self._finish()
        else:
            self._drain = Drain(self._loop, self._sources, self._drained)

    def _source_ended(self) -> None:
        if self._drain is not None:
            self._drain.check()

    def _drained(self) -> None:
        assert self._code is not None
        self._reply(self._done(self._code))
        self._finish()

    def _done(self, code: int, *, timed_out: bool = False) -> ExecDone:
        stdout, stderr = self._outputs
        return ExecDone(
            exit_code=code,
            stdout=stdout.bytes(),
            stderr=stderr.bytes(),
            timed_out=timed_out,
            stdout_dropped=stdout.dropped,
            stderr_dropped=stderr.dropped,
        )

    def _timed_out(self) -> None:
        done = self._done(KILLED, timed_out=True)
        self.abandon()
        self._reply(done)

    def _fail(self, error: RemoteError) -> None:
        self._reply(error)
        self._finish()

    def _reply(self, result: ExecDone | RemoteError) -> None:
        if not self._answered:
            self._answered = True
            self._answer(result)

    def _finish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._drain = None
        self._close_sources()
        gone, self._gone = self._gone, _nothing
        gone()

    def _close_sources(self) -> None:
        for source in self._sources:
            source.close()

    # -- killing --------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Nobody waits any more: kill what was started."""
        self._condemned = True
        if self._pid and self._code is None:
            self._kill()

    def _kill(self) -> None:
        procfs.kill_family(self._pid, self._session, self._container.pids, self._pipes)

    def container_ended(self) -> None:
        """The container is gone and the exec with it; answer with what is known."""
        if self._code is not None:
            self._reply(self._done(self._code))
        self._reply(RemoteError(Code.UNAVAILABLE, "exec: the container ended"))
        self._finish()


def _nothing() -> None:
    """Told already."""
