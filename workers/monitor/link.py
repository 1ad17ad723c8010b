"""Runs in: the monitor.

What a container, in a hand, says to its keeper. At the container's end the keeper itself answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol


class Taken(NamedTuple):
    """What is handed over to the keeper; the descriptors come in this order, the outputs' last."""

    pid: int
    kin: int  # CHILD, STRANGER or GONE
    stdin: bool
    log: bool
    oom_version: int  # 0: the group is not followed
    oom_fds: int  # how many
    oom_others: int  # as Followed has it
    memory: str  # the group's directory


class Link(Protocol):
    """The keeper, as a container needs it."""

    def take(self, what: Taken, fds: list[int]) -> None:
        """Hand a container that was created over. The descriptors are closed here."""

    def reopen(self, fd: int, done: Callable[[], object]) -> None:
        """Hand the log file over that is to be written from now on; closed here."""

    def count(self, done: Callable[[int, int], object]) -> None:
        """Ask how many bytes of records were written and dropped."""

    def go(self) -> None:
        """The end may go on: nothing is to come that belongs into its record."""

    def leave(self) -> None:
        """There is nothing to be kept: the monitor is to end."""
