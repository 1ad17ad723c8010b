"""Runs in: the monitor.

What a container, in a hand, and its keeper say to each other, over a socketpair. At the container's end the
keeper itself answers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

PACKET = 8 * 1024  # bytes of what keeper and hands say
FEED_PACKET = 65 * 1024  # of output that is sent on: what is read at once, and the number of its stream
FEED_BYTES = 4 * 1024 * 1024  # that may be on their way to those who attached

#: From a hand: take these descriptors and this init; here is the log file anew; how much was logged; the end
#: may go on; there is nothing to keep. To a hand: the answer; the init ended; the record; all is over.
TAKE, REOPEN, COUNT, GO, LEAVE = b"T", b"R", b"C", b"G", b"L"
#: Too: give your standard input or terminal; send what you log to this socket as well; close standard input.
STDIO, FEED, SHUT = b"S", b"F", b"H"
ANSWER, ENDED, RECORD, OVER = b"A", b"E", b"X", b"O"
#: As link.Taken has it, and in the order of the descriptors.
TAKEN = struct.Struct("<iBBBBBq")
TAKEN_BYTES = TAKEN.size
COUNTS = struct.Struct("<QQ")
#: The init is the keeper's child, somebody else's (a pidfd comes along), or was gone at once.
CHILD, STRANGER, GONE = range(3)


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

    def secure(self, what: Taken, fds: list[int]) -> None:
        """Put duplicates where they are found if this process or the keeper dies. Raises OSError."""

    def take(self, what: Taken, fds: list[int]) -> None:
        """Hand a container that was created over. The descriptors are closed here."""

    def reopen(self, fd: int, done: Callable[[], object]) -> None:
        """Hand the log file over that is to be written from now on; closed here."""

    def count(self, done: Callable[[int, int], object]) -> None:
        """Ask how many bytes of records were written and dropped."""

    def stdio(self, done: Callable[[int, int], object]) -> None:
        """Ask for the writing end of standard input, or for the terminal; -1 for what it does not have."""

    def feed(self, fd: int) -> None:
        """Let every piece of output be sent to this socket; closed here."""

    def shut_stdin(self) -> None:
        """Close standard input for good."""

    def go(self) -> None:
        """The end may go on: nothing is to come that belongs into its record."""

    def leave(self) -> None:
        """There is nothing to be kept: the monitor is to end."""
