"""Runs in: storage, and (measure_all) in its children.

What containers' writable layers occupy. Nobody's call walks a tree: a child of low priority measures one
layer after the other, for as long as somebody asks for figures, and each of them the less often the longer
it takes. Answers come from memory, with the time of the measurement; a new container's layer is known to be
empty.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipc import log
from ipc.errors import RemoteError
from ipc.loop import Loop, Timer
from ipc.messages.storage import LayerUsage, UsageList, UsagesListed
from ipc.serve import Call
from workers.jobs import Jobs

from .mounts import Progress
from .paths import Paths

#: Seconds: between two measurements of a layer at least; as a multiple of what the last one took; between
#: rounds; after which nobody is said to ask any more; of one child, after which it begins no further layer.
PERIOD, SHARE, ROUND, INTEREST, SLICE = 30.0, 100.0, 10.0, 300.0, 10.0
#: Seconds after which a child is killed; the layer it was at is left alone for so long.
HUNG = 600.0
#: Layers of one round.
MOST = 1000
#: A deeper tree is measured to here only: each level holds a descriptor.
DEEPEST = 2048


@dataclass
class _Layer:
    due: float
    usage: LayerUsage | None = None


@dataclass
class Usages:
    """The figures of all containers of one root."""

    loop: Loop
    jobs: Jobs
    paths: Paths
    _layers: dict[str, _Layer] = field(default_factory=dict)
    _asked: float = -INTEREST
    _measuring: bool = False
    _timer: Timer | None = None

    # -- who there is ---------------------------------------------------------------------------------

    def made(self, container_id: str) -> None:
        """A container was made, or found as it was."""
        if container_id in self._layers:
            return
        try:
            status = os.stat(self._upper(container_id))
        except OSError:
            return
        fresh = LayerUsage(
            container_id=container_id,
            used_bytes=status.st_blocks * 512,
            used_inodes=1,
            timestamp_ns=time.time_ns(),
        )
        self._layers[container_id] = _Layer(self.loop.time() + PERIOD, fresh)

    def gone(self, container_id: str) -> None:
        """A container was removed."""
        self._layers.pop(container_id, None)

    def found(self, container_ids: Collection[str]) -> None:
        """Containers of an earlier life of this worker: nothing is known of their layers."""
        for container_id in container_ids:
            self._layers.setdefault(container_id, _Layer(self.loop.time()))

    def _upper(self, container_id: str) -> Path:
        return self.paths.containers / container_id / "upper"

    # -- what is told ---------------------------------------------------------------------------------

    def list_all(self, _call: Call, _body: UsageList) -> UsagesListed:
        """storage.usage.list"""
        self._asked = self.loop.time()
        self._plan(0.0)
        known = [layer.usage for layer in self._layers.values() if layer.usage is not None]
        return UsagesListed(usages=known)

    def totals(self) -> tuple[int, int]:
        """Bytes and inodes of all layers that were measured."""
        known = [layer.usage for layer in self._layers.values() if layer.usage is not None]
        return sum(usage.used_bytes for usage in known), sum(usage.used_inodes for usage in known)

    # -- measuring ------------------------------------------------------------------------------------

    def _plan(self, wait: float) -> None:
        """Have a round begin; no sooner than another one ended, and not if nobody wants it."""
        if self._measuring or (self._timer is not None and self._timer.active):
            return
        self._timer = self.loop.call_later(wait, self._begin)

    def _begin(self) -> None:
        now = self.loop.time()
        due = sorted((layer.due, id_) for id_, layer in self._layers.items() if layer.due <= now)
        if now - self._asked > INTEREST:
            return
        if not due:
            self._plan(ROUND)
            return
        self._start([(id_, str(self._upper(id_))) for _, id_ in due[:MOST]])

    def _start(self, work: list[tuple[str, str]]) -> None:
        progress = Progress()

        def done(outcome: Any) -> None:
            self._measured(progress.read()[1], outcome)
            progress.close()

        name = "measure writable layers"
        try:
            self.jobs.start(measure_all, work, progress, on_done=done, timeout=HUNG, name=name)
        except OSError as error:
            log.get().warning("writable layers are not measured", why=error)
            progress.close()
            self._plan(ROUND)
        else:
            self._measuring = True

    def _measured(self, last: str, outcome: Any) -> None:
        """A round has ended; `last` is the container whose layer it was at."""
        self._measuring = False
        if isinstance(outcome, RemoteError):
            log.get().warning("a writable layer could not be measured", container=last, why=outcome.text)
            self._put_off(last, HUNG)
        else:
            for container_id, size, inodes, at_ns, seconds in outcome:
                self._take(container_id, size, inodes, at_ns, seconds)
        self._plan(ROUND)

    def _take(self, container_id: str, size: int, inodes: int, at_ns: int, seconds: float) -> None:
        layer = self._layers.get(container_id)
        if layer is None:  # removed meanwhile
            return
        self._put_off(container_id, max(PERIOD, seconds * SHARE))
        if inodes:
            layer.usage = LayerUsage(
                container_id=container_id, used_bytes=size, used_inodes=inodes, timestamp_ns=at_ns
            )

    def _put_off(self, container_id: str, seconds: float) -> None:
        if container_id in self._layers:
            self._layers[container_id].due = self.loop.time() + seconds


# -- in children ------------------------------------------------------------------------------------------


def measure_all(work: list[tuple[str, str]], progress: Progress) -> list[tuple[str, int, int, int, float]]:
    """Measure directories: id, bytes on disk, inodes, wall clock in ns, seconds it took. Stops in time."""
    os.nice(19)
    results = []
    began = time.monotonic()
    for container_id, path in work:
        start = time.monotonic()
        progress.at(container_id)
        size, inodes = measure(path)
        results.append((container_id, size, inodes, time.time_ns(), time.monotonic() - start))
        if time.monotonic() - began > SLICE:
            break
    return results


def measure(path: str) -> tuple[int, int]:
    """Bytes on disk and inodes of a tree that may change meanwhile; files with several names count once.

    Follows no link and leaves no file system; what cannot be read, or is gone, is not counted.
    """
    try:
        top = os.open(path, _DIRECTORY)
    except OSError:
        return 0, 0
    status = os.fstat(top)
    walk = _Walk(status.st_dev)
    walk.count(status)
    walk.enter(top)
    while walk.open:
        walk.step()
    return walk.bytes, walk.inodes


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Walk:
    """A walk in depth, held by the descriptors of the directories it is in."""

    def __init__(self, device: int) -> None:
        self.bytes = self.inodes = 0
        self.open: list[tuple[int, list[str]]] = []
        self._device = device
        self._linked: set[int] = set()

    def enter(self, fd: int) -> None:
        """Count what is in a directory; its own directories are for later."""
        below: list[str] = []
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    self._look(entry, below)
        except OSError as error:
            log.get().debug("a directory of a writable layer is not counted", why=error)
        self.open.append((fd, below))

    def _look(self, entry: os.DirEntry[str], below: list[str]) -> None:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:  # it is gone
            return
        if status.st_dev == self._device:
            self.count(status)
            if stat.S_ISDIR(status.st_mode) and len(self.open) < DEEPEST:
                below.append(entry.name)

    def count(self, status: os.stat_result) -> None:
        """Add one file."""
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if status.st_ino in self._linked:
                return
            self._linked.add(status.st_ino)
        self.bytes += status.st_blocks * 512
        self.inodes += 1

    def step(self) -> None:
        """Go down into the next directory, or up."""
        fd, below = self.open[-1]
        if not below:
            os.close(fd)
            self.open.pop()
            return
        try:
            self.enter(os.open(below.pop(), _DIRECTORY, dir_fd=fd))
        except OSError:  # it is gone, or no directory any more
            return
