"""Runs in: cri. Reading cgroups, v1 and v2 (cgroup-v1/*.rst, cgroup-v2.rst in the kernel's documentation).

A group is named by its path below each hierarchy's root. What is not there (no controller, no such group, an
older kernel) is None, never zero. On v1 the hierarchical ("total_") figures are taken, as v2 has no others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MOUNT = "/sys/fs/cgroup"
_LARGEST = 65536  # bytes of one file that are read
_NO_LIMIT = 1 << 62  # v1 writes the largest multiple of a page for "none"


@dataclass(slots=True)
class Pressure:
    """One line of a pressure file: microseconds in all, and percent of the last 10, 60 and 300 s."""

    total: int
    avg10: float
    avg60: float
    avg300: float


@dataclass(slots=True)
class Psi:
    """A pressure file (psi.rst). There is no `full` of a whole machine's CPU on older kernels."""

    some: Pressure | None = None
    full: Pressure | None = None


@dataclass(slots=True)
class Memory:
    """Memory of a group, in bytes and counts."""

    usage: int
    working_set: int
    rss: int
    cache: int
    faults: int
    major_faults: int
    swap: int | None
    mapped: int
    kernel: int | None
    limit: int | None  # None: there is none
    swap_limit: int | None


@dataclass(slots=True)
class Io:
    """Bytes and operations of one block device."""

    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0


@dataclass(slots=True)
class Cpu:
    """CPU time in ns, and how often and for how long (ns) a quota held the group back."""

    usage: int
    user: int
    system: int
    periods: int = 0
    throttled: int = 0
    throttled_time: int = 0


