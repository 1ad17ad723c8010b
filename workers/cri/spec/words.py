"""Runs in: cri. Tables of names, written as text: a list of eighty names reads better so than quoted."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a text, in order."""
    return tuple(text.split())
