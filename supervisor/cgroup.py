"""Runs in: the supervisor.

The groups of one instance, on cgroup v1 (also hybrid hosts) and v2: one per kind of worker with its limits,
one that all monitors share, leaves for pod inits below the pod's own parent. It owns `<base>/<kind>`,
`/<instance>.monitors` and `/<instance>.pods`; it never touches a group that it did not name.

Monitors stand beside the workers' base, never in it: under systemd the base is the unit's own subtree, which
the manager empties with the unit, and no worker's limit may hit a container. They have no limit of their
own, because the OCI runtime forks the container's first process there.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from supervisor.table import Limits

DEFAULT_RUN_ROOT = "/run/bulkhead"
CONTROLLERS = ("memory", "pids", "cpu")
#: Which mount options of a v1 hierarchy are controllers.
V1_CONTROLLERS = frozenset(
    {
        *CONTROLLERS,
        *("cpuacct", "cpuset", "devices", "freezer", "blkio", "hugetlb"),
        *("net_cls", "net_prio", "perf_event", "rdma", "misc"),
    }
)
_KILL_WAIT = 2.0  # seconds for killed processes of a stale group to go


@dataclass(frozen=True)
class Hierarchies:
    """What is mounted. v1: controller -> mount point, of all controllers; v2: {"": mount point}."""

    version: int
    mounts: Mapping[str, str]
    controllers: tuple[str, ...]
    #: Every cgroup mount point, name=systemd and a hybrid host's v2 too: OCI runtimes make groups in all.
    everywhere: tuple[str, ...] = ()

    def roots(self) -> list[str]:
        """Mount points that our groups are made in, each once."""
        if self.version == 2:
            return list(self.mounts.values())
        return list(dict.fromkeys(self.mounts[name] for name in CONTROLLERS if name in self.mounts))


def detect(mounts: str | None = None) -> Hierarchies:
    """Read the mount table (its text may be given). A v2 mount without the memory controller counts as v1."""
    if mounts is None:
        with open("/proc/self/mounts", encoding="utf-8") as file:
            mounts = file.read()
    v1: dict[str, str] = {}
    v2 = ""
    everywhere: list[str] = []
    for fields in (line.split() for line in mounts.splitlines()):
        if fields[2] in {"cgroup", "cgroup2"}:
            everywhere.append(fields[1])
        if fields[2] == "cgroup2":
            v2 = v2 or fields[1]
        elif fields[2] == "cgroup":
            for option in fields[3].split(","):
                v1.setdefault(option, fields[1])
    found = _read(f"{v2}/cgroup.controllers").split() if v2 else []
    if "memory" in found or not v1:
        return Hierarchies(2, {"": v2} if v2 else {}, tuple(found), tuple(everywhere))
    controllers = {name: mount for name, mount in v1.items() if name in V1_CONTROLLERS}
    return Hierarchies(1, controllers, tuple(sorted(controllers)), tuple(everywhere))


def instance_name(run_root: str) -> str:
    """Return the name that one instance's groups bear."""
    if run_root == DEFAULT_RUN_ROOT:
        return "bulkhead"
    return f"bulkhead-{binascii.crc32(run_root.encode()):08x}"


def slice_path(name: str) -> str:
    """Return the path of a systemd slice: a-b.slice lies in a.slice (systemd.slice(5))."""
    parts = name.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(parts[: n + 1])}.slice" for n in range(len(parts)))


def parent_path(cgroup_parent: str) -> str:
    """Return the path of a CRI cgroup_parent: a slice's name or a cgroupfs path; a whole path is itself.

    Raises ValueError for one that leads elsewhere.
    """
    if ".." in cgroup_parent.split("/") or "\0" in cgroup_parent:
        raise ValueError(f"cgroup parent {cgroup_parent!r} leads elsewhere")
    last = cgroup_parent.rstrip("/")
    return slice_path(last) if last.endswith(".slice") and "/" not in last else "/" + cgroup_parent.strip("/")


