"""Runs in: cri. What a node could not give a container, gathered while its spec is built.

Owns a list of sentences; each stands in it once. The caller logs them: degraded loudly, never silently.
"""

from __future__ import annotations


class Notes:
    """Sentences for the log."""

    def __init__(self) -> None:
        self._sentences: dict[str, None] = {}

    def add(self, sentence: str) -> None:
        self._sentences[sentence] = None

    def all(self) -> tuple[str, ...]:
        return tuple(self._sentences)
