"""Runs in: network.

The directory of CNI configurations: which network is the node's, read again when something in it changed.
The first usable file in lexical order wins, or the one that bears the configured name. What could not be
used is named, file by file. It owns nothing and writes nothing.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

from workers.network.conflist import ConfigError, Network, parse

SUFFIXES = (".conflist", ".conf", ".json")
FILE_LIMIT = 1024 * 1024

#: What tells that a file is another than before: name, inode, size, time of change.
Mark = tuple[str, int, int, int]


@dataclass(frozen=True)
class Selection:
    """The network in use, or a sentence why there is none."""

    network: Network | None
    message: str = ""
    problems: list[str] = field(default_factory=list)


class ConfDir:
    """Reads a directory at most once per change."""

    def __init__(self, directory: str, default_network: str = "") -> None:
        self.directory = directory
        self.default_network = default_network
        self._marks: list[Mark] | None = None
        self._selection = Selection(None)

    def current(self) -> Selection:
        """Return the selection; looks whether the files are the same, which costs a stat each."""
        marks = self._look()
        if marks != self._marks or self._marks is None:
            self._selection = self._select([name for name, *_rest in marks])
            self._marks = marks
        return self._selection

    def _look(self) -> list[Mark]:
        marks = []
        for name in self._names():
            try:
                info = os.stat(os.path.join(self.directory, name))
            except OSError:
                continue  # a link to nothing, or removed since it was listed
            marks.append((name, info.st_ino, info.st_size, info.st_mtime_ns))
        return marks

    def _names(self) -> list[str]:
        try:
            names = os.listdir(self.directory)
        except OSError:
            return []
        return sorted(name for name in names if name.endswith(SUFFIXES))

    def _select(self, names: list[str]) -> Selection:
        problems = []
        for name in names:
            path = os.path.join(self.directory, name)
            try:
                network = parse(_read(path), path=path)
            except ConfigError as error:
                problems.append(f"{path}: {error}")
                continue
            if self.default_network in {"", network.name}:
                return Selection(network, problems=problems)
        return Selection(None, self._none(names, problems), problems)

    def _none(self, names: list[str], problems: list[str]) -> str:
        wanted = f'no CNI network "{self.default_network}"' if self.default_network else "no CNI network"
        if problems:
            return f"{wanted} in {self.directory}: {'; '.join(problems)}"
        if names:
            return f"{wanted} in {self.directory}: {', '.join(names)} bear other names"
        why = f"no file with {', '.join(SUFFIXES)}" if os.path.isdir(self.directory) else "no such directory"
        return f"{wanted} in {self.directory}: {why}"


def _read(path: str) -> bytes:
    try:
        return _read_regular(path)
    except OSError as error:
        raise ConfigError(error.strerror or str(error)) from None


def _read_regular(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for its writer
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError("not a regular file")
        data = os.read(fd, FILE_LIMIT + 1)
    finally:
        os.close(fd)
    if len(data) > FILE_LIMIT:
        raise ConfigError(f"larger than {FILE_LIMIT} bytes")
    return data
