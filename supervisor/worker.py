"""Runs in: the supervisor.

One worker process from its fork to its end: its phase, its control channel, its last health, and how it is
ended (told, then killed). What follows its end is decided by supervisor/kinds.py.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ipc.channel import pair
from ipc.errors import Code, RemoteError
from ipc.log import Log
from ipc.loop import Loop, Timer
from ipc.messages import Body
from ipc.messages.control import Health
from ipc.messages.supervisor import SandboxReport, WorkerState
from ipc.release import build
from ipc.settings import Common
from ipc.whereabouts import whereabouts
from supervisor import spawn
from supervisor.cgroup import Groups
from supervisor.config import TimeoutsConfig
from supervisor.control import Control
from supervisor.drains import Drains, Lock
from supervisor.heritage import WorkerRow
from supervisor.logsink import Lines, LogSink
from supervisor.reaper import Reaper
from supervisor.sandbox.report import differences
from supervisor.sandbox.spec import Identity
from supervisor.severing import sever
from supervisor.sockets import Sockets
from supervisor.spawn import DUMP_SIGNAL
from supervisor.table import Entry

DUMP_WAIT = 0.5  # seconds in which a process has written its stacks
DRAIN_LIMIT = 900.0  # seconds for what a worker that was replaced has begun
KILL_AFTER = 2.0  # seconds from SIGABRT, or from the end of the grace, to SIGKILL
UNKILLABLE_AFTER = 2.0  # seconds from SIGKILL until a process that is still there counts as lost


class Phase(enum.StrEnum):
    """Where a process is in its life; the values are what `bulkheadctl workers` shows."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    DRAINING = "draining"  # it accepts no more; nobody waits for its end
    STUCK = "stuck"  # killed, and held by the kernel all the same; nobody waits for its end


@dataclass
class Ground:
    """What every part of the supervisor works with. A reload changes `timeouts` and `paths`."""

    loop: Loop
    log: Log
    sink: LogSink
    reaper: Reaper
    groups: Groups
    timeouts: TimeoutsConfig
    paths: Mapping[str, str]
    log_socket: str
    drains: Drains


@dataclass(frozen=True)
class Origin:
    """What a worker is made of."""

    entry: Entry
    identity: Identity
    settings: Common
    sockets: Sockets


@dataclass(frozen=True)
class Events:
    """What a worker tells its kind."""

    ready: Callable[[Worker], object]
    ended: Callable[[Worker, int], object]
    bound: Callable[[str], object]
    health: Callable[[Worker], object]
    drained: Callable[[Worker], object]
    stuck: Callable[[Worker], object]