def read(path: str) -> bytes:
    """The content of a small file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _LARGEST)
    finally:
        os.close(fd)


def number(path: str) -> int | None:
    """A file with one number; None if it is absent, or says "max"."""
    try:
        return int(read(path))
    except (OSError, ValueError):
        return None


def table(path: str) -> dict[bytes, int]:
    """A file of lines "key number"; empty if absent."""
    try:
        words = read(path).split()
        return dict(zip(words[::2], map(int, words[1::2]), strict=False))
    except (OSError, ValueError):
        return {}


def psi(path: str) -> Psi | None:
    """A pressure file; None where the kernel has none or was started without them."""
    try:
        lines = read(path).splitlines()
    except OSError:
        return None
    found = Psi()
    for line in lines:
        kind, *words = line.split()
        values = dict(word.split(b"=") for word in words)
        pressure = Pressure(
            int(values[b"total"]),
            float(values[b"avg10"]),
            float(values[b"avg60"]),
            float(values[b"avg300"]),
        )
        if kind == b"some":
            found.some = pressure
        else:
            found.full = pressure
    return found


class Cgroups:
    """The hierarchies of this host."""

    def __init__(self, mount: str = MOUNT) -> None:
        self.v2 = os.path.exists(f"{mount}/cgroup.controllers")
        self._mount = mount
        self._roots = {} if self.v2 else _v1_roots(mount)

    def _dir(self, controller: str, group: str) -> str:
        if self.v2:
            return f"{self._mount}{group}"
        return f"{self._roots.get(controller, f'{self._mount}/{controller}')}{group}"

    # -- what stats tell ------------------------------------------------------------------------------

    def cpu_usage(self, group: str) -> int | None:
        """CPU time of a group in ns."""
        if not self.v2:
            return number(f"{self._dir('cpuacct', group)}/cpuacct.usage")
        usage = table(f"{self._mount}{group}/cpu.stat").get(b"usage_usec")
        return None if usage is None else usage * 1000

    def memory(self, group: str) -> Memory | None:
        """Memory of a group."""
        return self._memory_v2(group) if self.v2 else self._memory_v1(group)

    def _memory_v2(self, group: str) -> Memory | None:
        base = f"{self._mount}{group}"
        usage, stat = number(f"{base}/memory.current"), table(f"{base}/memory.stat")
        if usage is None or not stat:
            return None
        return Memory(
            usage=usage,
            working_set=max(0, usage - stat.get(b"inactive_file", 0)),
            rss=stat.get(b"anon", 0),
            cache=stat.get(b"file", 0),
            faults=stat.get(b"pgfault", 0),
            major_faults=stat.get(b"pgmajfault", 0),
            swap=number(f"{base}/memory.swap.current"),
            mapped=stat.get(b"file_mapped", 0),
            kernel=stat.get(b"kernel", _kernel_parts(stat)),
            limit=number(f"{base}/memory.max"),
            swap_limit=number(f"{base}/memory.swap.max"),
        )

    def _memory_v1(self, group: str) -> Memory | None:
        base = self._dir("memory", group)
        usage, stat = number(f"{base}/memory.usage_in_bytes"), table(f"{base}/memory.stat")
        if usage is None or not stat:
            return None
        limit = _limited(number(f"{base}/memory.limit_in_bytes"))
        both = _limited(number(f"{base}/memory.memsw.limit_in_bytes"))
        return Memory(
            usage=usage,
            working_set=max(0, usage - stat.get(b"total_inactive_file", 0)),
            rss=stat.get(b"total_rss", 0),
            cache=stat.get(b"total_cache", 0),
            faults=stat.get(b"total_pgfault", 0),
            major_faults=stat.get(b"total_pgmajfault", 0),
            swap=stat.get(b"total_swap"),
            mapped=stat.get(b"total_mapped_file", 0),
            kernel=number(f"{base}/memory.kmem.usage_in_bytes"),
            limit=limit,
            swap_limit=None if both is None or limit is None else max(0, both - limit),
        )

    def pressure(self, group: str, resource: str) -> Psi | None:
        """PSI of "cpu", "memory" or "io"; v1 has none of groups."""
        return psi(f"{self._mount}{group}/{resource}.pressure") if self.v2 else None

    def tasks(self, group: str) -> int | None:
        """Tasks of a group and those below it."""
        return number(f"{self._dir('pids', group)}/pids.current")

    # -- what only metrics tell -----------------------------------------------------------------------

    def oom_kills(self, group: str) -> int | None:
        """How many processes of the group the kernel killed for its memory."""
        if self.v2:
            return table(f"{self._mount}{group}/memory.events").get(b"oom_kill")
        return table(f"{self._dir('memory', group)}/memory.oom_control").get(b"oom_kill")

    def cpu(self, group: str) -> Cpu | None:
        """CPU time and what a quota did."""
        stat = table(f"{self._dir('cpu', group)}/cpu.stat")
        usage = self.cpu_usage(group)
        if usage is None:
            return None
        periods, throttled = stat.get(b"nr_periods", 0), stat.get(b"nr_throttled", 0)
        if self.v2:
            user, system = stat.get(b"user_usec", 0) * 1000, stat.get(b"system_usec", 0) * 1000
            return Cpu(usage, user, system, periods, throttled, stat.get(b"throttled_usec", 0) * 1000)
        base = self._dir("cpuacct", group)
        user, system = number(f"{base}/cpuacct.usage_user") or 0, number(f"{base}/cpuacct.usage_sys") or 0
        return Cpu(usage, user, system, periods, throttled, stat.get(b"throttled_time", 0))

    def memory_extremes(self, group: str) -> tuple[int | None, int | None]:
        """How often the limit was hit, and the most that was ever used (v2 from Linux 5.19 on)."""
        base = self._dir("memory", group)
        if self.v2:
            return table(f"{base}/memory.events").get(b"max"), number(f"{base}/memory.peak")
        return number(f"{base}/memory.failcnt"), number(f"{base}/memory.max_usage_in_bytes")

    def io(self, group: str) -> dict[str, Io]:
        """What was read and written, by "major:minor" of the device."""
        return _io_v2(f"{self._mount}{group}/io.stat") if self.v2 else _io_v1(self._dir("blkio", group))

    def processes(self, group: str) -> list[int] | None:
        """Pids of the processes of the group itself."""
        return _pids(f"{self._dir('pids', group)}/cgroup.procs")

    def tasks_limit(self, group: str) -> int | None:
        """Most tasks that the group may have; None for no limit."""
        return number(f"{self._dir('pids', group)}/pids.max")

    def huge_pages(self, group: str) -> dict[str, tuple[int, int | None]]:
        """Bytes of huge pages in use, and the most there ever were (v1 only), by page size."""
        base = self._dir("hugetlb", group)
        end = ".current" if self.v2 else ".usage_in_bytes"
        found = {}
        with contextlib.suppress(OSError):
            for name in os.listdir(base):
                size = name.removeprefix("hugetlb.").removesuffix(end)
                if name == f"hugetlb.{size}{end}" and ".rsvd" not in size:
                    most = number(f"{base}/hugetlb.{size}.max_usage_in_bytes")
                    found[size] = (number(f"{base}/{name}") or 0, most)
        return found


def _v1_roots(mount: str) -> dict[str, str]:
    """Where each controller is: "cpu,cpuacct" holds two of them."""
    try:
        names = os.listdir(mount)
    except OSError:
        return {}
    return {controller: f"{mount}/{name}" for name in sorted(names) for controller in name.split(",")}


def _limited(value: int | None) -> int | None:
    return None if value is None or value >= _NO_LIMIT else value


def _kernel_parts(stat: Mapping[bytes, int]) -> int:
    """The sum of what a kernel before 5.18 tells of its own memory."""
    return sum(stat.get(key, 0) for key in (b"kernel_stack", b"pagetables", b"percpu", b"slab", b"sock"))


def _pids(path: str) -> list[int] | None:
    try:
        return [int(word) for word in read(path).split(b"\n") if word]
    except (OSError, ValueError):  # ValueError: the buffer ended within a number
        return None


def _io_v2(path: str) -> dict[str, Io]:
    found: dict[str, Io] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in read(path).decode("ascii").splitlines():
            device, *words = line.split()
            values = dict(word.split("=") for word in words if "=" in word)
            if values:
                got = [int(values.get(key, 0)) for key in ("rbytes", "wbytes", "rios", "wios")]
                found[device] = Io(*got)
    return found


def _io_v1(base: str) -> dict[str, Io]:
    found: dict[str, Io] = {}

    def add(file: str, read_field: str, write_field: str) -> None:
        for path in (f"{base}/{file}_recursive", f"{base}/{file}"):
            with contextlib.suppress(OSError):
                _each_v1(read(path), lambda io, n: setattr(io, read_field, n), b"Read", found)
                _each_v1(read(path), lambda io, n: setattr(io, write_field, n), b"Write", found)
                return

    add("blkio.throttle.io_service_bytes", "read_bytes", "written_bytes")
    add("blkio.throttle.io_serviced", "reads", "writes")
    return found


def _each_v1(text: bytes, take: Callable[[Io, int], None], operation: bytes, found: dict[str, Io]) -> None:
    """Lines "major:minor Read number"."""
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[1] == operation:
            take(found.setdefault(words[0].decode("ascii"), Io()), int(words[2]))
