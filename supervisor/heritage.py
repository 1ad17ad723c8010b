"""Runs in: the supervisor. Sans-IO.

What a supervisor leaves to the program that it executes in its own place: numbers of descriptors that stay
open, and what it knows of its workers. It is JSON of a declared format. Fields are added with a default and
never renamed or removed within a format, so that older and newer releases of the same format understand each
other both ways; a release says which formats it reads before anybody executes it (supervisor/upgrade.py).
"""

from __future__ import annotations

import msgspec

from ipc.messages import Body
from ipc.messages.supervisor import SandboxReport, UpgradeState

FORMAT = 1
READABLE = (1,)
#: Names the descriptor of the memfd, for the program that is executed.
VARIABLE = "BULKHEAD_HERITAGE"


class WorkerRow(Body):
    """A process that goes on. `control_fd` is -1 where the channel has closed."""

    kind: str
    pid: int
    phase: str
    started: float  # CLOCK_MONOTONIC
    started_at_ns: int
    release: str
    control_fd: int
    asked: int  # requests that were asked on the channel
    stderr_fd: int
    report: SandboxReport | None = None
    why: str = ""


class KindRow(Body):
    """A kind of worker and its sockets."""

    kind: str
    listener_fd: int
    extra_fds: dict[str, int] = {}
    restarts: int = 0
    last_death: str = ""
    workers: list[WorkerRow] = []


class WardRow(Body):
    """A monitor and what its successor would need (supervisor/succession.py)."""

    container_id: str
    pod_id: str
    vault_fd: int
    pidfd: int = -1  # of one that is no child
    pid: int = 0  # 0 if it has died
    init_pid: int = 0
    bereft: bool = False
    successions: int = 0


class Heritage(Body):
    """All of it."""

    release: str
    started_at_ns: int
    lock_fds: list[int]
    listener_fd: int  # <run_root>/ipc/supervisor.sock
    log_fd: int
    kinds: list[KindRow]
    upgrade: UpgradeState
    format: int = FORMAT
    wards: list[WardRow] = []

    def descriptors(self) -> list[int]:
        """Every descriptor that must stay open."""
        found = [*self.lock_fds, self.listener_fd, self.log_fd]
        for kind in self.kinds:
            found += [kind.listener_fd, *kind.extra_fds.values()]
            for worker in kind.workers:
                found += [worker.stderr_fd, worker.control_fd]
        for ward in self.wards:
            found += [ward.vault_fd, ward.pidfd]
        return [fd for fd in found if fd >= 0]


def encode(heritage: Heritage) -> bytes:
    """Return the bytes of the memfd."""
    return msgspec.json.encode(heritage)


def decode(data: bytes) -> Heritage:
    """Read them. Raises ValueError for a format that this release does not know, or for what is none."""
    try:
        heritage = msgspec.json.decode(data, type=Heritage)
    except msgspec.DecodeError as error:
        raise ValueError(f"the heritage of the program before cannot be read: {error}") from error
    if heritage.format not in READABLE:
        raise ValueError(f"the heritage has format {heritage.format}, this release reads {READABLE}")
    return heritage
