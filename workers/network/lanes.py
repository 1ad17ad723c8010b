"""Runs in: network. Sans I/O.

One operation at a time for each pod, in the order they came; pods do not wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Done = Callable[[], None]
#: Begins an operation; calls `done` once, at once or later, when it is over.
Operation = Callable[[Done], None]


class Lanes:
    """The queues."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Operation]] = {}

    def submit(self, pod_id: str, operation: Operation) -> None:
        """Begin the operation when those before it on the same pod are over."""
        lane = self._waiting.get(pod_id)
        if lane is not None:
            lane.append(operation)
            return
        self._waiting[pod_id] = deque()
        operation(lambda: self._next(pod_id))

    def _next(self, pod_id: str) -> None:
        lane = self._waiting[pod_id]
        if lane:
            lane.popleft()(lambda: self._next(pod_id))
        else:
            del self._waiting[pod_id]

    def waiting(self) -> int:
        """How many operations wait for others."""
        return sum(map(len, self._waiting.values()))

    def busy(self) -> list[str]:
        """Pods with an operation at work."""
        return sorted(self._waiting)
