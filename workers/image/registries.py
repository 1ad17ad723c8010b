"""Runs in: image.

registries.conf, version 2, with its drop-in directory (containers-registries.conf(5)): where a reference's
bytes may come from. It owns the parsed configuration and reads the files again when they change. A file
that cannot be read as what it should be fails every request with its name and the reason: a line like
`blocked = true` must never be lost silently.
"""

from __future__ import annotations

import os
import threading
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from ipc import log
from ipc.errors import Code, RemoteError, precondition
from ipc.reference import Reference, parse

SHORT_NAME_MODES = frozenset({"disabled", "permissive", "enforcing"})
PULL_FROM_MIRROR = frozenset({"all", "digest-only", "tag-only"})
_V1_SECTIONS = ("search", "insecure", "block")
MAX_FILE = 1 << 20


class MirrorTable(msgspec.Struct, rename="kebab"):
    """[[registry.mirror]]"""

    location: str
    insecure: bool = False
    pull_from_mirror: str = "all"


class RegistryTable(msgspec.Struct, rename="kebab"):
    """[[registry]]"""

    prefix: str = ""
    location: str = ""
    insecure: bool = False
    blocked: bool = False
    mirror_by_digest_only: bool = False
    mirror: list[MirrorTable] = []


class FileTable(msgspec.Struct, rename="kebab"):
    """One file. What is not named here (short-name prompts and the like) has no meaning for a server."""

    unqualified_search_registries: list[str] | None = None
    short_name_mode: str = ""
    credential_helpers: list[str] = []
    aliases: dict[str, str] = {}
    registry: list[RegistryTable] = []
    registries: Any = None  # version 1


@dataclass(frozen=True)
class Endpoint:
    """One place to try. `name` is host[:port]/repository as its operator calls it."""

    host: str
    repository: str
    insecure: bool = False
    mirror: bool = False

    @property
    def name(self) -> str:
        return f"{self.host}/{self.repository}"


@dataclass(frozen=True)
class Registries:
    """The configuration of one moment."""

    search: tuple[str, ...] | None = None  # None: not configured
    short_name_mode: str = "permissive"
    aliases: dict[str, str] = field(default_factory=dict)
    tables: tuple[RegistryTable, ...] = ()

    def find(self, text: str) -> tuple[RegistryTable, int] | None:
        """The table with the longest prefix of a full reference (without scheme), and that length."""
        found = [
            (length, table)
            for table in self.tables
            if (length := match_length(text, table.prefix)) is not None
        ]
        if not found:
            return None
        length, table = max(found, key=lambda pair: pair[0])
        return table, length

    def insecure(self, host: str) -> bool:
        """Whether a host (a token server) is named as insecure by itself."""
        found = self.find(f"{host}/")
        return found is not None and found[0].insecure

    def route(self, reference: Reference) -> list[Endpoint]:
        """Where to try a reference, in order: mirrors, then the registry.

        Raises RemoteError: PERMISSION_DENIED if it is blocked, FAILED_PRECONDITION if what it is rewritten to
        is no name.
        """
        own = Endpoint(reference.domain, reference.path)
        found = self.find(str(reference))
        if found is None:
            return [own]
        table, length = found
        if table.blocked:
            raise RemoteError(
                Code.PERMISSION_DENIED,
                f"pulling {reference} is blocked by the registry {table.prefix!r} in registries.conf",
            )
        mirrors = [
            _rewritten(reference, length, mirror.location, insecure=mirror.insecure, mirror=True)
            for mirror in table.mirror
            if _mirror_serves(table, mirror, reference)
        ]
        return [*mirrors, _rewritten(reference, length, table.location, insecure=table.insecure)]


def match_length(text: str, prefix: str) -> int | None:
    """How much of a reference a prefix covers, None if it does not match.

    A prefix ends where a component ends; `*.example.com` stands for every subdomain.
    """
    if prefix.startswith("*."):
        host = text.partition("/")[0]
        bare = host if prefix.count(":") else host.partition(":")[0]
        return len(bare) if bare.endswith(prefix[1:]) and len(bare) >= len(prefix) else None
    if not text.startswith(prefix):
        return None
    rest = text[len(prefix) :]
    if rest and "/" not in prefix and rest[0] == ":":
        return None  # host does not cover host:port
    return len(prefix) if not rest or rest[0] in "/:@" else None


def _mirror_serves(table: RegistryTable, mirror: MirrorTable, reference: Reference) -> bool:
    mode = "digest-only" if table.mirror_by_digest_only else mirror.pull_from_mirror
    return mode == "all" or (mode == "digest-only") == bool(reference.digest)


def _rewritten(
    reference: Reference, length: int, location: str, *, insecure: bool, mirror: bool = False
) -> Endpoint:
    """Replace the matched prefix by a location; a tag or digest inside the prefix goes with it."""
    if not location:  # a wildcard prefix without a location: the name stays
        return Endpoint(reference.domain, reference.path, insecure, mirror)
    rewritten = location + reference.repository[length:]
    try:
        name = parse(rewritten)
    except RemoteError as error:
        raise precondition(f"registries.conf turns {reference} into {rewritten}: {error.text}") from None
    return Endpoint(name.domain, name.path, insecure, mirror)


