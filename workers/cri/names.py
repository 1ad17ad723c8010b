"""Runs in: cri. Ids and names, sans-IO.

Ids are 64 lower-case hexadecimal digits. Every argument that names a pod or a container may be a unique
prefix of one; an ambiguous prefix is refused. Names are what CRI metadata says: they are keys of
operations, so that a repeated request joins the first instead of meeting "the name is reserved".
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, insort
from typing import NamedTuple

from ipc.errors import invalid

ID_DIGITS = 64
_HEX = re.compile(r"[0-9a-f]{1,64}", re.ASCII)


class PodName(NamedTuple):
    """What makes a pod sandbox the same pod sandbox (CRI PodSandboxMetadata)."""

    name: str
    namespace: str
    uid: str
    attempt: int


class ContainerName(NamedTuple):
    """What makes a container the same container: its pod and CRI ContainerMetadata."""

    pod_id: str
    name: str
    attempt: int


def new_id() -> str:
    """A fresh id of 64 hexadecimal digits."""
    return os.urandom(ID_DIGITS // 2).hex()


def sandbox_id(pod_id: str) -> str:
    """The id of a pod's sandbox container; always the same, so that making one can be repeated."""
    half = ID_DIGITS // 2
    return pod_id[half:] + pod_id[:half]


class Ids:
    """The known ids of one kind, sorted, so that prefixes are found by bisection."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._sorted: list[str] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, id_: str) -> None:
        """Remember an id that is not known yet."""
        insort(self._sorted, id_)

    def discard(self, id_: str) -> None:
        """Forget an id; one that is not known is no error."""
        index = bisect_left(self._sorted, id_)
        if index < len(self._sorted) and self._sorted[index] == id_:
            del self._sorted[index]

    def match(self, prefix: str) -> list[str]:
        """All ids that begin with `prefix`."""
        begin = bisect_left(self._sorted, prefix)
        end = begin
        while end < len(self._sorted) and self._sorted[end].startswith(prefix):
            end += 1
        return self._sorted[begin:end]

    def find(self, text: str) -> str | None:
        """The id that `text` is or begins, None if there is none.

        Raises RemoteError(INVALID_ARGUMENT) if the text is empty or fits several ids.
        """
        if not text:
            raise invalid(f"the {self._kind} id is empty")
        if not _HEX.fullmatch(text):
            return None
        index = bisect_left(self._sorted, text)
        if index == len(self._sorted) or not self._sorted[index].startswith(text):
            return None
        if index + 1 < len(self._sorted) and self._sorted[index + 1].startswith(text):
            raise invalid(f"the {self._kind} id {text} fits more than one {self._kind}")
        return self._sorted[index]
