"""Runs in: the supervisor, and `bulkhead config`.

Reads `/etc/bulkhead/bulkhead.toml`, then `bulkhead.toml.d/*.toml` in lexical order, then flags; later ones
win, key by key, and a list replaces a list. It refuses what it does not know: every error names the file,
the line and, for an unknown key, the nearest one that exists. Nothing is started on half a configuration.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from supervisor.config import Config, RuntimeConfig

MAIN_FILE = "/etc/bulkhead/bulkhead.toml"
KeyPath = tuple[str, ...]


class ConfigError(Exception):
    """The configuration cannot be used; the text has a line per fault: file:line: sentence."""


@dataclass
class Source:
    """One file's tables, or the flags (`name` is then "command line")."""

    name: str
    data: dict[str, Any]
    text: str = ""

    def place(self, path: KeyPath) -> str:
        """Return file:line of a key, as near as it can be found."""
        return f"{self.name}:{find_line(self.text, path)}" if self.text else self.name

    def sets(self, path: KeyPath) -> bool:
        """True if the key stands here."""
        table: Any = self.data
        for name in path:
            if not isinstance(table, dict) or name not in table:
                return False
            table = table[name]
        return True


@dataclass
class _Checker:
    """Walks one source along the declared keys and collects faults."""

    source: Source
    faults: list[str] = field(default_factory=list)

    def fault(self, path: KeyPath, sentence: str) -> None:
        self.faults.append(f"{self.source.place(path)}: {sentence}")

    def table(self, cls: type[Any], data: Mapping[str, Any], path: KeyPath) -> None:
        hints = typing.get_type_hints(cls)
        declared = {f.name: f for f in dataclasses.fields(cls)}
        for name, value in data.items():
            here = (*path, name)
            if name not in declared:
                self.fault(here, _unknown(here, path, list(declared)))
            elif self.typed(hints[name], value, here):
                self.value(declared[name], value, here)

    def value(self, declared: dataclasses.Field[Any], value: Any, path: KeyPath) -> None:
        check = declared.metadata["check"]
        wrong = check(value) if check is not None else ""
        if wrong:
            instead = "" if isinstance(value, list | dict) else f", not {value!r}"
            self.fault(path, f"{'.'.join(path)} {wrong}{instead}")

    def typed(self, hint: Any, value: Any, path: KeyPath) -> bool:
        """Check the type; descend into tables. True if the value itself is still to be checked."""
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            self.table(typing.cast("type[Any]", hint), value, path)
            return False
        if typing.get_origin(hint) is dict and isinstance(value, dict):
            return self.mapping(typing.get_args(hint)[1], value, path)
        if _is_a(hint, value):
            return True
        self.fault(path, f"{'.'.join(path)} must be {_type_name(hint)}, not {_value_name(value)}")
        return False

    def mapping(self, hint: Any, value: Mapping[str, Any], path: KeyPath) -> bool:
        """Check every item; True if the mapping as a whole is still to be checked."""
        before = len(self.faults)
        for name, item in value.items():
            if hint is RuntimeConfig and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                self.fault((*path, name), f"{name!r} cannot be a runtime's name")
            else:
                self.typed(hint, item, (*path, name))
        return len(self.faults) == before


