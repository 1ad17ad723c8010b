"""Runs in: cri. Counts of RPCs, for `cri.info.get` and so for /metrics."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from ipc.messages.cri import RPC_BUCKETS, RpcCount


@dataclass
class _Count:
    total: int = 0
    errors: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * len(RPC_BUCKETS))


class RpcStats:
    """How many RPCs ended, how many of them failed, how long they took."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}

    def observe(self, name: str, seconds: float, *, failed: bool) -> None:
        """An RPC ended."""
        entry = self._counts.setdefault(name, _Count())
        entry.total += 1
        entry.errors += failed
        entry.seconds += seconds
        for index in range(bisect_left(RPC_BUCKETS, seconds), len(RPC_BUCKETS)):
            entry.buckets[index] += 1  # cumulative, as Prometheus has them

    def counts(self) -> list[RpcCount]:
        """All counts, by name."""
        return [
            RpcCount(name=name, total=c.total, errors=c.errors, seconds=c.seconds, buckets=list(c.buckets))
            for name, c in sorted(self._counts.items())
        ]