# -- putting files together ------------------------------------------------------------------------------


def merge(files: Iterable[tuple[str, FileTable]]) -> Registries:
    """Put files together: lists of later files replace earlier ones, tables and aliases merge by key."""
    merged = Registries()
    tables: dict[str, RegistryTable] = {}
    for path, file in files:
        _warn(path, file)
        tables |= {table.prefix: table for table in (_checked(path, table) for table in file.registry)}
        merged = replace(
            merged,
            search=merged.search
            if file.unqualified_search_registries is None
            else tuple(file.unqualified_search_registries),
            short_name_mode=file.short_name_mode or merged.short_name_mode,
            aliases={**merged.aliases, **file.aliases},
        )
    return replace(merged, tables=tuple(tables.values()))


def _warn(path: str, file: FileTable) -> None:
    helpers = [helper for helper in file.credential_helpers if helper != "containers-auth.json"]
    if helpers:
        log.get().warning("credential helpers are not run", file=path, helpers=",".join(helpers))


def _checked(path: str, table: RegistryTable) -> RegistryTable:
    """Fill in what follows from the rest of a table. Raises RemoteError(FAILED_PRECONDITION)."""
    prefix = (table.prefix or table.location).rstrip("/")
    location = table.location.rstrip("/") or ("" if prefix.startswith("*.") else prefix)
    if not prefix:
        raise _bad(path, "a [[registry]] has neither prefix nor location")
    for place in (table.prefix, table.location, *(mirror.location for mirror in table.mirror)):
        if "://" in place:
            raise _bad(path, f"{place!r} must not have a scheme")
    for mirror in table.mirror:
        _check_mirror(path, table, mirror)
    mirrors = [
        msgspec.structs.replace(mirror, location=mirror.location.rstrip("/")) for mirror in table.mirror
    ]
    return msgspec.structs.replace(table, prefix=prefix, location=location, mirror=mirrors)


def _check_mirror(path: str, table: RegistryTable, mirror: MirrorTable) -> None:
    if not mirror.location:
        raise _bad(path, f"a mirror of {table.prefix or table.location!r} has no location")
    if mirror.pull_from_mirror not in PULL_FROM_MIRROR:
        raise _bad(path, f"pull-from-mirror is {mirror.pull_from_mirror!r}, not all, digest-only or tag-only")
    if table.mirror_by_digest_only and mirror.pull_from_mirror != "all":
        raise _bad(path, f"mirror-by-digest-only and pull-from-mirror are both set for {mirror.location!r}")


# -- files ------------------------------------------------------------------------------------------------


def read_file(path: str) -> FileTable:
    """Read one file. Raises RemoteError(FAILED_PRECONDITION) with its name, FileNotFoundError."""
    try:
        data = Path(path).read_bytes()
        if len(data) > MAX_FILE:
            raise _bad(path, f"{len(data)} bytes are too many")
        file = msgspec.convert(tomllib.loads(data.decode()), FileTable)
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise _bad(path, str(error)) from None
    if isinstance(file.registries, dict) and any(name in file.registries for name in _V1_SECTIONS):
        raise _bad(path, "it is in the old version 1 format; write [[registry]] tables (version 2)")
    if file.short_name_mode and file.short_name_mode not in SHORT_NAME_MODES:
        raise _bad(
            path, f"short-name-mode is {file.short_name_mode!r}, not disabled, permissive or enforcing"
        )
    return file


def _bad(path: str, why: str) -> RemoteError:
    return precondition(f"the registry configuration {path} is wrong: {why}")


#: What tells that a file changed: path, inode, size, time.
Stamp = tuple[tuple[str, int, int, int], ...]


class RegistriesFiles:
    """The configuration files, read again when one of them changed. Safe for threads."""

    def __init__(self, main: str, directory: str) -> None:
        self._main = main
        self._directory = directory
        self._lock = threading.Lock()
        self._stamp: Stamp | None = None
        self._current = Registries()

    def current(self) -> Registries:
        """The configuration as the files say now. Raises RemoteError(FAILED_PRECONDITION)."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                self._current = merge(self._read(stamp))
                self._stamp = stamp
            return self._current

    def reload(self) -> Registries:
        """Read the files whether they changed or not."""
        with self._lock:
            self._stamp = None
        return self.current()

    def _look(self) -> Stamp:
        paths = [self._main, *self._drop_ins()]
        return tuple(
            (path, status.st_ino, status.st_size, status.st_mtime_ns)
            for path in paths
            if path and (status := _stat(path)) is not None
        )

    def _drop_ins(self) -> list[str]:
        try:
            names = sorted(os.listdir(self._directory)) if self._directory else []
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _bad(self._directory, str(error)) from None
        return [os.path.join(self._directory, name) for name in names if name.endswith(".conf")]

    def _read(self, stamp: Stamp) -> Iterable[tuple[str, FileTable]]:
        for path, *_ in stamp:
            try:
                yield path, read_file(path)
            except FileNotFoundError:
                continue  # removed since we looked; the next look will tell


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _bad(path, str(error)) from None
