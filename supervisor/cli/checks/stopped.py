"""Runs in: `bulkhead check` and `bulkhead wipe` while the service is stopped.

Holds the instance's locks, so that nobody begins meanwhile, and runs the code of the owners itself, as it
would run in their workers. The modules are found by their names: nothing of a worker is imported here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from ipc import kernel
from ipc.messages.checking import Finding, Known
from supervisor import held
from supervisor.cli.checks import leftovers
from supervisor.config import Config
from supervisor.directories import Locks
from supervisor.files import remove_tree
from supervisor.hostinfo import boot_id
from supervisor.settings import Derivation, identities
from supervisor.table import Table

_KILL_SECONDS = 10.0


class Stopped:
    """An instance that nobody runs. Methods raise OSError, RemoteError, sqlite3.Error."""

    def __init__(self, config: Config, table: Table) -> None:
        self._run_root = config.run_root
        derivation = Derivation(config, identities(config.users, table))
        self._settings = {kind: derivation.of(kind) for kind in ("cri", "storage", "network")}

    def _code(self, kind: str) -> Any:
        return importlib.import_module(f"workers.{kind}.offline")

    def known(self) -> tuple[Known, list[Finding]]:
        """Whom the next cri will know, and what is wrong with the state it will find."""
        known, findings = self._code("cri").look(self._settings["cri"], boot_id())
        return known, findings

    def inspect(self, known: Known, *, deep: bool) -> list[Finding]:
        """What storage, network and the supervisor will find."""
        return [
            *self._code("storage").inspect(self._settings["storage"], known, deep=deep),
            *self._code("network").inspect(self._settings["network"], known, deep=deep),
            *leftovers.inspect(self._run_root, known),
        ]

    def mend(self, known: Known, findings: list[Finding]) -> list[Finding]:
        """Monitors and inits first, who hold what the others are to remove; groups when they are empty."""
        of = leftovers.by_owner(findings)
        done = leftovers.mend(self._run_root, of["supervisor"], self._remove_monitor, self._stop_init)
        for kind in ("network", "storage"):
            if of[kind]:
                done += self._code(kind).mend(self._settings[kind], known, of[kind])
        done += leftovers.mend_groups(of["groups"])
        return [*self._code("cri").mend(self._settings["cri"], of["cri"]), *done]

    def _remove_monitor(self, container_id: str) -> None:
        directory = f"{self._run_root}/monitors/{held.check_id(container_id, 'container')}"
        if held.is_held(directory):
            raise OSError(f"its monitor has not ended within {_KILL_SECONDS:g} s")
        remove_tree(directory)

    def _stop_init(self, pod_id: str) -> None:
        directory = f"{self._run_root}/inits/{held.check_id(pod_id, 'pod')}"
        pid = held.holder(directory)
        if pid:
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + _KILL_SECONDS
        while held.is_held(directory) and time.monotonic() < end:
            time.sleep(0.01)
        pin = f"{self._run_root}/ns/{pod_id}/pid"
        with contextlib.suppress(OSError):  # nothing is mounted there
            kernel.umount(pin, kernel.MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(pin)
        with contextlib.suppress(OSError):  # network's pins may stand beside it
            os.rmdir(os.path.dirname(pin))
        remove_tree(directory)

    def wipe_images(self) -> None:
        """Forget every image and delete every layer."""
        self._code("storage").wipe_images(self._settings["storage"])

    def forget_all(self) -> None:
        """Nobody is known any more."""
        self._code("cri").forget_all(self._settings["cri"])


@contextlib.contextmanager
def locked(config: Config) -> Iterator[None]:
    """Nobody else runs the instance meanwhile. Raises InstanceRunning, OSError."""
    locks = Locks()
    try:
        for directory in (config.root, config.run_root):
            locks.take(directory)
        yield
    finally:
        locks.release()
