"""Runs in: the supervisor. Sans-IO.

Which requests are to be told of because they take long: each when it passes the limit, and again whenever
its age has doubled since. Workers name, with each answer to a ping, what they serve, for how long, and what
they do.
"""

from __future__ import annotations

from collections.abc import Iterable

from ipc.messages.supervisor import InFlight

#: These have no end to be waited for.
ENDLESS = frozenset({"GetContainerEvents"})


class Slow:
    """What has been told of one kind of worker."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, str, int], int] = {}  # (pid, type, second it began) -> age when told

    def look(self, pid: int, now: float, requests: Iterable[InFlight], limit: float) -> list[InFlight]:
        """Return those of a process that are to be told of now; `limit` in seconds, 0 for never."""
        found = []
        kept: dict[tuple[int, str, int], int] = {}
        for one in requests:
            if not limit or one.age_ms < limit * 1000 or one.type in ENDLESS:
                continue
            key = (pid, one.type, round(now - one.age_ms / 1000))
            told = next((self._told[near] for near in _near(key) if near in self._told), 0)
            due = told == 0 or one.age_ms >= 2 * told
            kept[key] = one.age_ms if due else told
            if due:
                found.append(one)
        self._told = {key: age for key, age in self._told.items() if key[0] != pid} | kept
        return found


def _near(key: tuple[int, str, int]) -> Iterable[tuple[int, str, int]]:
    """Ages and clocks are rounded: the same request may seem to have begun a second sooner or later."""
    pid, name, began = key
    return ((pid, name, began), (pid, name, began - 1), (pid, name, began + 1))
