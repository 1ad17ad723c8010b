"""Runs in: cri. What stands beside the state, so that a lost state can be made again.

Owns `<run_root>/cri/pods/<id>.json`: every pod's record, replaced with each change of its row. Of containers
the like stands in the directories of their monitors (`cri.json`, written by the monitor), with their pod's
record; those are only read here. A file that is damaged is said to be so and counts as absent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from ipc import log
from ipc.messages import Body

B = TypeVar("B", bound=Body)
SUFFIX = ".json"


class PodFiles:
    """One file per pod in a directory of ours."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._ours = True
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def _path(self, pod_id: str) -> str:
        return f"{self._directory}/{pod_id}{SUFFIX}"

    def let_go(self) -> None:
        """Another worker writes them from now on."""
        self._ours = False

    def write(self, pod_id: str, kept: Body) -> None:
        """Replace a pod's file. Raises OSError."""
        if not self._ours:
            return
        path = self._path(pod_id)
        with open(f"{path}.new", "wb") as file:
            file.write(msgspec.json.encode(kept))
        os.replace(f"{path}.new", path)

    def remove(self, pod_id: str) -> None:
        """Remove a pod's file; absent is success. Raises OSError."""
        if self._ours:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(pod_id))

    def ids(self) -> list[str]:
        """The pods that have a file."""
        return [name.removesuffix(SUFFIX) for name in os.listdir(self._directory) if name.endswith(SUFFIX)]

    def read(self, pod_id: str, kind: type[B]) -> B | None:
        """A pod's file."""
        return read(self._path(pod_id), kind)


def read(path: str, kind: type[B]) -> B | None:
    """A JSON file; None if it is absent or damaged."""
    data = read_bytes(path)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:  # all are renamed into place: only a broken disk does this
        log.get().error("a record is damaged", path=path, text=error)
        return None


def read_bytes(path: str) -> bytes | None:
    """A file's content; None if it is absent."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def directories(path: str) -> Iterator[str]:
    """Names of the entries of a directory; none if there is none."""
    with contextlib.suppress(FileNotFoundError):
        yield from sorted(os.listdir(path))
