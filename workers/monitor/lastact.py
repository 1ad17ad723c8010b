"""Runs in: the monitor, the keeper, from the moment its container's init has ended.

Memory counts no more: here the keeper becomes a process like any other, with a loop. It lets a hand that
lives say its last word on the start, carries out the Ending, and tells the record to that hand, or, if there
is none, to whoever connects.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ipc.loop import Loop
from ipc.messages.monitor import ExitRecord
from workers.monitor import heir, records
from workers.monitor import link as k
from workers.monitor.cgroups import Cgroups
from workers.monitor.container import Container
from workers.monitor.containerlog import ContainerLog
from workers.monitor.ending import Ending, Remains
from workers.monitor.link import Taken
from workers.monitor.log import LoggedStream
from workers.monitor.oom import OomWatch
from workers.monitor.reaper import exit_code
from workers.monitor.records import StateRecord
from workers.monitor.runtime import Launcher, runtime_of, start_exit_code
from workers.monitor.stdio import Source, Take

if TYPE_CHECKING:
    from workers.monitor.keeper import Keeper

UNKNOWN = -1  # exit code of an init that was never our child
PATIENCE = 10.0  # seconds that a hand has for its last word on the start, more than it needs in any case
FAREWELL = 5.0  # seconds that a hand has to tell the record to those who wait


class LastAct:
    """One container's end. `serve` begins to serve in this process, and returns the container that is."""

    def __init__(
        self,
        keeper: Keeper,
        loop: Loop,
        launcher: Launcher,
        log: ContainerLog,
        *,
        directory: str,
        serve: Callable[[LastAct], Container],
    ) -> None:
        self._keeper = keeper
        self._loop = loop
        self._launcher = launcher
        self._log = log
        self._directory = directory
        self._serve = serve
        self._container: Container | None = None  # that is served here
        self._ending: Ending | None = None
        self._begun = False
        self._record: ExitRecord | None = None
        self._over = False
        self._state: StateRecord  # as it is when the end may go on

    def play(self) -> None:
        """To the end."""
        keeper = self._keeper
        sources = [
            Source(self._loop, fd, self._log_and_send(stream), self._source_ended)
            for fd, stream in keeper.streams.items()
        ]
        self._sources = sources
        keeper.oblige(k.SHUT, [])
        if keeper.hand_pid:
            self._loop.add_reader(keeper.link.fileno(), self._heard)
            self._launcher.reaper.claim(keeper.hand_pid, self._hand_ended)
            self._say(k.ENDED)
            self._loop.call_later(PATIENCE, self._hurry)
        else:
            self._serve_here()
        self._loop.run()

    def _log_and_send(self, stream: LoggedStream) -> Take:
        def take(chunk: bytes, more: bool) -> None:
            if self._keeper.feed >= 0:
                self._keeper.send_on(stream, chunk)
            stream.take(chunk, more)

        return take

    def _serve_here(self) -> None:
        self._container = self._serve(self)
        self._container.init_ended()
        if self._record is not None:
            self._container.tell(self._record)

    # -- the hand -------------------------------------------------------------------------------------

    def _say(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self._keeper.link.send(data)

    def _heard(self) -> None:
        kind, _, fds = self._keeper.hear()
        if kind == k.GO:
            self.go()
        elif kind == k.COUNT:
            self._say(k.ANSWER + k.COUNTS.pack(self._keeper.file.written, self._keeper.file.dropped))
        elif kind == k.REOPEN:
            self._keeper.file.replace(fds[0])
            self._say(k.ANSWER)
        else:
            self._keeper.oblige(kind, fds)

    def _hurry(self) -> None:
        if not self._begun:
            self._log.warning("a hand does not say that the container's end may go on, and is killed")
            self._kill_hand()

    def _hand_ended(self, _code: int) -> None:
        self._loop.remove_reader(self._keeper.link.fileno())
        self._keeper.hand_pid = 0
        if self._over:
            self._loop.stop()
        else:
            self._serve_here()

    # -- what the container that is served here says (container.Link) --------------------------------------

    def secure(self, what: Taken, fds: list[int]) -> None:
        """Nothing is created any more."""

    def take(self, what: Taken, fds: list[int]) -> None:
        """Nothing is created any more."""
        raise AssertionError(f"a container with pid {what.pid} and {len(fds)} descriptors, after its end")

    def reopen(self, fd: int, done: Callable[[], object]) -> None:
        """Go on in another file."""
        self._keeper.file.replace(fd)
        done()

    def count(self, done: Callable[[int, int], object]) -> None:
        """As Link has it."""
        done(self._keeper.file.written, self._keeper.file.dropped)

    def stdio(self, done: Callable[[int, int], object]) -> None:
        """Nobody attaches any more."""
        done(-1, -1)

    def feed(self, fd: int) -> None:
        """Nobody attaches any more."""
        os.close(fd)

    def shut_stdin(self) -> None:
        """It is."""

    def leave(self) -> None:
        """It leaves anyhow."""

    def go(self) -> None:
        """The end may go on: nothing comes any more that belongs into the record."""
        if self._begun:
            return
        self._begun = True
        state = records.read_state(self._directory)
        assert state is not None, "what was created has a state record"
        keeper, self._state = self._keeper, state
        cgroups = Cgroups(state.cgroups)
        oom = OomWatch(cgroups.memory, state.cgroup_version)
        oom.seen, oom.others = keeper.oom.seen, keeper.oom.others
        keeper.oom.close()
        remains = Remains(
            state.container_id,
            self._directory,
            runtime_of(state),
            cgroups,
            oom,
            self._sources,
            keeper.outputs,
            keeper.file,
        )
        self._ending = Ending(
            self._loop,
            self._launcher,
            self._log,
            remains,
            record=self._make_record,
            tell=self._tell,
            over=self._end,
        )

    def _source_ended(self) -> None:
        if self._ending is not None:
            self._ending.source_ended()

    # -- the record -----------------------------------------------------------------------------------

    def _make_record(self, oom_kills: int) -> ExitRecord:
        ended = records.read_exit(self._directory)
        if ended is not None:  # by a keeper that died after it
            return ended
        code = self._code()
        told = UNKNOWN if code is None else exit_code(code)
        reason = records.exit_reason(told, oom_kills=oom_kills)
        message = "" if code is not None else "the exit code is unknown: the init was no child of the monitor"
        if self._state.output_lost:
            lost = "output was lost since the monitor died together with the supervisor"
            message = f"{message}; {lost}" if message else lost
        if self._state.start_error:
            told, reason = start_exit_code(self._state.start_error), records.START_ERROR
            message = self._state.start_error
        return ExitRecord(
            container_id=self._state.container_id,
            exit_code=told,
            signal=max(0, -(code or 0)),
            oom_killed=oom_kills > 0,
            started_at_ns=self._state.started_at_ns,
            finished_at_ns=self._keeper.finished_ns,
            reason=reason,
            message=message,
            log_bytes_unsure=self._state.log_bytes_unsure,
        )

    def _code(self) -> int | None:
        keeper = self._keeper
        if keeper.code is None:
            keeper.code = heir.exit_status(keeper.init_fd, self._state.pid, self._directory)
        return keeper.code

    def _tell(self, record: ExitRecord) -> None:
        self._record = record
        self._keeper.end_feed()
        if self._container is not None:
            self._container.tell(record)
        else:
            self._say(k.RECORD + msgspec.json.encode(record))
        self._log.info("container ended", exit_code=record.exit_code, reason=record.reason)

    def _end(self) -> None:
        self._over = True
        if not self._keeper.hand_pid:
            self._loop.stop()
            return
        self._say(k.OVER)
        self._loop.call_later(FAREWELL, self._kill_hand)

    def _kill_hand(self) -> None:
        if self._keeper.hand_pid:
            os.kill(self._keeper.hand_pid, signal.SIGKILL)
