"""Runs in: cri. CPU use in nano-cores. Sans-IO.

Of every group the last two samples are kept that lie a second or more apart; whoever reads adds one. A
sampler adds one now and then (collect.py), so that a first reader gets a rate too, and one that is not older
than its period.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

#: ns; over less than this the kernel's own steps would show.
SHORTEST = 1_000_000_000


@dataclass(slots=True)
class _Samples:
    at: int
    usage: int
    rate: int | None = None


class Rates:
    """The samples of all groups, by key."""

    def __init__(self) -> None:
        self._samples: dict[str, _Samples] = {}

    def observe(self, key: str, now: int, usage: int, *, born: int | None = None) -> int | None:
        """A group has used `usage` ns of CPU at `now` (monotonic ns); returns its use in nano-cores.

        None until there are two samples. Of a group that is not known, `born` says since when it can have
        used anything.
        """
        samples = self._samples.get(key)
        if samples is None:
            known = born is not None and now - born >= SHORTEST
            rate = usage * 1_000_000_000 // (now - born) if known and born is not None else None
            self._samples[key] = _Samples(now, usage, rate)
            return rate
        passed = now - samples.at
        if passed >= SHORTEST:
            samples.rate = max(0, usage - samples.usage) * 1_000_000_000 // passed
            samples.at, samples.usage = now, usage
        return samples.rate

    def keep(self, keys: Collection[str]) -> None:
        """Forget all other groups."""
        for key in self._samples.keys() - keys:
            del self._samples[key]
