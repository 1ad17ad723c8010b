"""Runs in: the supervisor.

Workers whose work outlives their being told to stop, and the supervisor: they accept no more and end with
their last session (`drains` in the process table). Each holds a lock from its fork on, in a directory of
`<run_root>/draining/`, so that a later supervisor knows them from what a killed worker left, spares them, and
shows them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from ipc.messages.supervisor import WorkerState
from supervisor import held
from supervisor.files import remove_tree


@dataclass
class Lock:
    """A lock that is taken before a fork. `fd` is for the child; `told` and `drop` are for the parent."""

    directory: str
    fd: int

    def told(self, pid: int) -> None:
        """The child has it: write down who that is, and let go."""
        held.write_holder(self.fd, pid)
        os.close(self.fd)

    def drop(self) -> None:
        """There is no child."""
        os.close(self.fd)
        remove_tree(self.directory)


class Drains:
    """The locks of this instance's draining workers, and of those that may drain."""

    def __init__(self, run_root: str) -> None:
        self._root = f"{run_root}/draining"
        self._number = 0

    def lock(self, kind: str) -> Lock:
        """A lock for a worker that is about to be forked. Raises OSError."""
        while True:
            self._number += 1
            directory = f"{self._root}/{kind}.{os.getpid()}.{self._number}"
            os.makedirs(directory, mode=0o700, exist_ok=True)
            fd = held.acquire(directory)
            if fd is not None:
                return Lock(directory, fd)

    def pids(self, kind: str) -> set[int]:
        """Every living process of a kind that holds a lock. Directories of those that ended are removed."""
        found = set()
        for name in held.names(self._root):
            if name.partition(".")[0] != kind:
                continue
            directory = f"{self._root}/{name}"
            pid = held.holder(directory)
            if pid:
                found.add(pid)
            elif not held.is_held(directory):
                with contextlib.suppress(OSError):
                    remove_tree(directory)
        return found


def states(kind: str, uid: int, pids: set[int], release: Callable[[int], str]) -> list[WorkerState]:
    """A row for each draining process."""
    return [
        WorkerState(kind=kind, name=f"{kind} {pid}", state="draining", pid=pid, uid=uid, release=release(pid))
        for pid in sorted(pids)
    ]
