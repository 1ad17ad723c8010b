"""Runs in: every worker, as it enters its sandbox.

New namespaces by the names that the process table uses.
"""

from __future__ import annotations

from collections.abc import Collection

from ipc import kernel
from ipc.confine import LACKING

#: Name in the table (and under /proc/PID/ns) -> flag. No "user": nothing here maps ids. No "pid": it would
#: take a second fork, and SO_PEERCRED would name pids that nobody else knows.
FLAGS = {
    "net": kernel.CLONE_NEWNET,
    "mnt": kernel.CLONE_NEWNS,
    "ipc": kernel.CLONE_NEWIPC,
    "uts": kernel.CLONE_NEWUTS,
    "cgroup": kernel.CLONE_NEWCGROUP,
}


def unshare(names: Collection[str]) -> list[str]:
    """Enter new namespaces. Returns those that the kernel was built without. Raises OSError, KeyError."""
    degraded = []
    for name in sorted(names):
        try:
            kernel.unshare(FLAGS[name])
        except OSError as error:
            if error.errno not in LACKING or name == "mnt":  # a view must never be made in the host's
                raise
            degraded.append(f"namespace {name}: not in this kernel ({error.strerror})")
    return degraded