@dataclass
class Worker:
    """A process. Made by `start`."""

    ground: Ground
    origin: Origin
    events: Events
    pid: int = 0
    phase: Phase = Phase.STARTING
    started: float = field(default_factory=time.monotonic)
    started_at_ns: int = field(default_factory=time.time_ns)
    report: SandboxReport | None = None
    health: Health = field(default_factory=Health)
    lagged: int = 0  # as of the last health that its kind has counted
    answered: float | None = None  # monotonic time of the last answered ping
    condemned: bool = False  # what holds is not what the table says: no retry makes it good
    why: str = ""  # why we killed it, if we did
    standby: bool = False  # another one still owns what this one will own
    release: str = field(default_factory=build)  # what it was forked from
    inherited: bool = False  # forked by the program that this supervisor was before
    _control: Control | None = None
    _stderr_fd: int = -1
    _stderr: Lines = field(default_factory=Lines)
    _dumps: list[str] | None = None  # what comes while stacks are asked for
    _asking: bool = False
    _timer: Timer | None = None
    _signalled: bool = False
    _grace: float = 0.0  # seconds, once it was told to end
    _oom_kills: int = 0

    # -- beginning ------------------------------------------------------------------------------------

    @classmethod
    def start(cls, ground: Ground, origin: Origin, events: Events, *, standby: bool = False) -> Worker:
        """Fork it. Raises OSError if there can be no process."""
        worker = cls(ground, origin, events, standby=standby)
        worker._oom_kills = worker._count_oom_kills()
        ours, theirs = pair()
        lock = ground.drains.lock(origin.entry.kind) if origin.entry.drains else None
        worker._stderr_fd, stderr_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            child = spawn.fork(worker._job(theirs, stderr_write, lock))
        except OSError:
            ours.close()
            os.close(worker._stderr_fd)
            if lock is not None:
                lock.drop()
            raise
        finally:
            theirs.close()
            os.close(stderr_write)
        worker.pid = child.pid
        if lock is not None:
            lock.told(child.pid)
        worker._watch(ours)
        with contextlib.suppress(ProcessLookupError):
            ground.groups.enter(ground.groups.worker(origin.entry.kind), child.pid)
        child.open_gate()
        return worker

    @classmethod
    def inherit(cls, ground: Ground, origin: Origin, events: Events, row: WorkerRow) -> Worker:
        """Take over one that the program before this one has forked."""
        worker = cls(ground, origin, events, pid=row.pid, phase=Phase(row.phase), inherited=True)
        worker.started, worker.started_at_ns, worker.release = row.started, row.started_at_ns, row.release
        worker.report, worker.why = row.report, row.why
        worker._oom_kills = worker._count_oom_kills()
        worker._stderr_fd = row.stderr_fd
        os.set_inheritable(row.stderr_fd, False)
        worker.answered = ground.loop.time() if worker.phase is Phase.READY else None
        worker._watch(None if row.control_fd < 0 else socket.socket(fileno=row.control_fd), row.asked)
        if worker.phase is not Phase.READY and not origin.entry.drains:
            worker._grace = DRAIN_LIMIT
            worker._kill_later(DRAIN_LIMIT)
        return worker

    def row(self) -> WorkerRow:
        """What the program after this one must know of it."""
        return WorkerRow(
            kind=self.kind,
            pid=self.pid,
            phase=self.phase.value,
            started=self.started,
            started_at_ns=self.started_at_ns,
            release=self.release,
            control_fd=-1 if self._control is None else self._control.fileno(),
            asked=0 if self._control is None else self._control.asked,
            stderr_fd=self._stderr_fd,
            report=self.report,
            why=self.why,
        )

    def _job(self, control: socket.socket, stderr_fd: int, lock: Lock | None) -> spawn.Job:
        entry = self.origin.entry
        level = self.origin.settings.log_level
        child_log = Log(entry.kind, sink=self.ground.log_socket, level=level)
        plan = spawn.WorkerPlan(
            entry=entry,
            settings=self.origin.settings,
            identity=self.origin.identity,
            paths=self.ground.paths,
            log=child_log,
            control=control,
            listener=self.origin.sockets.listener,
            extra=self.origin.sockets.extra,
            standby=self.standby,
        )
        return spawn.Job(
            title=f"bulkhead: {entry.kind}",
            work=lambda: spawn.run_worker(plan),
            log=child_log,
            keep=[*plan.descriptors(), *([lock.fd] if lock else [])],
            stderr_fd=stderr_fd,
        )

    def _watch(self, ours: socket.socket | None, asked: int = 0) -> None:
        ground = self.ground
        ground.reaper.watch(self.pid, self._ended)
        ground.loop.add_reader(self._stderr_fd, self._read_stderr)
        if ours is not None:
            self._control = self._make_control(ours, asked)
        if self.phase is Phase.STARTING:
            self._timer = ground.loop.call_later(
                ground.timeouts.worker_start, lambda: self.kill("it did not say hello in time", abort=True)
            )

    def _make_control(self, ours: socket.socket, asked: int) -> Control:
        ground = self.ground
        return Control(
            ground.loop,
            ours,
            self.origin.entry.kind,
            self.pid,
            on_hello=self._hello,
            on_bound=self._bound,
            on_drain=self._drain,
            on_close=self._channel_closed,
            log=ground.log,
            asked=asked,
        )

    def _hello(self, report: SandboxReport) -> None:
        if self.phase is not Phase.STARTING:
            raise RemoteError(Code.FAILED_PRECONDITION, "one hello is enough")
        self.report = report
        faults = self._faults(report)
        if faults:
            self._condemn(faults)
        self._cancel_timer()
        self.phase = Phase.READY
        self.answered = time.monotonic()
        self.events.ready(self)

    def _bound(self, path: str) -> None:
        self.events.bound(path)  # whoever it belongs to by now

    def _drain(self) -> None:
        if not self.origin.entry.drains or self.phase is Phase.STARTING:
            raise RemoteError(Code.FAILED_PRECONDITION, f"a {self.kind} worker does not drain")
        if self.phase is not Phase.DRAINING:
            self._cancel_timer()
            self.phase = Phase.DRAINING
            self.events.drained(self)

    def _faults(self, report: SandboxReport) -> list[str]:
        declared = self.origin.entry.sandbox
        return [] if declared is None else differences(declared, self.origin.identity, report)

    def _condemn(self, faults: list[str]) -> None:
        self.condemned = True
        for fault in faults:
            self.ground.log.error(
                "sandbox is not as the table says", kind=self.kind, pid_of=self.pid, fault=fault
            )
        self.kill("its sandbox is not as the table says")
        raise RemoteError(Code.PERMISSION_DENIED, "; ".join(faults))

    @property
    def kind(self) -> str:
        return self.origin.entry.kind

    # -- health ---------------------------------------------------------------------------------------

    def ping(self, done: Callable[[], object] | None = None, timeout: float | None = None) -> None:
        """Ask for health, unless an answer is awaited; `done` is called when it is known or will not be."""
        finished = done or (lambda: None)
        doomed = self.phase is not Phase.READY or self.why
        if self._control is None or doomed or (self._asking and done is None):
            finished()
            return
        limit = timeout or self.ground.timeouts.worker_answer
        self._asking = self._asking or done is None
        routine = done is None
        self._control.ping(lambda answer: self._pong(answer, routine, finished), limit)

    def _pong(self, answer: Health | RemoteError, routine: bool, finished: Callable[[], object]) -> None:
        if routine:
            self._asking = False
        if isinstance(answer, Health):
            self.health = answer
            self.answered = time.monotonic()
            self.events.health(self)
        elif routine and answer.code is Code.DEADLINE_EXCEEDED:
            self.kill("it answers no pings", abort=True)
        finished()

    # -- being exchanged ------------------------------------------------------------------------------

    def begin(self) -> None:
        """It stood by; now it is its turn."""
        self.standby = False
        if self._control is not None:
            self._control.begin(self._begun)

    def _begun(self, answer: Body | RemoteError) -> None:
        if isinstance(answer, RemoteError) and answer.code is Code.DEADLINE_EXCEEDED:
            self.kill("it does not begin", abort=True)

    def hand_over(self, path: str, done: Callable[[], object], timeout: float) -> None:
        """Have cri let go of its state for the one that stands by at `path`; it drains from then on. One that
        does not is killed: `done`, or its end, says that the state is free."""

        def answered(answer: Body | RemoteError) -> None:
            if isinstance(answer, RemoteError):
                self.kill(f"it does not hand over: {answer.text}")
            else:
                self.leave()
                done()

        assert self._control is not None
        self._control.hand_over(path, answered, timeout)

    def leave(self) -> None:
        """It ends by itself with what it has begun; nobody waits for it, but not for ever."""
        self.phase = Phase.DRAINING
        self._kill_later(DRAIN_LIMIT)

    def reload(self, settings: bytes) -> None:
        """Tell it its new settings."""
        if self._control is not None and self.phase is Phase.READY:
            self._control.reload(settings, self._reloaded)

    def _reloaded(self, answer: object) -> None:
        if isinstance(answer, RemoteError):
            self.ground.log.warning("worker did not take its settings", kind=self.kind, why=answer)

    # -- ending ---------------------------------------------------------------------------------------

    def stop(self, grace: float) -> None:
        """Tell it to end in order; after the grace it is killed. Told again, a shorter grace counts."""
        if self.phase is Phase.DRAINING or (self.phase is Phase.STOPPING and grace >= self._grace):
            return
        self._grace = grace
        if self.phase is Phase.STOPPING:
            self._kill_later(grace + KILL_AFTER)
            return
        ready, self.phase = self.phase is Phase.READY, Phase.STOPPING
        if ready and self._control is not None:
            self._control.stop(grace)
        else:
            self._signal(signal.SIGKILL)  # it serves nobody yet
        self._kill_later(grace + KILL_AFTER)

    def kill(self, why: str, *, abort: bool = False) -> None:
        """End it now; with `abort` it gets a moment to tell where it hangs."""
        self.why = self.why or why
        doing = "; ".join(sorted({one.doing or one.type for one in self.health.requests}))
        at = whereabouts(self.pid)
        self.ground.log.error(
            "worker is killed", kind=self.kind, pid_of=self.pid, why=why, doing=doing, where=at
        )
        self._signal(signal.SIGABRT if abort else signal.SIGKILL)
        self._kill_later(KILL_AFTER)

    def _kill_later(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self.ground.loop.call_later(seconds, self._kill_now)

    def _kill_now(self) -> None:
        self._signal(signal.SIGKILL)
        if self.phase is not Phase.DRAINING:  # that one nobody waits for
            self._timer = self.ground.loop.call_later(UNKILLABLE_AFTER, self._give_up)

    def _give_up(self) -> None:
        """It does not end of SIGKILL: it is in a call that the kernel does not break off. It will never
        execute anything of its own again, so another one may take its place."""
        self._timer = None
        self.why = self.why or "it does not end of SIGKILL"
        self.phase = Phase.STUCK
        severed = 0
        with contextlib.suppress(OSError):  # it ends just now
            severed = sever(self.pid)
        self.ground.log.error(
            "worker hangs in the kernel and is left behind",
            kind=self.kind, pid_of=self.pid, where=whereabouts(self.pid), connections_cut=severed,
        )  # fmt: skip
        self.events.stuck(self)

    def _signal(self, number: int) -> None:
        self._signalled = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)  # not reaped yet, so the number is still its own

    def blameless(self, code: int) -> bool:
        """Whether somebody else ended it: SIGKILL that is neither ours nor the price of its memory."""
        return code == -signal.SIGKILL and not self._signalled and self._count_oom_kills() == self._oom_kills

    def _count_oom_kills(self) -> int:
        return self.ground.groups.oom_kills(self.ground.groups.worker(self.kind))

    def _channel_closed(self) -> None:
        self._control = None
        if self.phase not in {Phase.STOPPING, Phase.DRAINING, Phase.STUCK}:
            self._kill_later(self.ground.timeouts.worker_stop + KILL_AFTER)

    def _ended(self, code: int) -> None:
        self._cancel_timer()
        control, self._control = self._control, None
        if control is not None:
            control.close()
            self._cancel_timer()  # closing the channel sets one
        self._read_stderr()
        self._log_lines(self._stderr.rest())
        self.ground.loop.remove_reader(self._stderr_fd)
        os.close(self._stderr_fd)
        self.ground.sink.forget(self.pid)
        self.events.ended(self, code)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _read_stderr(self) -> None:
        """What a worker writes to standard error is a crash or a library; it goes the way of its log."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._stderr_fd, 65536)
            if not data:
                self.ground.loop.remove_reader(self._stderr_fd)
            self._log_lines(self._stderr.take(data))

    def dump(self, done: Callable[[list[str]], object]) -> None:
        """Make the process write where each of its threads is (faulthandler); `done` gets the lines."""
        first = self._dumps is None
        self._dumps = self._dumps or []
        stack = self._dumps
        if first:
            self._signal(DUMP_SIGNAL)

        def over() -> None:
            self._dumps = None
            done(stack)

        self.ground.loop.call_later(DUMP_WAIT, over)

    def _log_lines(self, lines: list[bytes]) -> None:
        if self._dumps is not None:
            self._dumps += [line.decode("utf-8", "replace") for line in lines]
            return
        log = Log(self.kind)
        for line in lines:
            text = log.format("warning", "standard error", {"line": line.decode("utf-8", "replace")})
            self.ground.sink.line(self.pid, text.encode())

    # -- telling --------------------------------------------------------------------------------------

    def state(self) -> WorkerState:
        """What `bulkheadctl workers` shows."""
        now = time.monotonic()
        return WorkerState(
            kind=self.kind,
            name=self.kind,
            state=self.phase.value,
            pid=self.pid,
            started_at_ns=self.started_at_ns,
            uid=self.origin.identity.uid,
            requests=self.health.requests,
            queued=self.health.counters.get("queued", 0),
            doing=whereabouts(self.pid) if self.phase is Phase.STUCK else self.health.doing,
            jobs=self.health.jobs,
            last_ping_ms=-1 if self.answered is None else int((now - self.answered) * 1000),
            sandbox=self.report,
            release=self.release,
        )
