"""Runs in: every worker, between fork and its first job (declared by the supervisor's table).

The sandbox: one file per mechanism of the kernel, and one function that applies them in the one right order.
It owns what a worker is locked out of; it refuses to go on in a worker that would be freer than declared.

The mechanisms that short-lived children of workers use too (limits, identity, capabilities, seccomp) live in
ipc/confine.py and its neighbours; here stand those that only a whole worker needs, and the workers' lists.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from ipc import confine, kernel
from ipc.messages.supervisor import SandboxReport
from supervisor.sandbox import landlock, mountview, namespaces, preload
from supervisor.sandbox.report import Witness, differences
from supervisor.sandbox.seccomp import LISTS
from supervisor.sandbox.spec import Bind, Identity, Sandbox

__all__ = ["Bind", "Identity", "Sandbox", "SandboxError", "differences", "enter"]

#: Directory under the run root on which views are made; always empty to everybody outside.
_STAGING = "view"


class SandboxError(Exception):
    """This process would be freer than the table allows: it must not serve anybody."""


def enter(sandbox: Sandbox, identity: Identity, paths: Mapping[str, str]) -> SandboxReport:
    """Shut the sandbox around this process, for good, and tell what holds.

    Call it as root, in a process with one thread, after everything was imported that will be needed.
    `paths` gives the templates of the view their values; `run_root` must be in it.
    Raises SandboxError if what the kernel says is freer than `sandbox`, OSError if the kernel refuses.
    """
    _assert_single_thread()
    parent = os.getppid()
    witness = Witness.open()
    degraded = [*confine.limit(sandbox.rlimits), *_set_oom_score(sandbox.oom_score_adj)]
    binds = mountview.expand(sandbox.view, paths)
    _preload(sandbox)
    degraded += _separate(sandbox, binds, paths)
    degraded += confine.become(identity.uid, identity.gid, identity.groups, sandbox.capabilities)
    if sandbox.parent_death_signal:  # set before already; a change of uid clears it
        kernel.die_with_parent(signal.SIGKILL, parent)
    degraded += _lock(sandbox, binds)
    report = witness.report(sandbox, degraded)
    witness.close()
    if freer := differences(sandbox, identity, report):
        raise SandboxError("; ".join(freer))
    return report


def _assert_single_thread() -> None:
    """Capabilities, namespaces and Landlock are given up by one thread, not by its process."""
    count = len(os.listdir("/proc/self/task"))
    if count != 1:
        raise SandboxError(f"{count} threads before the sandbox shut: prepare() must start none")


def _set_oom_score(adjustment: int | None) -> list[str]:
    if adjustment is None:
        return []
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(adjustment))
    except PermissionError:
        return [f"oom_score_adj: {adjustment} refused, going below the inherited value takes SYS_RESOURCE"]
    return []


def _preload(sandbox: Sandbox) -> None:
    if sandbox.view:
        preload.late_imports()
        preload.threads()
    if sandbox.tcp:
        preload.resolver()


def _separate(sandbox: Sandbox, binds: list[Bind], paths: Mapping[str, str]) -> list[str]:
    """Namespaces, and in a mount namespace of its own the view."""
    staging = f"{paths['run_root']}/{_STAGING}"
    if sandbox.view:
        os.makedirs(staging, mode=0o700, exist_ok=True)
    degraded = namespaces.unshare(sandbox.namespaces)
    if sandbox.view:
        degraded += mountview.build(binds, staging)
    return degraded


def _lock(sandbox: Sandbox, binds: list[Bind]) -> list[str]:
    """The locks that an unprivileged process puts on itself; seccomp last."""
    degraded = []
    if sandbox.no_new_privs:
        confine.no_new_privileges()
    if sandbox.landlock:
        degraded += landlock.restrict(binds, sandbox.tcp)
    if sandbox.seccomp:
        degraded += confine.filter_calls(LISTS[sandbox.seccomp])
    return degraded
