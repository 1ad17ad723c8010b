"""Runs in: every worker (reads back what holds), and the supervisor (compares it with the table).

A report says what the kernel says, not what was asked of it. The descriptors that are needed to ask are
opened before the door shuts. `differences` is the one judgement of whether that is enough.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Container
from dataclasses import dataclass

from ipc import capabilities
from ipc.messages.supervisor import SandboxReport
from supervisor.sandbox import landlock
from supervisor.sandbox.namespaces import FLAGS
from supervisor.sandbox.spec import Identity, Sandbox

_SECCOMP_FILTER = "2"  # the field Seccomp of /proc/PID/status


@dataclass(frozen=True)
class Witness:
    """Descriptors of this process's own /proc files, and its namespaces before it entered new ones."""

    status_fd: int
    oom_fd: int
    namespaces_fd: int
    before: dict[str, str]
    landlock_abi: int

    @classmethod
    def open(cls) -> Witness:
        """Take the descriptors. Raises OSError."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        namespaces_fd = os.open("/proc/self/ns", flags | os.O_DIRECTORY)
        return cls(
            status_fd=os.open("/proc/self/status", flags),
            oom_fd=os.open("/proc/self/oom_score_adj", flags),
            namespaces_fd=namespaces_fd,
            before=_namespaces(namespaces_fd, os.listdir(namespaces_fd)),
            landlock_abi=landlock.abi(),
        )

    def close(self) -> None:
        """Give the descriptors back."""
        for fd in (self.status_fd, self.oom_fd, self.namespaces_fd):
            os.close(fd)

    def report(self, sandbox: Sandbox, degraded: list[str]) -> SandboxReport:
        """What holds now, asked of the kernel."""
        fields = capabilities.status_fields(os.pread(self.status_fd, 8192, 0).decode())
        after = _namespaces(self.namespaces_fd, self.before)
        return SandboxReport(
            uid=_single(fields["Uid"]),
            gid=_single(fields["Gid"]),
            groups=[int(group) for group in fields["Groups"].split()],
            capabilities=_capabilities(fields, "CapEff", "CapPrm", "CapInh", "CapAmb"),
            bounding=_capabilities(fields, "CapBnd"),
            namespaces=[name for name in after if after[name] != self.before[name]],
            no_new_privs=fields.get("NoNewPrivs") == "1",
            seccomp=sandbox.seccomp if fields.get("Seccomp") == _SECCOMP_FILTER else "off",
            landlock=self.landlock_abi if sandbox.landlock and landlock.holds() else 0,
            rlimits={name: _limit(name) for name in sandbox.rlimits},
            oom_score_adj=int(os.pread(self.oom_fd, 16, 0)),
            degraded=degraded,
        )


def differences(sandbox: Sandbox, identity: Identity, report: SandboxReport) -> list[str]:
    """In what a worker is freer than its entry in the table, a sentence each; what the kernel lacks, and the
    report says so, is none."""
    excused = {sentence.split(":")[0] for sentence in report.degraded}
    kept = sandbox.capabilities
    found = {
        "uid": report.uid != identity.uid,
        "gid": report.gid != identity.gid,
        "groups": set(report.groups) != set(identity.groups),
        "capabilities": not set(report.capabilities) <= kept,
        "bounding set": not set(report.bounding) <= kept,
        "no_new_privs": sandbox.no_new_privs and not report.no_new_privs,
        "seccomp": bool(sandbox.seccomp) and report.seccomp != sandbox.seccomp,
        "landlock": sandbox.landlock and report.landlock == 0,
        **{f"namespace {name}": name not in report.namespaces for name in sandbox.namespaces},
        **{f"rlimit {name}": _freer(report, name, value) for name, value in sandbox.rlimits.items()},
    }
    return [f"{what}: not as declared" for what, differs in found.items() if differs and what not in excused]


def _freer(report: SandboxReport, name: str, declared: int) -> bool:
    limit = report.rlimits.get(name, resource.RLIM_INFINITY)
    return limit == resource.RLIM_INFINITY or limit > declared


def _namespaces(namespaces_fd: int, names: Container[str]) -> dict[str, str]:
    return {name: os.readlink(name, dir_fd=namespaces_fd) for name in FLAGS if name in names}


def _single(field: str) -> int:
    """The id if real, effective, saved and file system id are the same, else -1, which no entry allows."""
    ids = set(field.split())
    return int(ids.pop()) if len(ids) == 1 else -1


def _capabilities(fields: dict[str, str], *names: str) -> list[str]:
    """The union of some sets: what a process has, or can take without asking anybody."""
    mask = 0
    for name in names:
        mask |= int(fields.get(name, "0"), 16)
    return capabilities.from_mask(mask)


def _limit(name: str) -> int:
    """The hard limit, which is all that holds."""
    hard: int = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
    return hard
