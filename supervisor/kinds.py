"""Runs in: the supervisor.

One kind of worker: keeps as many processes of it as the table wants, starts on demand when a connection
waits in the kernel's queue, lets a pool grow while it stays there, recycles, and asks the policy what
to do after a death. It owns the kind's sockets, which outlive every one of its processes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable

import msgspec

from ipc.loop import Timer
from ipc.messages.supervisor import InFlight, JobState, WorkerState
from ipc.settings import Common
from supervisor.drains import states as draining
from supervisor.exchange import Exchange, Parting
from supervisor.heritage import KindRow
from supervisor.policy import Policy, Rules, State, Verdict
from supervisor.sandbox.spec import Identity
from supervisor.slow import Slow
from supervisor.sockets import Sockets
from supervisor.table import Entry
from supervisor.table import Exchange as How
from supervisor.tally import Tally, describe
from supervisor.worker import Events, Ground, Origin, Phase, Worker

CROWDED_AFTER = 0.25  # seconds that a connection waits before a pool grows


class Kind:
    """Everything of one kind. `changed` is called when a process of it became ready or ended; `bound` and
    `relayed` with the path of a socket that cri has bound: make it public, or only known to the cri
    before."""

    def __init__(
        self,
        ground: Ground,
        entry: Entry,
        *,
        identity: Identity,
        settings: Common,
        sockets: Sockets,
        policy: Policy,
        tally: Tally,
        changed: Callable[[Kind], object],
        bound: Callable[[str], object],
        relayed: Callable[[str], str] = str,
    ) -> None:
        self.entry = entry
        self.identity = identity
        self.workers: dict[int, Worker] = {}
        self.draining: dict[int, Worker] = {}  # they end with their last session; no policy looks at them
        self.stuck: dict[int, Worker] = {}  # killed, and held by the kernel all the same
        self.exchange: Exchange | None = None  # while an upgrade replaces a worker
        self.restarts = 0
        self.lagged = 0  # as all its processes told, those of the past among them
        self.last_death = ""
        self._ground = ground
        self._settings = settings
        self._sockets = sockets
        self._policy = policy
        self._tally = tally
        self._changed = changed
        self._bound = bound
        self._relayed = relayed
        self._events = Events(self._ready, self._ended, bound, self._health, self._drained, self._stuck)
        self._slow = Slow()
        self._stopping = False
        self._stopped: list[Callable[[], object]] = []
        self._backoff: Timer | None = None
        self._crowded: Timer | None = None
        self._pinger: Timer | None = None

    # -- starting -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin: start what always runs, listen for the rest."""
        self._ground.groups.make(self._ground.groups.worker(self.entry.kind), self.entry.limits)
        self._fill()
        self._ping_later()

    @property
    def ready(self) -> bool:
        """True if nothing is missing: its minimum is ready."""
        return sum(w.phase is Phase.READY for w in self.workers.values()) >= self.entry.minimum

    @property
    def failed(self) -> bool:
        """True while the policy has given up on quick tries."""
        return self._policy.state is State.FAILED

    def _active(self) -> list[Worker]:
        active = [worker for worker in self.workers.values() if worker.phase is not Phase.STOPPING]
        return active + ([self.exchange.new] if self.exchange is not None else [])

    def _fill(self) -> None:
        if self._stopping or self._backoff is not None:
            return
        while len(self._active()) < self.entry.minimum and self._backoff is None:
            self._spawn()
        self._arm()

    def _origin(self) -> Origin:
        return Origin(self.entry, self.identity, self._settings, self._sockets)

    def _spawn(self) -> None:
        try:
            worker = Worker.start(self._ground, self._origin(), self._events)
        except OSError as error:
            self._ground.log.error("cannot fork", kind=self.entry.kind, why=error)
            self._wait(self._policy.died())
            return
        self.workers[worker.pid] = worker
        self._ground.log.info("worker started", kind=self.entry.kind, pid_of=worker.pid)

    # -- on demand ------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Watch the sockets if a connection could need another process."""
        active = self._active()
        starting = any(worker.phase is Phase.STARTING for worker in active)
        self._disarm()
        if self._stopping or self._backoff is not None or self.exchange is not None:
            return
        if starting or len(active) >= self.entry.maximum:
            return
        react = self._grow if active else self._demand
        for sock in self._sockets.all():
            self._ground.loop.add_reader(sock.fileno(), react)

    def _disarm(self) -> None:
        for sock in self._sockets.all():
            self._ground.loop.remove_reader(sock.fileno())
        if self._crowded is not None:
            self._crowded.cancel()
            self._crowded = None

    def _demand(self) -> None:
        self._disarm()
        self._spawn()

    def _grow(self) -> None:
        """A connection waits; look again in a moment whether a worker took it."""
        self._disarm()
        self._crowded = self._ground.loop.call_later(CROWDED_AFTER, self._look_again)

    def _look_again(self) -> None:
        self._crowded = None
        if self._sockets.waiting() and len(self._active()) < self.entry.maximum:
            self._spawn()
        else:
            self._arm()

    # -- what workers tell ----------------------------------------------------------------------------

    def _ready(self, worker: Worker) -> None:
        self._policy.ready()
        for sentence in worker.report.degraded if worker.report else ():
            self._ground.log.warning("sandbox degraded", kind=self.entry.kind, lacks=sentence)
        self._ground.log.info("worker ready", kind=self.entry.kind, pid_of=worker.pid)
        if worker.origin.settings != self._settings:  # they changed while it came up
            worker.reload(msgspec.msgpack.encode(self._settings))
        self._arm()
        self._changed(self)

    def _health(self, worker: Worker) -> None:
        limit = self._ground.timeouts.slow
        under_way = [*worker.health.requests, *(_as_request(job) for job in worker.health.jobs)]
        for one in self._slow.look(worker.pid, self._ground.loop.time(), under_way, limit):
            self._ground.log.warning(
                "slow request",
                kind=self.entry.kind,
                type=one.type,
                seconds=one.age_ms // 1000,
                stage=one.doing or worker.health.doing or "unknown",
                pid_of=worker.pid,
            )
        served, lagged = worker.health.counters.get("served", 0), worker.health.counters.get("lagged", 0)
        self.lagged += lagged - worker.lagged
        worker.lagged = lagged
        if self.entry.recycle and served >= self.entry.recycle and not self._stopping:
            self._ground.log.info("worker recycled", kind=self.entry.kind, pid_of=worker.pid, served=served)
            worker.stop(self._ground.timeouts.worker_stop)
            self._fill()

    def _drained(self, worker: Worker) -> None:
        """It accepts no more, what it has begun goes on: from here on it is nobody's, until it ends."""
        if worker.pid in self.draining:
            return
        self.draining[worker.pid] = self.workers.pop(worker.pid)
        self._ground.log.info("worker drains", kind=self.entry.kind, pid_of=worker.pid)
        self._changed(self)
        if self._stopping:
            self._maybe_stopped()
        else:
            self._fill()

    def _ended(self, worker: Worker, code: int) -> None:
        if self.draining.pop(worker.pid, None) is not None:
            how = describe(code, self._ground.loop.time() - worker.started)
            if code:
                self._tally.add(self.entry.kind, worker.pid, how, worker.why)
            self._ground.log.info("worker drained", kind=self.entry.kind, pid_of=worker.pid, how=how)
            return
        if self.stuck.pop(worker.pid, None) is not None:
            self._ground.log.info("worker that hung has ended", kind=self.entry.kind, pid_of=worker.pid)
            return
        self._gone(worker, code)

    def _stuck(self, worker: Worker) -> None:
        """It counts as dead from now on, and is replaced like the dead."""
        if worker.pid in self.workers:
            self.stuck[worker.pid] = worker
            self._gone(worker, -signal.SIGKILL)

    def _gone(self, worker: Worker, code: int) -> None:
        del self.workers[worker.pid]
        if self.exchange is not None:
            self.exchange.old_ended(worker)
        asked = worker.phase is Phase.STOPPING or (self.entry.on_demand and code == 0)
        if not self.workers:
            self._kill_leftovers()
        if asked and not worker.why:
            self._ground.log.info("worker ended", kind=self.entry.kind, pid_of=worker.pid, code=code)
        else:
            self._died(worker, code)
        self._changed(self)
        if self._stopping:
            self._maybe_stopped()
        else:
            self._fill()

    def _died(self, worker: Worker, code: int) -> None:
        self.last_death = describe(code, self._ground.loop.time() - worker.started)
        self.restarts += 1
        self._tally.add(self.entry.kind, worker.pid, self.last_death, worker.why)
        if worker.condemned:
            verdict = self._policy.condemn()
        else:
            verdict = self._policy.died(blameless=worker.blameless(code))
        self._ground.log.error(
            "worker died",
            kind=self.entry.kind,
            pid_of=worker.pid,
            how=self.last_death,
            why=worker.why,
            state=verdict.state,
            delay=round(verdict.delay, 2),
        )
        self._wait(verdict)

    def _wait(self, verdict: Verdict) -> None:
        if verdict.delay and not self._stopping:
            self._disarm()
            if self._backoff is not None:
                self._backoff.cancel()
            self._backoff = self._ground.loop.call_later(verdict.delay, self._wait_is_over)

    def _wait_is_over(self) -> None:
        self._backoff = None
        self._fill()

    def _kill_leftovers(self) -> None:
        """Children of the last worker (a plugin, an unpack) end with it, even those that left its session."""
        groups = self._ground.groups
        group = groups.worker(self.entry.kind)
        for pid in groups.pids(group) - {os.getpid(), *self._spared()}:
            self._ground.log.warning("leftover killed", kind=self.entry.kind, pid_of=pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _spared(self) -> set[int]:
        """Who ends with its last session, of this supervisor's and of an earlier one's."""
        found = self._ground.drains.pids(self.entry.kind) if self.entry.drains else set()
        if self.exchange is not None:
            found.add(self.exchange.new.pid)
        return (found | self.draining.keys() | self.stuck.keys()) - self.workers.keys()

    # -- an upgrade in place --------------------------------------------------------------------------

    def row(self) -> KindRow:
        """What the program after this one must know."""
        workers = [*self.workers.values(), *self.draining.values()]
        return KindRow(
            kind=self.entry.kind,
            listener_fd=self._sockets.listener.fileno(),
            extra_fds={name: sock.fileno() for name, sock in self._sockets.extra.items()},
            restarts=self.restarts,
            last_death=self.last_death,
            workers=[worker.row() for worker in workers],
        )

    def inherit(self, row: KindRow) -> None:
        """Take over the workers of the program before this one; before `start`."""
        self.restarts, self.last_death = row.restarts, row.last_death
        for one in row.workers:
            worker = Worker.inherit(self._ground, self._origin(), self._events, one)
            place = self.draining if worker.phase is Phase.DRAINING else self.workers
            place[worker.pid] = worker

    @property
    def settled(self) -> bool:
        """True if no worker of it is between fork and hello, and none is being replaced."""
        return self.exchange is None and all(w.phase is not Phase.STARTING for w in self.workers.values())

    def replace_inherited(self, done: Callable[[str], object]) -> None:
        """Replace the workers of the program before, one at a time. `done` gets "", or why one stays."""
        old = next((w for w in self.workers.values() if w.inherited and w.phase is Phase.READY), None)
        if old is None or self._stopping:
            done("")
        elif self.entry.exchange is How.RESTART:
            self.restart(lambda: done(""))
        else:
            self._disarm()
            self._replace(old, done)

    def _replace(self, old: Worker, done: Callable[[str], object]) -> None:
        def over(fault: str) -> None:
            self.exchange = None
            self._fill()
            if fault:
                done(fault)
            else:
                self.replace_inherited(done)

        try:
            parting = Parting(old, self._relayed, self._bound, self._taken, over)
            self.exchange = Exchange(self._ground, self._origin(), parting)
        except OSError as error:
            done(f"{self.entry.kind}: cannot fork: {error}")

    def _taken(self, new: Worker, old: Worker) -> None:
        """The new worker's turn begins: it is one like any other now."""
        new.events = self._events
        self.workers[new.pid] = new
        if old.phase is Phase.DRAINING and old.pid in self.workers:
            self._drained(old)
        self._ready(new)

    # -- health ---------------------------------------------------------------------------------------

    def _ping_later(self) -> None:
        self._pinger = self._ground.loop.call_later(self._ground.timeouts.ping, self._ping_all)

    def _ping_all(self) -> None:
        for worker in list(self.workers.values()):
            worker.ping()
        self._ping_later()

    def ask_all(self, done: Callable[[], object], timeout: float) -> None:
        """Ask every process for fresh health; `done` is called once per process."""
        for worker in list(self.workers.values()):
            worker.ping(done, timeout)

    # -- changing and ending --------------------------------------------------------------------------

    def resize(self, entry: Entry) -> None:
        """Take another size of the pool. One that is too large shrinks as its workers become idle."""
        if entry != self.entry:
            self.entry = entry
            self._fill()

    def reform(self, rules: Rules) -> None:
        """Take other numbers of the restart policy; a wait that has begun ends as it was announced."""
        self._policy.reform(rules)

    def dump(self, done: Callable[[list[str]], object]) -> None:
        """Ask every process where it is; `done` gets the lines of all stacks."""
        waiting = list(self.workers.values())
        lines: list[str] = []

        def told(worker: Worker, stack: list[str]) -> None:
            lines.extend([f"{worker.kind} {worker.pid}:", *stack])
            waiting.remove(worker)
            if not waiting:
                done(lines)

        if not waiting:
            done([f"{self.entry.kind}: no process"])
        for worker in list(waiting):
            worker.dump(functools.partial(told, worker))

    def reload(self, settings: Common) -> None:
        """Take new settings, for those that run and those that come."""
        if settings == self._settings:
            return
        self._settings = settings
        data = msgspec.msgpack.encode(settings)
        for worker in self._active():
            worker.reload(data)

    def restart(self, done: Callable[[], object]) -> None:
        """End every process in order and start anew, the past forgiven; `done` when the old ones are gone."""
        self._policy.pardon()
        self.restarts += len(self.workers)
        self.stop(lambda: self._begin_anew(done))

    def _begin_anew(self, done: Callable[[], object]) -> None:
        if self._stopping:  # else another restart has begun anew already
            self._stopping = False
            self._fill()
            self._ping_later()
        done()

    def stop(self, done: Callable[[], object]) -> None:
        """End every process in order; `done` when all are gone."""
        self._stopping = True
        self._disarm()
        for timer in (self._backoff, self._pinger):
            if timer is not None:
                timer.cancel()
        self._backoff = self._pinger = None
        self._stopped.append(done)
        if self.exchange is not None:
            self.exchange.abandon("the kind is told to stop")
        for worker in self.workers.values():
            worker.stop(self._ground.timeouts.worker_stop)
        self._maybe_stopped()

    def _maybe_stopped(self) -> None:
        if not self.workers:
            callbacks, self._stopped = self._stopped, []
            for callback in callbacks:
                self._ground.loop.call_soon(callback)

    def close(self) -> None:
        """Close the sockets and remove their paths, when everything has ended but who drains.

        Of these, sessions go on (`drains` in the table); a worker that an upgrade has replaced ends now.
        """
        for pid in () if self.entry.drains else self.draining:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._sockets.close()

    # -- telling --------------------------------------------------------------------------------------

    def states(self) -> list[WorkerState]:
        """A row per process, or one that says why there is none."""
        rows = [worker.state() for worker in self.workers.values()] or [self._no_process()]
        for row in rows:
            row.restarts, row.lagged = self.restarts, self.lagged
            row.last_death = self.last_death
        ending = self._spared() - self.stuck.keys()
        return [
            *rows,
            *(worker.state() for worker in self.stuck.values()),
            *draining(self.entry.kind, self.identity.uid, ending, self._release_of),
        ]

    def _release_of(self, pid: int) -> str:
        worker = self.draining.get(pid)
        return "" if worker is None else worker.release

    def _no_process(self) -> WorkerState:
        if self.failed:
            state = "failed"
        elif self._backoff is not None:
            state = "backoff"
        else:
            state = "idle"
        return WorkerState(kind=self.entry.kind, name=self.entry.kind, state=state, uid=self.identity.uid)


def _as_request(job: JobState) -> InFlight:
    """A job of a worker's child, told of in the same line as a request."""
    return InFlight(type=job.name, age_ms=job.age_ms, doing=job.doing)