class Groups:
    """One instance's groups. Paths are relative to the mount points and begin with a slash."""

    def __init__(self, hierarchies: Hierarchies, instance: str, base: str = "") -> None:
        self.hierarchies = hierarchies
        self.base = base or f"/{instance}"
        self.monitors = f"/{instance}.monitors"
        self.pods = f"/{instance}.pods"
        #: What could not be done, a sentence each.
        self.degraded: list[str] = []

    def worker(self, kind: str) -> str:
        """The group of a kind of worker."""
        return f"{self.base}/{kind}"

    def _directories(self, path: str) -> Iterator[str]:
        for root in self.hierarchies.roots():
            yield root + path

    # -- making ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the base and let its children have limits (v2); stand aside from it if it is our own group."""
        self.make(self.base)
        if self.hierarchies.version != 2:
            return
        root = next(iter(self.hierarchies.roots()), None)
        if root is None:
            self.degraded.append("no cgroup hierarchy is mounted: workers have no limits")
            return
        if own_group() == self.base:
            self.make(f"{self.base}/supervisor")
            self.enter(f"{self.base}/supervisor", os.getpid())
        wanted = [name for name in CONTROLLERS if name in self.hierarchies.controllers]
        parents = [root + self.base] if self.base.count("/") > 1 else [root, root + self.base]
        for directory in parents:
            self._write(f"{directory}/cgroup.subtree_control", " ".join(f"+{name}" for name in wanted))

    def make(self, path: str, limits: Limits | None = None) -> None:
        """Make a group, and set its limits. Lacks are noted in `degraded`."""
        for directory in self._directories(path):
            try:
                os.makedirs(directory, exist_ok=True)
            except OSError as error:
                self._lack(f"cannot make cgroup {directory}: {error.strerror}")
        if limits is not None:
            self._limit(path, limits)

    def _limit(self, path: str, limits: Limits) -> None:
        for controller, name, value in self._settings(limits):
            mounts = self.hierarchies.mounts
            root = mounts.get("" if self.hierarchies.version == 2 else controller)
            if root is None or controller not in self.hierarchies.controllers:
                self._lack(f"cgroup controller {controller} is missing: its limits are not set")
            else:
                self._write(f"{root}{path}/{name}", str(value))

    def _settings(self, limits: Limits) -> Iterator[tuple[str, str, int]]:
        if self.hierarchies.version == 2:
            yield "memory", "memory.max", limits.memory
            yield "cpu", "cpu.weight", limits.cpu_weight
        else:
            yield "memory", "memory.limit_in_bytes", limits.memory
            yield "cpu", "cpu.shares", limits.cpu_weight * 1024 // 100
        yield "pids", "pids.max", limits.pids

    def enter(self, path: str, pid: int) -> None:
        """Put a process into a group. Raises ProcessLookupError if it is gone; other lacks are noted."""
        for directory in self._directories(path):
            try:
                with open(f"{directory}/cgroup.procs", "w", encoding="ascii") as file:
                    file.write(str(pid))
            except ProcessLookupError:
                raise
            except OSError as error:
                self._lack(f"cannot enter cgroup {directory}: {error.strerror}")

    def open(self, path: str) -> int:
        """A descriptor of the list of processes of a group, to move some into it; -1 if there is none."""
        for directory in self._directories(path):
            with contextlib.suppress(OSError):
                return os.open(f"{directory}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        return -1

    def _write(self, path: str, text: str) -> None:
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(text)
        except OSError as error:
            self._lack(f"cannot write {text!r} to {path}: {error.strerror}")

    def _lack(self, sentence: str) -> None:
        if sentence not in self.degraded:
            self.degraded.append(sentence)

    # -- looking and clearing -------------------------------------------------------------------------

    def pids(self, path: str) -> set[int]:
        """Every process in a group (not in groups below it)."""
        return {
            int(word)
            for directory in self._directories(path)
            for word in _read(f"{directory}/cgroup.procs").split()
        }

    def oom_kills(self, path: str) -> int:
        """How many processes of a group the kernel has killed because memory was short."""
        v2 = self.hierarchies.version == 2
        root = self.hierarchies.mounts.get("" if v2 else "memory", "")
        text = _read(f"{root}{path}/{'memory.events' if v2 else 'memory.oom_control'}") if root else ""
        return int(dict(line.split(" ", 1) for line in text.splitlines()).get("oom_kill", "0"))

    def remove(self, path: str) -> bool:
        """Remove a group and empty groups below it. Returns False if something is left."""
        removed = [_remove_tree(directory) for directory in self._directories(path)]  # each is tried
        return all(removed)

    def clear(self, path: str, spare: Collection[int] = ()) -> bool:
        """Kill everything in a group but `spare` and remove it; for groups that only our own processes can be
        in. Returns False if something is left."""
        until = time.monotonic() + _KILL_WAIT
        while True:
            condemned = self.pids(path) - {os.getpid(), *spare}
            for pid in condemned:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.remove(path) or (spare and not condemned) or time.monotonic() > until:
                return not any(os.path.isdir(directory) for directory in self._directories(path))
            time.sleep(0.01)

    def sweep(self, kinds: Mapping[str, Collection[int]]) -> list[str]:
        """Clear the workers' groups that a supervisor before us left; returns those that stay.

        `kinds`: which processes of each kind are left alone.
        """
        return [kind for kind, spare in kinds.items() if not self.clear(self.worker(kind), spare)]

    def release(self, kinds: Iterable[str], spare: Collection[int] = ()) -> None:
        """At the end: remove every group that is empty. Monitors and pods keep theirs.

        What a worker leaves dies with it, but not at once: that is waited for, but not for those in `spare`.
        """
        until = time.monotonic() + _KILL_WAIT
        for path in (self.worker(kind) for kind in kinds):
            while not self.remove(path) and time.monotonic() < until and not self.pids(path) & {*spare}:
                time.sleep(0.01)
        self.remove(self.monitors)
        for mount in self.hierarchies.everywhere:
            _remove_tree(mount + self.pods)
        if own_group() != f"{self.base}/supervisor":
            self.remove(self.base)


def own_group(text: str | None = None) -> str:
    """Return the group of this process on v2 (or of the v2 mount of a hybrid host)."""
    for line in (text if text is not None else _read("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            return line[3:]
    return "/"


def delegated_base(hierarchies: Hierarchies) -> str:
    """Return our own group if the service manager delegated it to us (v2, Delegate=yes), else ""."""
    if hierarchies.version != 2 or not hierarchies.mounts:
        return ""
    own = own_group()
    # DelegateSubgroup=supervisor (systemd 254) starts us one level deeper.
    for path in (own, own.rsplit("/", 1)[0] if own.endswith("/supervisor") else ""):
        if path not in {"", "/"} and _is_delegated(hierarchies.mounts[""] + path):
            return path
    return ""


def _is_delegated(directory: str) -> bool:
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            return os.getxattr(directory, name) == b"1"
    return False


def _remove_tree(directory: str) -> bool:
    """Remove a group's directory, deepest first. True if it is gone."""
    for current, _, _ in os.walk(directory, topdown=False):
        try:
            os.rmdir(current)
        except OSError as error:
            if error.errno != errno.ENOENT:
                return False
    return True


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""
