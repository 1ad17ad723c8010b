"""Runs in: the monitor.

ExecSync: a process in the container whose output is collected up to a limit. When its time is over or nobody
waits for it, everything it started that can be told is killed. A background child that keeps the pipes open
delays the answer only shortly.
"""

from __future__ import annotations

from collections.abc import Callable

from ipc.errors import Code, RemoteError
from ipc.fds import close_all
from ipc.loop import Loop, Timer
from ipc.messages.monitor import ExecDone, ExecSync
from workers.monitor.process import KILLED, Process, Surroundings, pipe_name
from workers.monitor.runtime import Streams
from workers.monitor.stdio import Drain, Source, make_pipe

LIMIT = 16 * 1024 * 1024  # bytes of one stream, whatever the caller wants


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
        limit = min(request.limit, LIMIT)
        self._outputs = (Collector(limit), Collector(limit))
        self._sources: list[Source] = []
        self._process = Process(container, number, ended=self._ended, failed=self._fail)
        self._drain: Drain | None = None
        self._answered = False
        self._timer: Timer | None = None
        self._start(request.process)
        if request.timeout_ms > 0:
            self._timer = loop.call_later(request.timeout_ms / 1000, self._timed_out)

    # -- starting -------------------------------------------------------------------------------------

    def _start(self, process: bytes) -> None:
        fds: list[int] = []
        try:
            for output in self._outputs:
                read_fd, write_fd = make_pipe(owner=self._container.stdio_owner)
                fds.append(write_fd)
                self._process.pipes.add(pipe_name(read_fd))
                self._sources.append(Source(self._loop, read_fd, output.take, self._source_ended))
            stdout, stderr = fds
            self._process.start(process, Streams(stdout=stdout, stderr=stderr))
        except BaseException:
            self._close_sources()
            raise
        finally:
            close_all(fds)

    # -- ending ---------------------------------------------------------------------------------------

    def _ended(self, _code: int) -> None:
        if self._answered:
            self._finish()
        else:
            self._drain = Drain(self._loop, self._sources, self._drained)

    def _source_ended(self) -> None:
        if self._drain is not None:
            self._drain.check()

    def _drained(self) -> None:
        assert self._process.code is not None
        self._reply(self._done(self._process.code))
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
        self._process.kill()

    def container_ended(self) -> None:
        """The container is gone and the exec with it; answer with what is known."""
        if self._process.code is not None:
            self._reply(self._done(self._process.code))
        self._reply(RemoteError(Code.UNAVAILABLE, "exec: the container ended"))
        self._finish()


def _nothing() -> None:
    """Told already."""
