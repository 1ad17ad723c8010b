"""Runs in: the build of packages, and tests.

The schema of the configuration as texts: bulkhead.toml with every default as a comment, and the reference in
docs/configuration.md. A key with no meaning of its own, or a table, cannot be added without standing here.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from supervisor.config import Config, RuntimeConfig
from supervisor.configtext import literal
from supervisor.reload import is_fixed

REFERENCE_HEAD = """\
# The configuration

`/etc/bulkhead/bulkhead.toml`, then `/etc/bulkhead/bulkhead.toml.d/*.toml` in lexical order, then flags of
`bulkhead serve`; later ones win, key by key, and a list replaces a list. Nothing has to be configured: a
file that is not there is an empty one. What the daemon makes of all that is told by

    bulkhead config             # every key, its value, and where that comes from: file:line, flag, default
    bulkhead config --check     # nothing but what is wrong, by exit code too
    bulkhead config --default   # the built-in defaults

A key that does not exist, a value of the wrong type or out of its range is refused, with file, line and the
nearest key that exists, and nothing is started on half a configuration. Times are seconds.

*Live* keys are applied by `systemctl reload bulkhead` or `bulkheadctl reload`; the others take
`systemctl restart bulkhead`, which leaves containers running. A reload that finds a fault changes nothing.

The flags are `--root`, `--run-root`, `--listen`, `--log-level`, `--cni-conf-dir` and `--cni-bin-dir`; the
unit takes them from `BULKHEAD_OPTIONS` in `/etc/default/bulkhead` or `/etc/sysconfig/bulkhead`.

What nodes have already is read where it is: `/etc/containers/registries.conf` with its drop-ins and short
names, `certs.d`, credentials in docker's format; see docs/images.md.

This page is written from the schema (`python -m supervisor.cli.texts --reference docs/configuration.md`); a
test compares them.
"""
TOML_HEAD = """\
# Configuration of Bulkhead: bulkhead.toml(5). Every key stands here with its default, as a comment. Times are
# seconds. Files in bulkhead.toml.d/ and flags win over this one; a list replaces a list.
"""


@dataclass(frozen=True)
class Key:
    """One key: its default as TOML, its meaning, whether a reload applies it."""

    name: str
    default: str
    doc: str
    live: bool


@dataclass(frozen=True)
class Table:
    """One table; the keys outside of any table have the name ""."""

    name: str
    doc: str
    keys: tuple[Key, ...]

    @property
    def heading(self) -> str:
        """How it is written in a file."""
        return f"[{self.name}]" if self.name else "Outside of any table"


def tables() -> list[Table]:
    """Every table of the schema, the keys of the top first."""
    return [Table("", "The instance as a whole.", tuple(_keys(Config, ""))), *_below(Config, "")]


def _below(cls: type[Any], parent: str) -> Iterator[Table]:
    hints = typing.get_type_hints(cls)
    for declared in dataclasses.fields(cls):
        if not _is_table(declared, hints):
            continue
        name, inner = f"{parent}{declared.name}", hints[declared.name]
        if declared.name == "runtimes":
            yield Table("runtimes.NAME", declared.metadata["doc"], tuple(_keys(RuntimeConfig, name)))
        else:
            yield Table(name, declared.metadata["doc"], tuple(_keys(inner, name)))
            yield from _below(inner, f"{name}.")


def _is_table(declared: dataclasses.Field[Any], hints: dict[str, Any]) -> bool:
    return declared.name == "runtimes" or dataclasses.is_dataclass(hints[declared.name])


def _keys(cls: type[Any], table: str) -> Iterator[Key]:
    hints = typing.get_type_hints(cls)
    default = cls()
    for declared in dataclasses.fields(cls):
        if _is_table(declared, hints):
            continue
        dotted = f"{table}.{declared.name}" if table else declared.name
        value = literal(getattr(default, declared.name))
        yield Key(declared.name, value, declared.metadata["doc"], not is_fixed(dotted))


def commented() -> str:
    """bulkhead.toml with every default as a comment."""
    lines = [TOML_HEAD]
    for table in tables():
        if table.name:
            lines += [f"# {table.doc}", f"#[{table.name}]"]
        for key in table.keys:
            lines += [f"# {key.doc}", f"#{key.name} = {key.default}", ""]
    return "\n".join(lines).rstrip() + "\n"


def reference() -> str:
    """docs/configuration.md."""
    lines = [REFERENCE_HEAD]
    for table in tables():
        heading = f"`[{table.name}]`" if table.name else "Outside of any table"
        lines += [f"## {heading}", "", table.doc, "", "| key | default | live | |", "|---|---|---|---|"]
        lines += [_row(key) for key in table.keys]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(key: Key) -> str:
    default, doc = key.default.replace("|", "\\|"), key.doc.replace("|", "\\|").replace("<", "&lt;")
    return f"| `{key.name}` | `{default}` | {'yes' if key.live else 'no'} | {doc} |"
