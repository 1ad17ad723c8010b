"""Runs in: the monitor.

The container's state machine: new, created, running, stopped. It owns the container's init, stdio, log,
execs and records, and answers each request when its moment has come; a request that is sent again joins the
one under way. Once a container was created its end always comes the same way, whoever brought it about:
its init is reaped, and Ending does the rest.
"""

from __future__ import annotations

import enum
import os
import signal
import time
from collections.abc import Callable

import msgspec

from ipc.errors import RemoteError, precondition
from ipc.loop import Loop
from ipc.messages import Body
from ipc.messages.monitor import (
    Create,
    Created,
    ExecSync,
    ExitRecord,
    Start,
    Started,
    State,
    Update,
)
from workers.monitor import procfs, records
from workers.monitor.cgroups import Cgroups
from workers.monitor.containerlog import ContainerLog
from workers.monitor.creation import Born, Creation
from workers.monitor.ending import DELETE_TIMEOUT, Ending, Remains
from workers.monitor.execs import Exec
from workers.monitor.log import Clock, LogFile
from workers.monitor.oom import OomWatch
from workers.monitor.reaper import exit_code
from workers.monitor.runtime import Invocation, Launcher, Outcome, Runtime, start_exit_code
from workers.monitor.stdio import LoggedStream, Owner, Source
from workers.monitor.stopping import Stopper
from workers.monitor.updating import Updates

KILL_TIMEOUT = 10.0  # seconds for the runtime's `kill`, where it must be asked
START_PATIENCE = 3.0  # seconds for the runtime's word on a start whose init has ended
UNKNOWN = -1  # exit code of an init that was never our child

Answer = Callable[[Body | RemoteError], object]


class Status(enum.Enum):
    """Where the container is. The values are those of State.status where callers know them."""

    NEW = "new"
    CREATING = "creating"
    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    STOPPED = "stopped"


#: What callers are told: they know four states.
_TOLD = {Status.CREATING: "new", Status.STARTING: "created", Status.ENDING: "stopped"}


