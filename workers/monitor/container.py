"""Runs in: the monitor, in a hand; at the container's end in the keeper itself if no hand is there.

The container's state machine: new, created, running, stopped. What it is when a hand begins stands in
`state.json`, and what changes is written there. It runs the OCI runtime, execs and stops, and answers each
request when its moment has come; a request that is sent again joins the one under way. The keeper owns the
init, the output and the log: Link is how it is told, and how it tells that the init has ended, which always
leads to the same end, whoever brought it about.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import signal
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from ipc import kernel
from ipc.errors import RemoteError, precondition
from ipc.fds import close_all
from ipc.loop import Loop
from ipc.messages import Body
from ipc.messages.monitor import (
    AttachOpen,
    Create,
    Created,
    ExecOpen,
    ExecSync,
    ExitRecord,
    Start,
    Started,
    State,
    Update,
)
from workers.monitor import handing, procfs, records, starting
from workers.monitor.attaching import Attached
from workers.monitor.cgroups import Cgroups
from workers.monitor.containerlog import ContainerLog
from workers.monitor.creation import Born, Creation
from workers.monitor.ending import DELETE_TIMEOUT, KILL_DELAYS
from workers.monitor.execs import Exec
from workers.monitor.execsessions import ExecSession, Opened
from workers.monitor.link import STRANGER, Link, Taken
from workers.monitor.records import StateRecord
from workers.monitor.runtime import Invocation, Launcher, Outcome, Runtime, runtime_of
from workers.monitor.stdio import Owner, open_log
from workers.monitor.stopping import Stopper
from workers.monitor.updating import Updates

KILL_TIMEOUT = 10.0  # seconds for the runtime's `kill`, where it must be asked
START_PATIENCE = 3.0  # seconds for the runtime's word on a start whose init has ended

Answer = Callable[[Body | RemoteError], object]
E = TypeVar("E", Exec, ExecSession)


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
    """One container, for as long as a hand lives."""

    def __init__(
        self,
        loop: Loop,
        launcher: Launcher,
        log: ContainerLog,
        link: Link,
        *,
        container_id: str,
        pod_id: str,
        directory: str,
        pipe_bytes: int,
        monitor_pid: int,
    ) -> None:
        self.container_id = container_id
        self.pod_id = pod_id
        self.directory = directory
        self.launcher = launcher
        self.runtime = Runtime("", "")
        self.status = Status.NEW
        self.log_path = ""
        self._loop = loop
        self._log = log
        self._link = link
        self._pipe_bytes = pipe_bytes
        self._monitor_pid = monitor_pid
        self._state: StateRecord | None = None
        self._pid = 0
        self._pidfd = -1
        self._request: Create | None = None
        self._log_fd = -1
        self._cgroups = Cgroups({})
        self._stopper = Stopper(loop, self)
        self._updates = Updates(self, log)
        self._execs: dict[int, Exec | ExecSession] = {}
        self._attached = Attached(loop, link, log)
        self._exec_count = 0
        self._finished = False  # its init has
        self._start_call: Invocation | None = None
        self._start_error: RemoteError | None = None
        self._start_given_up = False
        self._record: ExitRecord | None = None
        self._unwanted = False  # to be ended as soon as it is created
        self._unsure = False  # it may have been started though that was not written down
        self._creators: list[Answer] = []
        self._starters: list[Answer] = []
        self._waiters: list[Answer] = []

    def load(self) -> None:
        """Take up what earlier hands have left. Raises OSError, msgspec.DecodeError."""
        state = records.read_state(self.directory)
        if state is not None:
            self._adopt(state)
            self.status = Status.RUNNING if state.started_at_ns else Status.CREATED
            self._unsure = self.status is Status.CREATED  # whoever was here may have died over a start

    @property
    def quiet(self) -> bool:
        """True if nothing is under way that must not be left."""
        return self._finished or not (
            self._unwanted
            or self._execs
            or self._attached.busy
            or self._stopper.busy
            or self._updates.busy
            or self.status in (Status.CREATING, Status.STARTING)
        )

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
        self.runtime = runtime_of(request)
        try:
            if request.keep:
                records.write_kept(self.directory, request.keep)
            self._log_fd = open_log(request.log_path) if request.log_path else -1
            if handing.was_begun(self.directory):  # by a hand that died
                go_on = functools.partial(self._begin, request)
                handing.clear(self.launcher, self.runtime, self.container_id, self.directory, go_on)
            else:
                self._begin(request)
        except OSError as error:
            self._not_created(precondition(f"create: {error}"))
        except RemoteError as error:
            self._not_created(error)

    def _begin(self, request: Create) -> None:
        try:
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
        record, what, fds = self._describe(result)
        self._log_fd = -1
        try:
            # In this order: whoever finds the record finds the descriptors, though this hand dies in between.
            self._link.secure(what, fds)
            records.write_state(self.directory, record)
        except OSError as error:
            self._log.error("state record cannot be written", error=error)
            close_all(fds)
            self._delete_debris(precondition(f"create: state record: {error}"))
            return
        self._adopt(record)
        self.status = Status.CREATED
        self._link.take(what, fds)
        self._answer_all(self._creators, Created(pid=self._pid))
        if self._unwanted:
            self._stopper.kill()

    def _describe(self, born: Born) -> tuple[StateRecord, Taken, list[int]]:
        """What is written down and what is handed over of a new container."""
        assert self._request is not None
        kin, pidfd = handing.kinship(born.pid, self._monitor_pid)
        record = handing.record_of(
            self._request,
            born,
            container_id=self.container_id,
            pod_id=self.pod_id,
            monitor_pid=self._monitor_pid,
            ours=kin != STRANGER,
        )
        return record, *handing.gift(born, kin, pidfd, self._log_fd, record)

    def _adopt(self, record: StateRecord) -> None:
        self._state = record
        self.runtime = runtime_of(record)
        self.log_path = record.log_path
        self._attached.terminal, self._attached.stdin_once = record.terminal, record.stdin_once
        self._cgroups = Cgroups(record.cgroups)
        self._pid = record.pid
        if record.ours:
            self._pidfd = procfs.open_pid(record.pid, record.pid_start)

    def _delete_debris(self, error: RemoteError) -> None:
        argv = self.runtime.argv("delete", "--force", self.container_id)
        try:
            self.launcher.call(argv, lambda _outcome: self._not_created(error), timeout=DELETE_TIMEOUT)
        except RemoteError:
            self._not_created(error)

    def _not_created(self, error: RemoteError) -> None:
        self._log.warning("container not created", error=error.text)
        path = "" if self._request is None else self._request.cgroup_path
        self._clear(Cgroups.of_path(path, self.container_id), 0, error)

    def _clear(self, groups: Cgroups, attempt: int, error: RemoteError) -> None:
        """A runtime that failed half-way may have made groups, and what it started may still be in some."""
        if not groups.clear() and attempt < len(KILL_DELAYS):
            self._loop.call_later(KILL_DELAYS[attempt], lambda: self._clear(groups, attempt + 1, error))
        else:
            self._tell_not_created(error)

    def _tell_not_created(self, error: RemoteError) -> None:
        self.status = Status.STOPPED
        self._unwanted = False
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1
        for answers in (self._creators, self._starters, self._waiters):
            self._answer_all(answers, error)
        self._link.leave()

    # -- start ----------------------------------------------------------------------------------------

    def start(self, request: Start, answer: Answer) -> None:
        """Start it, or answer that it was started."""
        if self._started_at_ns and self.status in (Status.RUNNING, Status.ENDING, Status.STOPPED):
            answer(Started(started_at_ns=self._started_at_ns))
        elif self.status is Status.STARTING:
            self._starters.append(answer)
        elif self.status is Status.CREATED and not self._unwanted:
            self._start(request, answer)
        else:
            raise precondition(f"container {self.container_id} is {self.told_status}, not created")

    def _start(self, request: Start, answer: Answer) -> None:
        now = time.time_ns()
        self.status = Status.STARTING
        self._starters.append(answer)
        if self._unsure and starting.calls_go_on(self._monitor_pid):
            self._find_out(lambda runs: self._runs(now) if runs else self._call_start(request, now))
        else:
            self._call_start(request, now)

    def _find_out(self, answer: Callable[[bool], object]) -> None:
        """Ask whether it runs, when a call that a dead hand has made is over."""
        starting.find_out(self.launcher, self.runtime, self.container_id, self._monitor_pid, answer)

    def _call_start(self, request: Start, now: int) -> None:
        argv, timeout = self.runtime.argv("start", self.container_id), request.timeout_ms / 1000
        try:
            self._start_call = self.launcher.call(argv, lambda end: self._started(now, end), timeout=timeout)
        except RemoteError as error:
            self._not_started(error)

    def _started(self, at_ns: int, outcome: Outcome) -> None:
        if outcome.ok:
            self._runs(at_ns)
        elif self._unsure:
            failed = outcome.error("start")
            self._find_out(lambda runs: self._runs(at_ns) if runs else self._not_started(failed))
        else:
            self._not_started(outcome.error("start"))

    def _runs(self, at_ns: int) -> None:
        self._unsure = False
        self.status = Status.RUNNING
        # The moment before the call: a short life must not seem to end before it began.
        self._update(status="running", started_at_ns=at_ns)
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
        else:  # else the record tells how the init ended, not this
            self._update(start_error=error.text)
        self._log.warning("container not started", error=error.text)
        self._start_error = error
        self.status = Status.CREATED
        self._unwanted = True
        if self._finished:
            self._end_if_ended()
        else:
            self._stopper.kill()

    @property
    def _started_at_ns(self) -> int:
        return self._state.started_at_ns if self._state is not None else 0

    def _update(self, **changes: str | int) -> None:
        assert self._state is not None
        self._state = msgspec.structs.replace(self._state, **changes)
        try:
            records.write_state(self.directory, self._state)
        except OSError as error:
            self._log.error("state record cannot be written", error=error)

    # -- stop, wait, delete -----------------------------------------------------------------------------

    def stop(self, number: int, grace: float, answer: Answer) -> None:
        """Stop it; the answer is its exit record."""
        if self.status is Status.NEW:
            raise precondition(f"container {self.container_id} is not created")
        self.wait(answer)
        if self.status in (Status.STARTING, Status.RUNNING):
            self._stopper.request(number, grace)
            self._log.info("container is being stopped", signal=number, grace=grace)
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
            self._link.leave()
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
            self._signal(number)
        else:
            self._runtime_kill(number)

    def kill(self) -> None:
        """SIGKILL everything that is the container's."""
        if self._ours:
            self._signal(signal.SIGKILL)
        else:
            self._runtime_kill(signal.SIGKILL)
        self._cgroups.kill()

    @property
    def _ours(self) -> bool:
        return self._state is not None and self._state.ours

    def _signal(self, number: int) -> None:
        # By pidfd: the keeper may have reaped it, and its number may be another's.
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)

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
        if not self._ours or self._state is None:
            return None
        return procfs.disposition(self._pid, self._state.init_program)

    # -- the end --------------------------------------------------------------------------------------

    def init_ended(self) -> None:
        """The keeper's word that the init was reaped."""
        self._finished = self._attached.ending = True
        self._stopper.ended()
        if self.status is Status.STARTING:  # the runtime's word on the start comes first
            self._loop.call_later(START_PATIENCE, self._give_up_start)
        else:
            self._end_if_ended()

    def _end_if_ended(self) -> None:
        if self._finished and self.status is not Status.ENDING:
            self.status = Status.ENDING
            self._link.go()

    def tell(self, record: ExitRecord) -> None:
        """The exit record is on disk: whoever waits may know."""
        self.status = Status.STOPPED
        self._record = record
        for running in list(self._execs.values()):
            running.container_ended()
        self._attached.container_ended()
        if self._start_error is not None:
            self._answer_all(self._starters, self._start_error)
        self._answer_all(self._waiters, record)

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
        """The container's systemd unit, "" where systemd does not make the group."""
        return self._state.unit if self._state is not None else ""

    @property
    def init_pid(self) -> int:
        """The container's first process."""
        return self._pid

    # -- exec -----------------------------------------------------------------------------------------

    def exec(self, request: ExecSync, answer: Answer) -> Exec:
        """Run a process in the container. Raises RemoteError."""
        return self._new_exec(
            lambda number, over: Exec(self._loop, self, number, request, answer=answer, gone=over)
        )

    def open_exec(self, request: ExecOpen, opened: Opened) -> ExecSession:
        """Run a process whose streams are the caller's. Raises RemoteError."""
        return self._new_exec(
            lambda number, over: ExecSession(self._loop, self, number, request, opened=opened, over=over)
        )

    def _new_exec(self, make: Callable[[int, Callable[[], object]], E]) -> E:
        if self.status is not Status.RUNNING:
            raise precondition(f"container {self.container_id} is {self.told_status}, not running")
        kernel.become_subreaper()  # what the runtime's detached exec leaves is to be this process's child
        self._exec_count += 1
        number = self._exec_count
        try:
            running = make(number, lambda: self._execs.pop(number, None))
        except OSError as error:
            raise precondition(f"exec: {error}") from error
        self._execs[number] = running
        return running

    def attach(self, request: AttachOpen, opened: Opened) -> None:
        """Let somebody join the container's streams. Raises RemoteError."""
        if self.status not in (Status.CREATED, Status.STARTING, Status.RUNNING) or self._finished:
            raise precondition(
                f"container {self.container_id} is {self.told_status}: there is nothing to join"
            )
        self._attached.join(request, opened)

    @property
    def saying_goodbye(self) -> bool:
        """True while those who attached have not taken everything that waits for them."""
        return self._attached.busy

    @property
    def stdio_owner(self) -> Owner:
        """Who must be able to open the container's streams again."""
        assert self._state is not None
        return self._state.stdio_uid, self._state.stdio_gid

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

    def state(self, answer: Answer) -> None:
        """Answer with what is known."""
        self._link.count(lambda written, dropped: answer(self._state_with(written, dropped)))

    def _state_with(self, written: int, dropped: int) -> State:
        return State(
            container_id=self.container_id,
            status=self.told_status,
            pid=self._pid,
            monitor_pid=self._monitor_pid,
            created_at_ns=self._state.created_at_ns if self._state is not None else 0,
            started_at_ns=self._started_at_ns,
            exit=self._record,
            log_bytes=written,
            log_bytes_dropped=dropped,
            log_bytes_unsure=self._state.log_bytes_unsure if self._state is not None else 0,
            execs=len(self._execs),
            starting=self.status is Status.STARTING,
        )

    def reopen_log(self, answer: Answer) -> None:
        """Reopen the log file at its path; answer when it is. Raises RemoteError."""
        if self.status not in (Status.CREATED, Status.STARTING, Status.RUNNING):
            raise precondition(
                f"container {self.container_id} is {self.told_status}: no log is being written"
            )
        if not self.log_path:
            answer(Body())
            return
        try:
            fd = open_log(self.log_path)
        except OSError as error:
            raise precondition(f"log reopen: {error}") from error
        self._link.reopen(fd, lambda: answer(Body()))

    @staticmethod
    def _answer_all(answers: list[Answer], result: Body | RemoteError) -> None:
        for answer in answers:
            answer(result)
        answers.clear()
