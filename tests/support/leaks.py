"""Runs in: the tests.

What a test may leave behind, and whether it did. A `Scope` says where to look (other tests work on the same
machine at the same time, so nothing is compared that the test does not name), `snapshot` writes down what
stands there, `Leaks` compares before and after and names every single thing that is new.

    with Leaks(Scope(mounts_under=(tmp,), directories=(tmp / "run" / "ns",), host_local=("testnet",))):
        ...
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType

HOST_LOCAL = Path("/var/lib/cni/networks")


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where to look; what is not named is not looked at."""

    #: mounts at or below these paths, pinned namespaces among them
    mounts_under: tuple[Path, ...] = ()
    #: every entry below these directories, by path
    directories: tuple[Path, ...] = ()
    #: every cgroup below these groups (paths relative to a hierarchy's root), in every hierarchy
    cgroup_parents: tuple[str, ...] = ()
    #: links of this process's network namespace with one of these prefixes ("" = all of them)
    interfaces: tuple[str, ...] = ()
    #: lines of iptables-save, ip6tables-save and `nft list ruleset` that contain one of these ("" = all)
    firewall: tuple[str, ...] = ()
    #: names of networks (or absolute directories) whose host-local addresses count
    host_local: tuple[str, ...] = ()
    #: every descendant of these processes, zombies too
    children_of: tuple[int, ...] = ()
    #: every process whose title (command line) contains one of these
    titles: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What stood in a scope. Each entry is a text that a person can look for."""

    mounts: frozenset[str] = field(default_factory=frozenset)
    entries: frozenset[str] = field(default_factory=frozenset)
    cgroups: frozenset[str] = field(default_factory=frozenset)
    interfaces: frozenset[str] = field(default_factory=frozenset)
    firewall: frozenset[str] = field(default_factory=frozenset)
    addresses: frozenset[str] = field(default_factory=frozenset)
    processes: frozenset[str] = field(default_factory=frozenset)

    def leaked_since(self, before: Snapshot) -> list[str]:
        """Return what is here and was not in `before`, as "kind: thing" lines."""
        lines: list[str] = []
        for kind in fields(self):
            new = getattr(self, kind.name) - getattr(before, kind.name)
            lines += [f"{kind.name}: {thing}" for thing in sorted(new)]
        return lines


def snapshot(scope: Scope) -> Snapshot:
    """Look at everything that `scope` names."""
    return Snapshot(
        mounts=frozenset(mounts(scope.mounts_under)),
        entries=frozenset(entries(scope.directories)),
        cgroups=frozenset(cgroups(scope.cgroup_parents)),
        interfaces=frozenset(interfaces(scope.interfaces)),
        firewall=frozenset(firewall(scope.firewall)),
        addresses=frozenset(host_local_addresses(scope.host_local)),
        processes=frozenset(processes(scope.children_of, scope.titles)),
    )


class Leaks:
    """Context manager: AssertionError with a list if something is left at the end.

    `settle` seconds are given to what ends by itself (processes that are being reaped, links that the kernel
    removes after their namespace). A failure of the test itself is not hidden.
    """

    def __init__(self, scope: Scope, *, settle: float = 5.0) -> None:
        self.scope = scope
        self.settle = settle
        self.before = Snapshot()

    def __enter__(self) -> Leaks:
        self.before = snapshot(self.scope)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.check()

    def check(self) -> None:
        """Compare now (within `settle`). Raises AssertionError naming each leaked thing."""
        deadline = time.monotonic() + self.settle
        while leaked := snapshot(self.scope).leaked_since(self.before):
            assert time.monotonic() < deadline, "left behind:\n  " + "\n  ".join(leaked)
            time.sleep(0.05)


def mounts(under: Iterable[Path], pid: int | str = "self") -> set[str]:
    """Mount points at or below the paths, with their type, in the mount namespace of `pid`."""
    roots = [os.path.realpath(path) for path in under]
    found: set[str] = set()
    for line in Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8").splitlines() if roots else ():
        words = line.split(" ")
        target = words[4].encode().decode("unicode_escape")
        if any(target == root or target.startswith(root + "/") for root in roots):
            found.add(f"{target} ({words[words.index('-') + 1]})")
    return found


def entries(directories: Iterable[Path]) -> set[str]:
    """Everything below the directories."""
    found: set[str] = set()
    for top in directories:
        for parent, names, files in os.walk(top):
            found.update(os.path.join(parent, name) for name in names + files)
    return found


def cgroup_roots() -> list[str]:
    """Mount points of every cgroup hierarchy, v1 and v2."""
    lines = [line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [words[4] for words in lines if words[words.index("-") + 1] in {"cgroup", "cgroup2"}]


def cgroups(parents: Iterable[str]) -> set[str]:
    """Groups at or below the parents, in every hierarchy."""
    found: set[str] = set()
    for parent in parents:
        for root in cgroup_roots():
            top = os.path.join(root, parent.lstrip("/"))
            found.update(directory for directory, _names, _files in os.walk(top))
    return found


def interfaces(prefixes: Iterable[str]) -> set[str]:
    """Names of links in this process's network namespace (read by netlink, for /sys may be another's)."""
    wanted = tuple(prefixes)
    return {name for _index, name in socket.if_nameindex() if wanted and name.startswith(wanted)}


def firewall(words: Iterable[str]) -> set[str]:
    """Rules and chains of iptables (both families) and nftables that contain one of the words."""
    wanted = tuple(words)
    found: set[str] = set()
    for tool in (["iptables-save"], ["ip6tables-save"], ["nft", "list", "ruleset"]) if wanted else ():
        if shutil.which(tool[0]) is None:
            continue
        text = subprocess.run(tool, capture_output=True, text=True, check=False).stdout
        for line in text.splitlines():
            if not line.startswith("#") and any(word in line for word in wanted):
                found.add(f"{tool[0]}: {_without_counters(line.strip())}")
    return found


def _without_counters(line: str) -> str:
    return line.split(" [", maxsplit=1)[0] if line.startswith(":") else line


def host_local_addresses(networks: Iterable[str]) -> set[str]:
    """Files of addresses that the host-local plugin holds for the networks (or in the directories)."""
    found: set[str] = set()
    for network in networks:
        directory = HOST_LOCAL / network  # an absolute path replaces the left side
        names = os.listdir(directory) if directory.is_dir() else []
        found.update(str(directory / name) for name in names if name[0] in "0123456789abcdef")
    return found


def processes(children_of: Iterable[int], titles: Iterable[str]) -> set[str]:
    """Descendants of the processes, and processes with such titles, as "pid title"."""
    table = _process_table()
    wanted = set(children_of)
    words = tuple(titles)
    found = {pid for pid, (_parent, title) in table.items() if any(word in title for word in words)}
    grown = True
    while grown:
        below = {pid for pid, (parent, _title) in table.items() if parent in wanted} - wanted
        grown = bool(below)
        wanted |= below
        found |= below
    return {f"{pid} {table[pid][1]}" for pid in found - {os.getpid()}}


def _process_table() -> dict[int, tuple[int, str]]:
    table = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            stat = Path(f"/proc/{name}/stat").read_bytes().decode(errors="replace")
            title = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        head, _, tail = stat.rpartition(") ")
        table[int(name)] = (int(tail.split()[1]), title.strip() or head.partition("(")[2])
    return table
