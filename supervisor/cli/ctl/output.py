"""Runs in: bulkheadctl.

What people read: tables by rich, times and sizes in words. What programs read: JSON or YAML as the CRI
spells it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

CLEAR = "\033[H\033[2J"  # of a terminal
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
WIDEST = 100_000  # characters of a line; terminals wrap it


def print_json(value: Any) -> None:
    """Print a message, or plain data, as indented JSON."""
    print(json.dumps(as_data(value), indent=2, ensure_ascii=False))


def print_data(value: Any, form: str) -> None:
    """Print a message, or plain data, as JSON or as YAML."""
    if form == "yaml":
        import yaml

        print(yaml.safe_dump(as_data(value), sort_keys=False, allow_unicode=True), end="")
    else:
        print_json(value)


def as_data(value: Any) -> Any:
    """Return plain data for a protobuf message; anything else stays."""
    if isinstance(value, Message):
        return json_format.MessageToDict(value, always_print_fields_with_no_presence=True)
    return value


def print_ids(ids: Iterable[str]) -> None:
    """Print ids, one a line; nothing at all for none."""
    for one in ids:
        print(one)


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table as wide as it needs: half a pid or id would be a wrong one."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for header in headers:
        table.add_column(header, no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=WIDEST).print(table, soft_wrap=True)


def ago(nanoseconds: int) -> str:
    """Return how long ago a wall-clock time was ("-" for 0)."""
    return "-" if not nanoseconds else duration(time.time() - nanoseconds / 1e9) + " ago"


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count}{name}")
    return "".join(parts[:2])


def size(count: float) -> str:
    """Return bytes in the unit that reads best."""
    for unit in UNITS:
        if count < 1024 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def short(identity: str) -> str:
    """Return the first 13 digits of an id, without "sha256:"."""
    return identity.removeprefix("sha256:")[:13]


def pairs(items: Iterable[str]) -> dict[str, str]:
    """Return KEY=VALUE arguments as a mapping. Raises ValueError naming the one that is none."""
    found = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ValueError(f"{item!r} is not KEY=VALUE")
        found[key] = value
    return found


def coloured(text: str, code: str) -> str:
    """Colour a text (SGR code), but only on a terminal, and not where NO_COLOR is set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{code}m{text}\033[0m"
