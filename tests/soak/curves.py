"""Runs in: the tests. Memory and open descriptors of each kind of process over a run, and whether they grow.

Work under way adds to both, so what counts is the lowest value of each part of the run: a leak lifts it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipc.errors import RemoteError
from tests.support.daemon import Node

#: one per container: they come and go, their number is what the load makes it
MANY = frozenset({"monitor", "init"})
#: start and end by design while there is work
ON_DEMAND = frozenset({"image", "stream", "ops", "nri"})
ALLOWED_KIB, ALLOWED_SHARE, ALLOWED_DESCRIPTORS = 1024, 0.03, 2


@dataclass(frozen=True)
class Sample:
    """One process at one time; its anonymous memory in KiB."""

    at: float
    pid: int
    memory: int
    descriptors: int


class Curves:
    """Samples every `period` seconds while it is entered."""

    def __init__(self, node: Node, period: float = 1.0) -> None:
        self._node = node
        self._period = period
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._begun = time.monotonic()
        self.samples: dict[str, list[Sample]] = defaultdict(list)

    def __enter__(self) -> Curves:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._period):
            with contextlib.suppress(RemoteError):
                for worker in self._node.workers():
                    if worker.pid and worker.kind not in MANY:
                        self._take(worker.kind, worker.pid)

    def _take(self, kind: str, pid: int) -> None:
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            at = time.monotonic() - self._begun
            sample = Sample(at, pid, anonymous_kib(pid), len(os.listdir(f"/proc/{pid}/fd")))
            self.samples[kind].append(sample)


def growth(samples: Mapping[str, Sequence[Sample]]) -> list[str]:
    """What grows: the last third of the run against the one before it; the first third is warm-up."""
    found = []
    for kind, curve in sorted(samples.items()):
        if kind in ON_DEMAND or len(curve) < 9:
            continue
        third = len(curve) // 3
        middle, last = curve[third : 2 * third], curve[2 * third :]
        found += _grown(kind, "KiB", [one.memory for one in middle], [one.memory for one in last])
        counts = [one.descriptors for one in middle], [one.descriptors for one in last]
        found += _grown(kind, "descriptors", *counts)
    return found


def _grown(kind: str, unit: str, before: list[int], after: list[int]) -> list[str]:
    low, high = min(before), min(after)
    allowed = ALLOWED_DESCRIPTORS if unit == "descriptors" else max(ALLOWED_KIB, low * ALLOWED_SHARE)
    return [f"{kind}: {low} -> {high} {unit}"] if high - low > allowed else []


def anonymous_kib(pid: int) -> int:
    """Anonymous memory of a process, shared with forks or not: forking changes it not. Raises OSError."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon:"))
