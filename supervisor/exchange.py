"""Runs in: the supervisor.

One worker makes room for another while clients go on asking: the new one is started, says hello, and answers
a ping, before the old one is touched. How the old one then leaves is in the process table (`exchange`). If
the new one fails before its turn, the old one stays and serves as before. Everything that is only known while
this lasts is here; the kind owns both workers before and after.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from supervisor.table import Exchange as How
from supervisor.worker import DRAIN_LIMIT, Events, Ground, Origin, Phase, Worker

STOP_GRACE = 10.0  # seconds for what an old worker has begun that must end before the new one begins
HANDOVER_TIMEOUT = 20.0  # seconds for the old cri to let go of its state
TIMEOUT = 60.0  # seconds for all of it
LOOK_AGAIN = 0.05
PING_TIMEOUT = 10.0


@dataclass(frozen=True)
class Parting:
    """Who leaves, and what the kind does about it: `relayed` gives the socket of a new cri a name for the old
    one, `publish` makes it public, `taken` makes the new worker the kind's, `over` gets "", or why the old
    one stays."""

    old: Worker
    relayed: Callable[[str], str]
    publish: Callable[[str], object]
    taken: Callable[[Worker, Worker], object]
    over: Callable[[str], object]


class Exchange:
    """Raises OSError if there can be no process. `new`: the worker that comes."""

    def __init__(self, ground: Ground, origin: Origin, parting: Parting) -> None:
        self._ground = ground
        self._parting = parting
        self._old = parting.old
        self._how = origin.entry.exchange
        self._path = ""  # of the new cri's socket, before it is public
        self._relay = ""  # its second name
        self._answered = False
        self._finished = False
        events = Events(
            ready=self._said_hello,
            ended=self._new_ended,
            bound=self._new_bound,
            health=self._new_health,
            drained=lambda _worker: None,
            stuck=lambda worker: self._new_ended(worker, -signal.SIGKILL),
        )
        self.new = Worker.start(ground, origin, events, standby=self._how is not How.OVERLAP)
        ground.log.info("worker started to replace another", kind=self.new.kind, pid_of=self.new.pid)
        ground.loop.call_later(TIMEOUT, lambda: self.abandon(f"it was not ready within {TIMEOUT:g} s"))

    # -- the new one ----------------------------------------------------------------------------------

    def _said_hello(self, worker: Worker) -> None:
        worker.ping(self._check_answer, PING_TIMEOUT)

    def _new_health(self, _worker: Worker) -> None:
        self._answered = True

    def _check_answer(self) -> None:
        if not self._answered:
            self.abandon("it answers no ping")
        self._maybe_begin()

    def _new_bound(self, path: str) -> None:
        self._path = path
        self._relay = self._parting.relayed(path)
        self._maybe_begin()

    def _maybe_begin(self) -> None:
        """Everything that the new one can do before its turn is done."""
        if self._finished or not self._answered:
            return
        if self._how is How.OVERLAP:
            self._old.stop(DRAIN_LIMIT)
            self._finish()
        elif self._how is How.STANDBY:
            self._old.stop(STOP_GRACE)
        elif self._path:
            self._old.hand_over(self._relay, self._finish, HANDOVER_TIMEOUT)

    def _new_ended(self, worker: Worker, code: int) -> None:
        if self._finished:  # it hung in the kernel, and counted as ended then
            return
        self._finished = True
        why = worker.why or f"it ended with {code}"
        self._ground.log.error(
            "worker could not replace another", kind=worker.kind, why=why, stays=self._old.pid
        )
        self._parting.over(f"{worker.kind}: the new worker is no good, process {self._old.pid} stays: {why}")

    def abandon(self, why: str) -> None:
        """Leave things as they are: the new one is killed, the old one stays."""
        if not self._finished:
            self.new.kill(why)

    # -- the old one ----------------------------------------------------------------------------------

    def old_ended(self, worker: Worker) -> None:
        """A worker of the kind has ended; if it is the old one, nobody owns what it owned."""
        if worker is self._old and not self._finished:
            self._when_ready()

    def _when_ready(self) -> None:
        """The old one may have died before the new one was asked anything."""
        if self._finished:
            return
        if self.new.phase is Phase.READY and (self._how is not How.HANDOVER or self._path):
            self._finish()
        else:
            self._ground.loop.call_later(LOOK_AGAIN, self._when_ready)

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        if self._path:
            self._parting.publish(self._path)
        self._parting.taken(self.new, self._old)
        if self.new.standby:
            self.new.begin()
        self._parting.over("")