def _is_a(hint: Any, value: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_a(part, value) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _type_name(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list of strings"
    if typing.get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "a table"
    return {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}[hint]


def _value_name(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    return repr(value)


def _unknown(path: KeyPath, parent: KeyPath, siblings: list[str]) -> str:
    """The sentence for an unknown key. The nearest key may stand in another table."""
    import difflib  # only when there is something to complain of

    full = ".".join(path)
    every = {".".join(p): p for p in key_paths()}
    near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.6)
    candidates = [".".join((*parent, name)) for name in near]
    candidates += [name for name, p in every.items() if p[-1] == path[-1]]
    candidates += difflib.get_close_matches(full, every, n=1, cutoff=0.0)
    return f"unknown key {full}; the nearest valid key is {candidates[0]}"


def key_paths(cls: type[Any] = Config, parent: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key that exists; NAME stands for a runtime's name."""
    hints = typing.get_type_hints(cls)
    for declared in dataclasses.fields(cls):
        here = (*parent, declared.name)
        hint = hints[declared.name]
        if dataclasses.is_dataclass(hint):
            yield from key_paths(typing.cast("type[Any]", hint), here)
        elif typing.get_args(hint)[1:] == (RuntimeConfig,):
            yield from key_paths(RuntimeConfig, (*here, "NAME"))
        else:
            yield here


_HEADER = re.compile(r"\s*\[\[?\s*(.+?)\s*\]\]?\s*(#.*)?$")
_ASSIGN = re.compile(r"\s*((?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'|\s*\.\s*)+?)\s*=")
_PART = re.compile(r"\"([^\"]*)\"|'([^']*)'|([A-Za-z0-9_-]+)")


def find_line(text: str, path: KeyPath) -> int:
    """Return the line (from 1) where the longest known part of `path` is set in a TOML text."""
    best, best_length = 1, 0
    header: KeyPath = ()
    for number, line in enumerate(text.splitlines(), 1):
        if found := _HEADER.match(line):
            header = here = _split(found[1])
        elif found := _ASSIGN.match(line):
            here = (*header, *_split(found[1]))
        else:
            continue
        length = len(here) if here == path[: len(here)] else 0
        if length > best_length:
            best, best_length = number, length
    return best


def _split(dotted: str) -> KeyPath:
    return tuple(
        next(group for group in match.groups() if group is not None) for match in _PART.finditer(dotted)
    )


def read(path: str) -> Source:
    """Read one file. Raises ConfigError if it cannot be read or is no TOML."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        return Source(path, tomllib.loads(text), text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+)", str(error))
        line = found[1] if found else str(text.count("\n") + 1)
        raise ConfigError(f"{path}:{line}: not TOML: {error}") from error


def sources(config_file: str | None, config_dir: str | None) -> list[Source]:
    """Read the files in their order. The default main file may be absent, a named one may not."""
    main = config_file or MAIN_FILE
    directory = config_dir or f"{main}.d"
    paths = [main] if config_file or os.path.exists(main) else []
    if os.path.isdir(directory):
        names = sorted(name for name in os.listdir(directory) if name.endswith(".toml"))
        paths += [os.path.join(directory, name) for name in names]
    elif config_dir:
        raise ConfigError(f"{config_dir}: no such directory")
    return [read(path) for path in paths]


def load(
    config_file: str | None = None, config_dir: str | None = None, flags: Mapping[str, Any] | None = None
) -> Config:
    """Return the effective configuration. `flags` is a table like a file's. Raises ConfigError."""
    return effective(config_file, config_dir, flags).config


@dataclass(frozen=True)
class Effective:
    """The configuration with what it was made of, the later sources over the earlier ones."""

    config: Config
    sources: list[Source]

    def origin(self, path: KeyPath) -> str:
        """Where the value of a key comes from: file:line, the command line, or "default"."""
        setting = (source for source in reversed(self.sources) if source.sets(path))
        return next((source.place(path) for source in setting), "default")


def effective(
    config_file: str | None = None, config_dir: str | None = None, flags: Mapping[str, Any] | None = None
) -> Effective:
    """Return the effective configuration with its sources. Raises ConfigError."""
    found = [*sources(config_file, config_dir), Source("command line", dict(flags or {}))]
    faults: list[str] = []
    for source in found:
        checker = _Checker(source)
        checker.table(Config, source.data, ())
        faults += checker.faults
    if faults:
        raise ConfigError("\n".join(faults))
    merged: dict[str, Any] = {}
    for source in found:
        merge(merged, source.data)
    config = build(Config, merged).resolved()
    _check_whole(config, found)
    return Effective(typing.cast(Config, config), found)


def merge(into: dict[str, Any], data: Mapping[str, Any]) -> None:
    """Lay one file's tables over those before it."""
    for name, value in data.items():
        if isinstance(value, dict):
            merge(into.setdefault(name, {}), value)
        else:
            into[name] = value


def build(cls: type[Any], data: Mapping[str, Any]) -> Any:
    """Make the dataclass from checked data."""
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value) for name, value in data.items()})


def _convert(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value)
    if typing.get_args(hint)[1:] == (RuntimeConfig,):
        return {name: build(RuntimeConfig, item) for name, item in value.items()}
    return float(value) if hint is float else value


def _check_whole(config: Config, found: list[Source]) -> None:
    """What only the whole can tell. Raises ConfigError."""
    if not config.runtimes:
        raise ConfigError("no OCI runtime: neither crun nor runc was found, and [runtimes] has no other")
    if config.default_runtime not in config.runtimes:
        known = ", ".join(config.runtimes)
        raise _whole(
            found, ("default_runtime",), f"default_runtime {config.default_runtime!r}: known are {known}"
        )
    if os.path.commonpath([config.root, config.run_root]) in {config.root, config.run_root}:
        raise _whole(found, ("run_root",), "root and run_root must not lie in one another")
    for table, name, value, cert in (
        ("stream", "tls_key", config.stream.tls_key, config.stream.tls_cert),
        ("stream", "tls_client_ca", config.stream.tls_client_ca, config.stream.tls_cert),
        ("ops", "address", config.ops.address, config.ops.tls_cert),
        ("ops", "tls_key", config.ops.tls_key, config.ops.tls_cert),
        ("ops", "tls_client_ca", config.ops.tls_client_ca, config.ops.tls_cert),
    ):
        if value and not cert:
            raise _whole(found, (table, name), f"{table}.{name} needs {table}.tls_cert")
    longest = f"{config.run_root}/monitors/{'0' * 64}/ctl.sock"
    if len(longest) > 107:
        raise _whole(
            found, ("run_root",), f"run_root is too long for Unix sockets below it ({len(longest)} > 107)"
        )


def _whole(found: list[Source], path: KeyPath, sentence: str) -> ConfigError:
    """Blame the last source that sets the key."""
    for source in reversed(found):
        if path[0] in source.data:
            return ConfigError(f"{source.place(path)}: {sentence}")
    return ConfigError(sentence)
