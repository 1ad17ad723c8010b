"""Runs in: the tests, `make demo` and `make bench`, before anything else.

A mount namespace for the whole run, so that no mount of a test reaches the machine, without the cgroup2 mount
that a hybrid host has beside its v1 hierarchies: crun before 1.9 refuses to work where that mount has a
controller. And a network namespace: bridges, addresses, packet filter rules and registries of the run stand
in it, and go with it.
"""

from __future__ import annotations

import os
import subprocess

from ipc import kernel

UNIFIED = "/sys/fs/cgroup/unified"
_ENTERED = "BULKHEAD_TEST_NAMESPACE"


def enter() -> None:
    """Enter the namespaces, once for a process and its children. Raises OSError (root is needed)."""
    own = os.readlink("/proc/self/ns/mnt")
    if os.environ.get(_ENTERED) == own:
        return
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    if os.path.ismount(UNIFIED):
        kernel.umount(UNIFIED)
        # crun makes its directories there all the same: not in the file system below, which is the machine's
        kernel.mount("none", UNIFIED, "tmpfs")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.environ[_ENTERED] = os.readlink("/proc/self/ns/mnt")
