"""Runs in: `bulkhead check` and `bulkheadctl check` beside a service that runs.

Every question and every repair goes to the owner: cri says whom it knows, storage and network look at what is
theirs and mend it, the supervisor removes what is left of monitors and inits.
"""

from __future__ import annotations

from typing import TypeVar

from ipc.blocking import Client
from ipc.messages import Body, Request, cri, network, storage
from ipc.messages.checking import Finding, Findings, Known
from ipc.messages.supervisor import InitStop, MonitorRemove
from supervisor.cli.checks import leftovers

R = TypeVar("R", bound=Body)
LONG, DEEP = 600.0, 24 * 3600.0  # seconds


class Running:
    """The workers of the instance at `run_root`. All methods raise RemoteError."""

    def __init__(self, run_root: str) -> None:
        self._run_root = run_root

    def _ask(self, kind: str, request: Request[R], timeout: float = LONG) -> R:
        with Client(f"{self._run_root}/ipc/{kind}.sock", timeout=timeout) as client:
            return client.call(request)

    def known(self) -> tuple[Known, list[Finding]]:
        """Whom cri knows, and what is wrong with its state."""
        answer = self._ask("cri", cri.StateCheck())
        return answer.known, answer.findings

    def inspect(self, known: Known, *, deep: bool) -> list[Finding]:
        """What storage, network and the supervisor have."""
        limit = DEEP if deep else LONG
        return [
            *_all(self._ask("storage", storage.StoreCheck(known=known, deep=deep), limit)),
            *_all(self._ask("network", network.StoreCheck(known=known))),
            *leftovers.inspect(self._run_root, known),
        ]

    def mend(self, known: Known, findings: list[Finding]) -> list[Finding]:
        """Monitors and inits first, who hold what the others are to remove; groups when they are empty."""
        of = leftovers.by_owner(findings)
        done = leftovers.mend(self._run_root, of["supervisor"], self._remove_monitor, self._stop_init)
        if of["network"]:
            done += self._ask("network", network.StoreMend(known=known, findings=of["network"])).findings
        if of["storage"]:
            done += self._ask("storage", storage.StoreMend(known=known, findings=of["storage"])).findings
        done += leftovers.mend_groups(of["groups"])
        return [*self._mend_state(of["cri"]), *done]

    def _mend_state(self, findings: list[Finding]) -> list[Finding]:
        return self._ask("cri", cri.StateCheck(repair=True)).findings if findings else []

    def _remove_monitor(self, container_id: str) -> None:
        self._ask("supervisor", MonitorRemove(container_id=container_id))

    def _stop_init(self, pod_id: str) -> None:
        self._ask("supervisor", InitStop(pod_id=pod_id))


def _all(answer: Findings) -> list[Finding]:
    if answer.more:
        rest = Finding(owner="", object="more", problem=f"{answer.more} more; check again after a repair")
        answer.findings.append(rest)
    return answer.findings
