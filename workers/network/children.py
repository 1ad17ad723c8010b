"""Runs in: network.

Starts the children that do the work, so that a node which has no process left is an answer, not a crash.
"""

from __future__ import annotations

from collections.abc import Callable

from ipc.errors import Code, RemoteError
from workers.jobs import Jobs

#: Called once with what the child returned, or with why there is nothing.
Ended = Callable[[bytes | RemoteError], None]

#: A child whose own deadlines do not end it is killed this long after them, in seconds.
SLACK = 15.0


class Children:
    """The worker's children."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def start(self, function: Callable[..., bytes], *args: object, ended: Ended, timeout: float) -> None:
        """Run `function(*args)` in a child of its own, which may take `timeout` seconds and some slack."""
        try:
            self._jobs.start(function, *args, on_done=ended, timeout=timeout + SLACK)
        except OSError as error:
            text = f"no process for network {function.__name__}: {error.strerror}"
            ended(RemoteError(Code.RESOURCE_EXHAUSTED, text))
