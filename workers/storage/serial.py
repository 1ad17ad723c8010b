"""Runs in: storage. Sans-IO.

One after the other: operations on one object (a container, a pod) never overlap, those on different objects
do. An operation may go on after its call was answered or given up; the next one waits for its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Done = Callable[[], None]
Operation = Callable[[Done], object]


class Serial:
    """Lines of operations by key. An operation gets a function that it must call once, when it has ended."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Operation]] = {}

    def run(self, key: str, operation: Operation) -> None:
        """Run now, or when those before it have ended."""
        line = self._lines.setdefault(key, deque())
        line.append(operation)
        if len(line) == 1:
            operation(self._ender(key))

    def waiting(self) -> int:
        """How many operations wait for others."""
        return sum(len(line) - 1 for line in self._lines.values())

    def busy(self, key: str) -> bool:
        """True while an operation on `key` is going on."""
        return key in self._lines

    def _ender(self, key: str) -> Done:
        ended = False

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                self._next(key)

        return end

    def _next(self, key: str) -> None:
        line = self._lines[key]
        line.popleft()
        if line:
            line[0](self._ender(key))
        else:
            del self._lines[key]
