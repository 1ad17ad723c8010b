"""Runs in: the tests.

The commands that the documents name: those that stand in code blocks, a line each, and those that stand as
inline code in a sentence.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGES = (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))
_INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Command:
    """One command, and where it stands. `block` is False for inline code, which may leave arguments out."""

    place: str
    words: tuple[str, ...]
    block: bool

    @property
    def program(self) -> str:
        """What it runs."""
        return self.words[0].rpartition("/")[2]


def commands(*programs: str) -> list[Command]:
    """Every command of these programs in README.md and docs/."""
    return [found for page in PAGES for found in _of(page) if found.program in programs]


def _of(page: Path) -> Iterator[Command]:
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{page.name}:{number}"
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            text = line.strip().removeprefix("$ ").removeprefix("sudo ")
            yield from _parsed(place, text, block=True)
        else:
            for found in _INLINE.finditer(line):
                yield from _parsed(place, found[1], block=False)


def _parsed(place: str, text: str, *, block: bool) -> Iterator[Command]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return
    if words and all(word not in ("|", "&&", ";") for word in words):
        yield Command(place, tuple(words), block)
