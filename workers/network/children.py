"""Runs in: network.

Starts the children that do the work, so that a node which has no process left is an answer, not a crash.
"""

from __future__ import annotations

from collections.abc import Callable

from ipc.errors import Code, RemoteError
from ipc.whereabouts import plugin_of
from workers.jobs import Jobs

#: Called once with what the child returned, or with why there is nothing.
Ended = Callable[[bytes | RemoteError], None]

#: A child whose own deadlines do not end it is killed this long after them, in seconds.
SLACK = 15.0


class Children:
    """The worker's children."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def start(
        self,
        function: Callable[..., bytes],
        *args: object,
        ended: Ended,
        timeout: float,
        of: str = "",
    ) -> None:
        """Run `function(*args)` in a child, which may take `timeout` seconds and some slack. `of`: the pod or
        network that it is done to."""
        name = f"network {function.__name__}"
        try:
            job = self._jobs.start(function, *args, on_done=ended, timeout=timeout + SLACK, name=name)
        except OSError as error:
            ended(RemoteError(Code.RESOURCE_EXHAUSTED, f"no process for {name}: {error.strerror}"))
            return
        began = job.since
        job.describe = lambda: (_described(job.pid, of), began)


def _described(pid: int, of: str) -> str:
    """To what it is done, and the plugin that runs, which is the child's child."""
    plugin = plugin_of(pid)
    return ", ".join(part for part in (of, f"plugin {plugin}" if plugin else "") if part)