class Container:
    """One container. `over` is called when the monitor has nothing left to do."""

    def __init__(
        self,
        loop: Loop,
        launcher: Launcher,
        log: ContainerLog,
        *,
        container_id: str,
        pod_id: str,
        directory: str,
        pipe_bytes: int,
        over: Callable[[], object],
    ) -> None:
        self.container_id = container_id
        self.pod_id = pod_id
        self.directory = directory
        self.launcher = launcher
        self.runtime = Runtime("", "")
        self.status = Status.NEW
        self._loop = loop
        self._log = log
        self._pipe_bytes = pipe_bytes
        self._over = over
        self._pid = 0
        self._pid_start = 0
        self._ours = True
        self._request: Create | None = None
        self._stdin_fd: int | None = None
        self._file: LogFile | None = None
        self._sources: list[Source] = []
        self._streams: list[LoggedStream] = []
        self._cgroups = Cgroups({})
        self._oom: OomWatch | None = None
        self._stopper = Stopper(loop, self)
        self._updates = Updates(self, log)
        self._execs: dict[int, Exec] = {}
        self._exec_count = 0
        self._created_ns = self._started_ns = self._finished_ns = 0
        self._code: int | None = None  # of the init, once reaped
        self._start_call: Invocation | None = None
        self._start_error: RemoteError | None = None
        self._start_given_up = False
        self._record: ExitRecord | None = None
        self._unwanted = False  # to be ended as soon as it is created
        self._creators: list[Answer] = []
        self._starters: list[Answer] = []
        self._waiters: list[Answer] = []
        self._ending: Ending | None = None

    # -- create ---------------------------------------------------------------------------------------

    def create(self, request: Create, answer: Answer) -> None:
        """Create it, or answer what is."""
        if self.status in (Status.CREATED, Status.STARTING, Status.RUNNING):
            answer(Created(pid=self._pid))
        elif self.status is Status.CREATING:
            self._creators.append(answer)
        elif self.status is Status.NEW:
            self._creators.append(answer)
            self._create(request)
        else:
            raise precondition(f"container {self.container_id} has ended")

    def _create(self, request: Create) -> None:
        self.status = Status.CREATING
        self._request = msgspec.structs.replace(request, spec=b"", keep=b"")  # large, and needed only here
        self.runtime = Runtime(
            request.runtime_path, request.runtime_root, tuple(request.runtime_args), request.systemd_cgroup
        )
        try:
            if request.keep:
                records.write_kept(self.directory, request.keep)
            self._file = LogFile(request.log_path, self._log)
            Creation(
                self._loop,
                self.launcher,
                self.runtime,
                container_id=self.container_id,
                directory=self.directory,
                request=request,
                pipe_bytes=self._pipe_bytes,
                done=self._created,
            )
        except OSError as error:
            self._not_created(precondition(f"create: {error}"))
        except RemoteError as error:
            self._not_created(error)

    def _created(self, result: Born | RemoteError) -> None:
        if isinstance(result, RemoteError):
            self._delete_debris(result)
            return
        self._adopt(result)
        self._write_state()
        self._answer_all(self._creators, Created(pid=self._pid))
        if self._unwanted:
            self._stopper.kill()

    def _adopt(self, born: Born) -> None:
        assert self._request is not None
        assert self._file is not None
        self.status = Status.CREATED
        self._created_ns = time.time_ns()
        self._pid, self._stdin_fd = born.pid, born.stdin_fd
        clock = Clock()
        for name, fd in born.outputs:
            stream = LoggedStream(name, clock, self._file)
            self._streams.append(stream)
            self._sources.append(Source(self._loop, fd, stream.take, self._source_ended))
        request = self._request
        self._cgroups = Cgroups.of_process(self._pid, request.cgroup_path, self.container_id)
        self._oom = OomWatch(
            self._loop, self._cgroups.memory, request.cgroup_version, follow=request.systemd_cgroup
        )
        self._watch_init()

    def _watch_init(self) -> None:
        fact = procfs.stat(self._pid)
        self._pid_start = fact.start if fact is not None else 0
        ended = self.launcher.reaper.has_ended(self._pid)
        if ended or (fact is not None and fact.parent == os.getpid()):
            self.launcher.reaper.claim(self._pid, self._init_ended)
        else:
            self._watch_stranger()

    def _watch_stranger(self) -> None:
        # A runtime whose container process is somebody else's child (a virtual machine's, say).
        self._ours = False
        try:
            fd = os.pidfd_open(self._pid)
        except ProcessLookupError:
            self._loop.call_soon(lambda: self._init_ended(None))
        else:
            self._loop.add_reader(fd, lambda: self._stranger_ended(fd))

    def _stranger_ended(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        os.close(fd)
        self._init_ended(None)

    def _delete_debris(self, error: RemoteError) -> None:
        argv = self.runtime.argv("delete", "--force", self.container_id)
        try:
            self.launcher.call(argv, lambda _outcome: self._not_created(error), timeout=DELETE_TIMEOUT)
        except RemoteError:
            self._not_created(error)

    def _not_created(self, error: RemoteError) -> None:
        self._log.warning("container not created", error=error.text)
        self.status = Status.STOPPED
        if self._request is not None:  # a runtime that failed half-way may have made groups
            Cgroups.of_path(self._request.cgroup_path, self.container_id).remove()
        if self._file is not None:
            self._file.close()
        for answers in (self._creators, self._starters, self._waiters):
            self._answer_all(answers, error)
        self._over()

    # -- start ----------------------------------------------------------------------------------------

    def start(self, request: Start, answer: Answer) -> None:
        """Start it, or answer that it was started."""
        if self._started_ns and self.status in (Status.RUNNING, Status.ENDING, Status.STOPPED):
            answer(Started(started_at_ns=self._started_ns))
        elif self.status is Status.STARTING:
            self._starters.append(answer)
        elif self.status is Status.CREATED and not self._unwanted:
            self._start(request, answer)
        else:
            raise precondition(f"container {self.container_id} is {self.told_status}, not created")

    def _start(self, request: Start, answer: Answer) -> None:
        now = time.time_ns()
        self._start_call = self.launcher.call(
            self.runtime.argv("start", self.container_id),
            lambda outcome: self._started(now, outcome),
            timeout=request.timeout_ms / 1000,
        )
        self.status = Status.STARTING
        self._starters.append(answer)

    def _started(self, at_ns: int, outcome: Outcome) -> None:
        if not outcome.ok:
            self._not_started(outcome.error("start"))
            return
        self.status = Status.RUNNING
        # The moment before the call: a short life must not seem to end before it began.
        self._started_ns = at_ns
        self._write_state()
        self._answer_all(self._starters, Started(started_at_ns=at_ns))
        self._end_if_ended()

    def _give_up_start(self) -> None:
        """End a runtime that waits, on the other side of a FIFO, for an init that was killed before."""
        if self.status is Status.STARTING and self._start_call is not None:
            self._start_given_up = True
            self._start_call.kill()

    def _not_started(self, error: RemoteError) -> None:
        if self._start_given_up:
            error = precondition("start: the container was ended before its command could be executed")
        self._log.warning("container not started", error=error.text)
        self._start_error = error
        self.status = Status.CREATED
        self._unwanted = True
        if self._finished_ns:
            self._end_if_ended()
        else:
            self._stopper.kill()

    # -- stop, wait, delete -----------------------------------------------------------------------------

    def stop(self, number: int, grace: float, answer: Answer) -> None:
        """Stop it; the answer is its exit record."""
        if self.status is Status.NEW:
            raise precondition(f"container {self.container_id} is not created")
        self.wait(answer)
        if self.status in (Status.STARTING, Status.RUNNING):
            self._log.info("container is being stopped", signal=number, grace=grace)
            self._stopper.request(number, grace)
        else:
            self._end_unstarted()

    def wait(self, answer: Answer) -> None:
        """Answer with the exit record when it is on disk and known."""
        if self._record is not None:
            answer(self._record)
        else:
            self._waiters.append(answer)

    def delete(self, answer: Answer) -> None:
        """End it now; answer when it is gone."""
        if self.status is Status.NEW:
            self.status = Status.STOPPED
            answer(Body())
            self._over()
            return
        self.wait(answer)
        if self.status in (Status.STARTING, Status.RUNNING):
            self._stopper.kill()
        else:
            self._end_unstarted()

    def _end_unstarted(self) -> None:
        self._unwanted = True
        if self.status is Status.CREATED:
            self._stopper.kill()

    # -- what the Stopper asks for ------------------------------------------------------------------------

    def send(self, number: int) -> None:
        """Send a signal to the init, thawed so that it can take it."""
        self._cgroups.freeze(False)
        if self._ours:
            os.kill(self._pid, number)  # not reaped yet, or the Stopper would have been told
        else:
            self._runtime_kill(number)

    def kill(self) -> None:
        """SIGKILL everything that is the container's."""
        if self._ours and not self._finished_ns:
            os.kill(self._pid, signal.SIGKILL)
        elif not self._ours:
            self._runtime_kill(signal.SIGKILL)
        self._cgroups.kill()

    def _runtime_kill(self, number: int) -> None:
        argv = self.runtime.argv("kill", self.container_id, str(int(number)))
        try:
            self.launcher.call(argv, self._signalled, timeout=KILL_TIMEOUT)
        except RemoteError as error:
            self._log.warning("container not signalled", error=error.text)

    def _signalled(self, outcome: Outcome) -> None:
        if not outcome.ok:
            self._log.warning("container not signalled", error=outcome.error("kill").text)

    def disposition(self) -> procfs.Disposition | None:
        """Return what the init does with signals; unknown where it is not ours."""
        return procfs.disposition(self._pid) if self._ours else None

    # -- the end --------------------------------------------------------------------------------------

    def _init_ended(self, code: int | None) -> None:
        self._finished_ns = time.time_ns()
        self._code = code
        self._stopper.ended()
        if self.status is Status.STARTING:  # the runtime's word on the start comes first
            self._loop.call_later(START_PATIENCE, self._give_up_start)
        else:
            self._end_if_ended()

    def _end_if_ended(self) -> None:
        if not self._finished_ns or self._ending is not None:
            return
        assert self._oom is not None
        assert self._file is not None
        self.status = Status.ENDING
        self._close_stdin()
        remains = Remains(
            self.container_id,
            self.directory,
            self.runtime,
            self._cgroups,
            self._oom,
            self._sources,
            self._streams,
            self._file,
        )
        self._ending = Ending(
            self._loop,
            self.launcher,
            self._log,
            remains,
            record=self._make_record,
            tell=self._tell,
            over=self._over,
        )

    def _make_record(self, oom_kills: int) -> ExitRecord:
        code = UNKNOWN if self._code is None else exit_code(self._code)
        reason = records.exit_reason(code, oom_kills=oom_kills)
        message = (
            "" if self._code is not None else "the exit code is unknown: the init was no child of the monitor"
        )
        if self._start_error is not None and not self._start_given_up:
            code, reason = start_exit_code(self._start_error.text), records.START_ERROR
            message = self._start_error.text
        return ExitRecord(
            container_id=self.container_id,
            exit_code=code,
            signal=max(0, -(self._code or 0)),
            oom_killed=oom_kills > 0,
            started_at_ns=self._started_ns,
            finished_at_ns=self._finished_ns,
            reason=reason,
            message=message,
        )

    def _tell(self, record: ExitRecord) -> None:
        self.status = Status.STOPPED
        self._record = record
        self._log.info("container ended", exit_code=record.exit_code, reason=record.reason)
        for running in list(self._execs.values()):
            running.container_ended()
        if self._start_error is not None:
            self._answer_all(self._starters, self._start_error)
        self._answer_all(self._waiters, record)

    def _source_ended(self) -> None:
        if self._ending is not None:
            self._ending.source_ended()

    def _close_stdin(self) -> None:
        if self._stdin_fd is not None:
            os.close(self._stdin_fd)
            self._stdin_fd = None

    # -- update ---------------------------------------------------------------------------------------

    def update(self, request: Update, answer: Answer) -> None:
        """Change the limits. Raises RemoteError."""
        if self.status not in (Status.CREATED, Status.STARTING, Status.RUNNING):
            raise precondition(
                f"container {self.container_id} is {self.told_status}, neither created nor running"
            )
        self._updates.submit(request, answer)

    @property
    def groups(self) -> Cgroups:
        """The container's control groups."""
        return self._cgroups

    @property
    def unit(self) -> str:
        """The container's systemd unit: its group's last part, where systemd makes the group."""
        request = self._request
        return os.path.basename(request.cgroup_path) if request is not None and request.systemd_cgroup else ""

    @property
    def init_pid(self) -> int:
        """The container's first process."""
        return self._pid

    # -- exec -----------------------------------------------------------------------------------------

    def exec(self, request: ExecSync, answer: Answer) -> Exec:
        """Run a process in the container. Raises RemoteError."""
        if self.status is not Status.RUNNING:
            raise precondition(f"container {self.container_id} is {self.told_status}, not running")
        self._exec_count += 1
        number = self._exec_count
        try:
            running = Exec(
                self._loop,
                self,
                number,
                request,
                answer=answer,
                gone=lambda: self._execs.pop(number, None),
            )
        except OSError as error:
            raise precondition(f"exec: {error}") from error
        self._execs[number] = running
        return running

    @property
    def stdio_owner(self) -> Owner:
        """Who must be able to open the container's streams again."""
        assert self._request is not None
        return self._request.stdio_uid, self._request.stdio_gid

    def pids(self) -> list[int]:
        """Every process that may be the container's."""
        return self._cgroups.pids() if self._cgroups.known() else procfs.all_pids()

    def sessions(self) -> set[int]:
        """Sessions by which no exec can be told: the host's, ours, the container's own."""
        init = procfs.stat(self._pid)
        return {0, os.getsid(0), init.session if init is not None else 0}

    # -- what is known ----------------------------------------------------------------------------------

    @property
    def told_status(self) -> str:
        """The status in the words of the messages."""
        return _TOLD.get(self.status, self.status.value)

    def state(self) -> State:
        """What the monitor knows."""
        return State(
            container_id=self.container_id,
            status=self.told_status,
            pid=self._pid,
            monitor_pid=os.getpid(),
            created_at_ns=self._created_ns,
            started_at_ns=self._started_ns,
            exit=self._record,
            log_bytes=self._file.written if self._file is not None else 0,
            log_bytes_dropped=self._file.dropped if self._file is not None else 0,
            execs=len(self._execs),
            starting=self.status is Status.STARTING,
        )

    def reopen_log(self) -> None:
        """Reopen the log file at its path. Raises RemoteError."""
        if self._file is None or self.status in (Status.ENDING, Status.STOPPED):
            raise precondition(
                f"container {self.container_id} is {self.told_status}: no log is being written"
            )
        try:
            self._file.reopen()
        except OSError as error:
            raise precondition(f"log reopen: {error}") from error

    def _write_state(self) -> None:
        assert self._request is not None
        record = records.StateRecord(
            container_id=self.container_id,
            pod_id=self.pod_id,
            status=self.told_status,
            pid=self._pid,
            pid_start=self._pid_start,
            monitor_pid=os.getpid(),
            runtime_name=self._request.runtime_name,
            runtime_path=self.runtime.path,
            runtime_root=self.runtime.root,
            log_path=self._request.log_path,
            created_at_ns=self._created_ns,
            started_at_ns=self._started_ns,
        )
        try:
            records.write_state(self.directory, record)
        except OSError as error:
            self._log.error("state record cannot be written", error=error)

    @staticmethod
    def _answer_all(answers: list[Answer], result: Body | RemoteError) -> None:
        for answer in answers:
            answer(result)
        answers.clear()
