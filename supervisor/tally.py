"""Runs in: the supervisor.

The death tally: one file per kind under `<run_root>/tally/`, one line per death nobody asked for, newest
last. Data for people and for `bulkheadctl`; the restart policy has a memory of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

KEPT = 100


def describe(code: int, lived: float) -> str:
    """Return how a process ended, for people: how, when, after how long."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return f"{_how(code)} at {stamp} after {lived:.0f} s"


def _how(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    with contextlib.suppress(ValueError):
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"signal {-code}"


class Tally:
    """All the files."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def add(self, kind: str, pid: int, sentence: str, why: str = "") -> None:
        """Add a death. A full disk is no reason to fail."""
        line = f"pid {pid}: {sentence}" + (f": {why}" if why else "")
        path = f"{self._directory}/{kind}"
        with contextlib.suppress(OSError):
            lines = [*self.read(kind), line.replace("\n", " ")][-KEPT:]
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
            os.rename(f"{path}.new", path)

    def read(self, kind: str) -> list[str]:
        """Return the deaths of a kind, oldest first."""
        try:
            with open(f"{self._directory}/{kind}", encoding="utf-8") as file:
                return file.read().splitlines()
        except FileNotFoundError:
            return []
