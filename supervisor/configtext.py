"""Runs in: `bulkhead config`.

Writes a configuration as TOML, with the meaning of every key above it and the origin of its value behind
it. What it writes, configfile reads back.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from supervisor.config import Config, RuntimeConfig
from supervisor.configfile import KeyPath

Origin = Callable[[KeyPath], str]
_BARE = re.compile(r"[A-Za-z0-9_-]+\Z")


def render(config: Config, origin: Origin = lambda _path: "") -> str:
    """Return the whole configuration as commented TOML, each value with where it comes from."""
    lines = [
        "# Configuration of Bulkhead. Times are seconds. Lists in later files replace those of earlier ones.",
        "",
    ]
    _keys(lines, config, (), origin)
    for declared in dataclasses.fields(config):
        value = getattr(config, declared.name)
        if declared.name == "runtimes":
            _runtimes(lines, value, origin)
        elif dataclasses.is_dataclass(value):
            _table(lines, (declared.name,), declared.metadata["doc"], value, origin)
    return "\n".join(lines).rstrip() + "\n"


def _table(lines: list[str], path: KeyPath, doc: str, value: Any, origin: Origin) -> None:
    lines += [f"# {doc}", f"[{'.'.join(path)}]"]
    _keys(lines, value, path, origin)
    for declared in dataclasses.fields(value):
        inner = getattr(value, declared.name)
        if dataclasses.is_dataclass(inner):
            _table(lines, (*path, declared.name), declared.metadata["doc"], inner, origin)


def _runtimes(lines: list[str], runtimes: dict[str, RuntimeConfig], origin: Origin) -> None:
    for name, runtime in runtimes.items():
        lines.append(f"[runtimes.{name if _BARE.match(name) else json.dumps(name)}]")
        _keys(lines, runtime, ("runtimes", name), origin)


def _keys(lines: list[str], table: Any, path: KeyPath, origin: Origin) -> None:
    for declared in dataclasses.fields(table):
        value = getattr(table, declared.name)
        if dataclasses.is_dataclass(value) or declared.name == "runtimes":
            continue
        source = origin((*path, declared.name))
        comment = f"  # {source}" if source else ""
        lines += [f"# {declared.metadata['doc']}", f"{declared.name} = {literal(value)}{comment}", ""]


def literal(value: Any) -> str:
    """Return a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {literal(v)}" for k, v in value.items()) + "}"
    return repr(value)
