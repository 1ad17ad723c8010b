"""Runs in: the monitor.

The process's log with the names of its pod and container in every line.
"""

from __future__ import annotations

from typing import Any

from ipc.log import Log


class ContainerLog:
    """Says through `log` what happens to one container."""

    def __init__(self, log: Log, *, pod: str, container: str) -> None:
        self._log = log
        self._names = {"pod": pod, "container": container}

    def debug(self, event: str, **fields: Any) -> None:
        self._log.debug(event, **self._names, **fields)

    def info(self, event: str, **fields: Any) -> None:
        self._log.info(event, **self._names, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log.warning(event, **self._names, **fields)

    def error(self, event: str, **fields: Any) -> None:
        self._log.error(event, **self._names, **fields)
