"""Runs in: cri. Sans-IO, with an injected clock.

What a URL's token stands for, and what a session's name does. Both tables are bounded and short-lived; names
of port-forward sessions are signed instead, so that they outlive this process.
"""

from __future__ import annotations

import base64
import os
import time
from _blake2 import blake2b  # by itself, as compare_digest: hashlib and hmac bring OpenSSL, 2 MB, with them
from _operator import _compare_digest as compare_digest
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ipc.errors import Code, RemoteError, not_found

T = TypeVar("T")
LIFETIME = 60.0  # seconds
LIMIT = 1000
KEY_SIZE = 32
_PREFIX = "pf."


@dataclass(frozen=True)
class _Entry(Generic[T]):
    name: str
    value: T
    until: float


class Tokens(Generic[T]):
    """Secret names that are good once and for a minute."""

    def __init__(
        self, *, lifetime: float = LIFETIME, limit: int = LIMIT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime, self._limit, self._clock = lifetime, limit, clock
        # By a keyed digest: how long a look-up takes says nothing of how much of a name was right.
        self._key = os.urandom(KEY_SIZE)
        self._entries: dict[bytes, _Entry[T]] = {}

    def __len__(self) -> int:
        self._expire()
        return len(self._entries)

    def issue(self, value: T) -> str:
        """A new name for `value`. Raises RemoteError(RESOURCE_EXHAUSTED)."""
        if len(self) >= self._limit:
            raise RemoteError(
                Code.RESOURCE_EXHAUSTED, f"{self._limit} streaming requests wait for their clients already"
            )
        name = _text(os.urandom(18))
        self._entries[self._digest(name)] = _Entry(name, value, self._clock() + self._lifetime)
        return name

    def redeem(self, name: str) -> T | None:
        """What the name stands for, once; None if that is nothing (any more)."""
        self._expire()
        entry = self._entries.pop(self._digest(name), None)
        if entry is None or not compare_digest(entry.name.encode(), name.encode()):
            return None
        return entry.value

    def rows(self) -> list[tuple[str, T, float]]:
        """Every name that is good: itself, what it stands for, until when."""
        self._expire()
        return [(entry.name, entry.value, entry.until) for entry in self._entries.values()]

    def take(self, rows: Iterable[tuple[str, T, float]]) -> None:
        """Know the names of another table, oldest first; before any is issued."""
        for name, value, until in rows:
            self._entries[self._digest(name)] = _Entry(name, value, until)

    def _digest(self, name: str) -> bytes:
        return blake2b(name.encode(), key=self._key).digest()

    def _expire(self) -> None:
        """All live equally long, so the oldest come first."""
        now = self._clock()
        while self._entries:
            first = next(iter(self._entries))
            if self._entries[first].until > now:
                return
            del self._entries[first]


class Signer:
    """Names of port-forward sessions: a pod's id, signed, so that every cri of this boot knows its own."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def name(self, pod_id: str) -> str:
        """The name of a session with this pod."""
        return f"{_PREFIX}{pod_id}.{self._signature(pod_id)}"

    def pod(self, name: str) -> str | None:
        """The pod of a session, None if that is no name of a port-forward session.

        Raises RemoteError(NOT_FOUND) if nobody signed it.
        """
        if not name.startswith(_PREFIX):
            return None
        pod_id, _, signature = name.removeprefix(_PREFIX).rpartition(".")
        if not compare_digest(signature.encode(), self._signature(pod_id).encode()):
            raise not_found("there is no such session")
        return pod_id

    def _signature(self, pod_id: str) -> str:
        return _text(blake2b(pod_id.encode(), key=self._key, digest_size=32).digest())


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
