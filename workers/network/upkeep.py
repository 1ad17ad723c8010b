"""Runs in: network.

A check of what network owns and the mending of what it found, each in a child (workers.network.check), which
loads what only it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ipc.messages import Body, checking
from ipc.messages.network import StoreCheck, StoreMend
from ipc.serve import Call
from workers.jobs import Jobs
from workers.network.confdir import Selection
from workers.network.conflist import Network
from workers.network.operations import Places


class Upkeep:
    """Handlers of the messages of `bulkhead check`."""

    def __init__(self, jobs: Jobs, places: Callable[[], Places], selection: Callable[[], Selection]) -> None:
        self._jobs = jobs
        self._places = places
        self._selection = selection

    def _told(self, known: checking.Known, findings: Sequence[checking.Finding] = ()) -> bytes:
        network = self._selection().network
        told = _Told(places=self._places(), network=network, known=known, findings=list(findings))
        return msgspec.msgpack.encode(told)

    def check(self, call: Call, body: StoreCheck) -> None:
        """network.store.check"""
        told = self._told(body.known)
        self._jobs.run(call, inspect, told, then=_findings, name="check of the network")

    def mend(self, call: Call, body: StoreMend) -> None:
        """network.store.mend"""
        told = self._told(body.known, body.findings)
        self._jobs.run(call, mend, told, then=_findings, name="mending of the network")


def inspect(told: bytes) -> Any:
    """In a child."""
    from workers.network import check

    it = msgspec.msgpack.decode(told, type=_Told)
    return msgspec.to_builtins(checking.told(check.inspect(it.places, it.network, it.known)))


def mend(told: bytes) -> Any:
    """In a child."""
    from workers.network import check

    it = msgspec.msgpack.decode(told, type=_Told)
    return msgspec.to_builtins(checking.told(check.mend(it.places, it.network, it.known, it.findings)))


class _Told(Body):
    """What a child needs to know."""

    places: Places
    network: Network | None
    known: checking.Known
    findings: list[checking.Finding] = []


def _findings(value: Any) -> checking.Findings:
    return msgspec.convert(value, checking.Findings)
