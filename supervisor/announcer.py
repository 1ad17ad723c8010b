"""Runs in: the supervisor.

What the service manager is told: READY once, when pods can run; STATUS, a line of counts, whenever it has
changed; the watchdog's beat. Pods can run when every kind that always runs is ready, the CRI socket is in
its place and at least one OCI runtime has answered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from ipc.log import Log
from ipc.loop import Loop
from supervisor.kinds import Kind
from supervisor.notify import Notifier

LOOK_AGAIN = 5.0  # seconds between looks at the counts
SILENCE = 3  # a cri that is not killed although it is silent for so many limits: the watchdog may bite


class Announcer:
    """The supervisor's voice. `worker_answer` tells the limit in force, which a reload may change."""

    def __init__(
        self,
        notifier: Notifier,
        loop: Loop,
        log: Log,
        kinds: Mapping[str, Kind],
        worker_answer: Callable[[], float],
    ) -> None:
        self._notifier = notifier
        self._loop = loop
        self._log = log
        self._kinds = kinds
        self._worker_answer = worker_answer
        self._began = time.monotonic()
        self._told = ""
        self._told_ready = False
        self._stopping = False
        self.published = "cri" not in kinds
        self.runtimes: list[str] | None = None  # those that run; None until all were asked

    def start(self) -> None:
        """Begin to tell."""
        if self._notifier.watchdog:
            self._beat()
        self._look()

    def _look(self) -> None:
        self.changed()
        self._loop.call_later(LOOK_AGAIN, self._look)

    def changed(self) -> None:
        """Something may have changed: tell it, if it has."""
        if self._stopping:
            return
        status = self.status()
        if status != self._told:
            self._told = status
            self._notifier.send(STATUS=status)
        if not self._told_ready and self.can_run_pods():
            self._told_ready = True
            self._notifier.send(READY="1", MAINPID=str(os.getpid()))
            after = int((time.monotonic() - self._began) * 1000)
            self._log.info("ready", status=status, after_ms=after)

    def can_run_pods(self) -> bool:
        """True if nothing is missing that a pod needs."""
        ready = all(kind.ready for kind in self._kinds.values())
        return ready and self.published and (bool(self.runtimes) or "cri" not in self._kinds)

    def status(self) -> str:
        """A line of counts, with what is wrong first."""
        ready = sum(kind.ready for kind in self._kinds.values())
        parts = [f"{ready} of {len(self._kinds)} kinds of worker ready"]
        failed = [kind.entry.kind for kind in self._kinds.values() if kind.failed]
        if failed:
            parts.insert(0, f"failed: {', '.join(failed)}")
        if self.runtimes == [] and "cri" in self._kinds:
            parts.insert(0, "no OCI runtime runs")
        counts = self._counts()
        if counts:
            parts.append(f"{counts.get('pods', 0)} pods, {counts.get('containers', 0)} containers running")
        return "; ".join(parts)

    def _counts(self) -> Mapping[str, int]:
        """What cri has counted, with its last answer to a ping."""
        cri = self._kinds.get("cri")
        workers = list(cri.workers.values()) if cri else []
        known = [worker.health.counters for worker in workers if "pods" in worker.health.counters]
        return known[0] if known else {}

    def _beat(self) -> None:
        """The watchdog's beat: this loop turns, and a cri that is silent would have been killed."""
        cri = self._kinds.get("cri")
        answered = [w.answered for w in cri.workers.values() if w.answered is not None] if cri else []
        if not answered or self._loop.time() - max(answered) < SILENCE * self._worker_answer():
            self._notifier.send(WATCHDOG="1")
        self._loop.call_later(self._notifier.watchdog / 2, self._beat)

    def reloading(self) -> None:
        """A reload has begun; `reloaded` says that it is over."""
        self._notifier.send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))

    def reloaded(self) -> None:
        """A reload is over, whatever came of it."""
        self._notifier.send(READY="1")

    def stopping(self) -> None:
        """The last word."""
        self._stopping = True
        self._notifier.send(STOPPING="1", STATUS="workers are stopping; containers stay")
