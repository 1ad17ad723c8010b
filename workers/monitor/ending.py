"""Runs in: the monitor.

The end of a container, in this order: kill what its groups still hold, drain its output, write the exit
record, tell whoever waits, bring the log to the disk, delete the runtime's state, remove its groups. The
record is on disk and the log is whole before anybody is told; nobody has to wait for what comes then. A
runtime that cannot delete is asked again; when it never can, the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ipc.errors import RemoteError
from ipc.loop import Loop
from ipc.messages.monitor import ExitRecord
from workers.monitor.cgroups import Cgroups
from workers.monitor.containerlog import ContainerLog
from workers.monitor.oom import OomWatch
from workers.monitor.records import write_exit
from workers.monitor.runtime import Launcher, Outcome, Runtime
from workers.monitor.stdio import Drain, Source

if TYPE_CHECKING:  # only keepers load it (workers/monitor/main.py, prepare_process)
    from workers.monitor.log import LogFile, LoggedStream

KILL_DELAYS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # seconds
DELETE_DELAYS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before each further try
DELETE_TIMEOUT = 30.0
STAND_BACK = 0.01  # seconds for those who were told, before what nobody awaits takes the processors


@dataclass
class Remains:
    """What a container leaves to its Ending."""

    container_id: str
    directory: str
    runtime: Runtime
    cgroups: Cgroups
    oom: OomWatch
    sources: Sequence[Source]
    streams: Sequence[LoggedStream]
    file: LogFile


class Ending:
    """Carries out one container's end.

    `record(oom_kills)` makes the exit record, `tell(record)` is called when it may be known, `over()` when
    nothing is left to do.
    """

    def __init__(
        self,
        loop: Loop,
        launcher: Launcher,
        log: ContainerLog,
        remains: Remains,
        *,
        record: Callable[[int], ExitRecord],
        tell: Callable[[ExitRecord], object],
        over: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._launcher = launcher
        self._log = log
        self._remains = remains
        self._make_record = record
        self._record: ExitRecord | None = None
        self._tell = tell
        self._over = over
        self._drain: Drain | None = None
        self._kill(0)

    def source_ended(self) -> None:
        """One of the sources is at its end."""
        if self._drain is not None:
            self._drain.check()

    def _kill(self, attempt: int) -> None:
        left = self._remains.cgroups.kill()
        if left and attempt < len(KILL_DELAYS):
            self._loop.call_later(KILL_DELAYS[attempt], lambda: self._kill(attempt + 1))
            return
        if left:
            self._log.error("processes outlive their container", count=left)
        self._drain = Drain(self._loop, self._remains.sources, self._drained)

    def _drained(self) -> None:
        for stream in self._remains.streams:
            stream.finish()
        self._remains.file.finish()
        self._record = self._make_record(self._remains.oom.kills())
        self._save()
        self._tell(self._record)
        self._loop.call_later(STAND_BACK, self._tidy_up)

    def _tidy_up(self) -> None:
        self._remains.file.close()
        self._delete(0)

    def _save(self) -> None:
        assert self._record is not None
        try:
            write_exit(self._remains.directory, self._record)
        except OSError as error:
            # Whoever waits is told all the same: it may be the only way left to be known.
            self._log.error("exit record cannot be written", error=error, exit_code=self._record.exit_code)

    def _delete(self, attempt: int) -> None:
        argv = self._remains.runtime.argv("delete", "--force", self._remains.container_id)
        try:
            self._launcher.call(argv, lambda outcome: self._deleted(attempt, outcome), timeout=DELETE_TIMEOUT)
        except RemoteError as error:
            self._failed(attempt, error.text)

    def _deleted(self, attempt: int, outcome: Outcome) -> None:
        if outcome.ok:
            self._finish()
        else:
            self._failed(attempt, outcome.error("delete").text)

    def _failed(self, attempt: int, why: str) -> None:
        self._log.warning("runtime state cannot be deleted", attempt=attempt + 1, error=why)
        if attempt < len(DELETE_DELAYS):
            self._loop.call_later(DELETE_DELAYS[attempt], lambda: self._delete(attempt + 1))
        else:
            self._give_up(why)

    def _give_up(self, why: str) -> None:
        assert self._record is not None
        self._log.error("runtime state stays behind", error=why)
        note = f"the OCI runtime's state could not be deleted: {why}"
        message = f"{self._record.message}; {note}" if self._record.message else note
        self._record = msgspec.structs.replace(self._record, message=message)
        self._save()
        self._finish()

    def _finish(self) -> None:
        self._remains.oom.close()
        self._remains.cgroups.remove()
        self._over()
