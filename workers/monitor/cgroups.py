"""Runs in: the monitor.

The container's control groups, v1, v2 and both: who is in them, killing all of them, thawing, and removing
what the runtime left. It refuses to touch a group that is not the container's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

MOUNT = "/sys/fs/cgroup"
_CPU_QUOTA = "cpu.cfs_quota_us"


def parse(text: str) -> dict[str, str]:
    """Read a /proc/PID/cgroup: controllers as written ("cpu,cpuacct", "name=systemd", "" for v2) -> path."""
    rows = (line.split(":", 2) for line in text.splitlines())
    return {row[1]: row[2] for row in rows if len(row) == 3}


def own_path(actual: str, given: str, container_id: str) -> str:
    """Return the path of the container's own group, "" if `actual` is not below such.

    `given` is what was asked for; the runtime may have put the process into a group below it. Without it
    only a group named after the container counts.
    """
    wanted = "/" + given.strip("/")
    if given and wanted != "/" and (actual + "/").startswith(wanted + "/"):
        return wanted
    return actual if container_id in os.path.basename(actual) else ""


def directory(controllers: str, path: str, mount: str = MOUNT) -> str:
    """Return where a hierarchy's group is mounted."""
    if controllers:
        return f"{mount}/{controllers.removeprefix('name=')}{path}"
    hybrid = f"{mount}/unified"
    return f"{hybrid if os.path.exists(f'{hybrid}/cgroup.controllers') else mount}{path}"


class Cgroups:
    """The groups of one container. All methods suffer groups that are gone."""

    def __init__(self, directories: dict[str, str]) -> None:
        self._directories = directories

    @property
    def directories(self) -> dict[str, str]:
        """Controllers -> directory, as the constructor has them."""
        return self._directories

    @classmethod
    def of_process(cls, pid: int, given: str, container_id: str) -> Cgroups:
        """Find the groups by the container's init. None are found when it is gone."""
        try:
            with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
                rows = parse(file.read())
        except OSError:
            rows = {}
        own = {name: own_path(path, given, container_id) for name, path in rows.items()}
        return cls({name: directory(name, path) for name, path in own.items() if path})

    @classmethod
    def of_path(cls, given: str, container_id: str, mount: str = MOUNT) -> Cgroups:
        """Find the groups of a container that never came to be, in every hierarchy."""
        path = f"/{given.strip('/')}"
        if container_id not in os.path.basename(path):
            return cls({})
        roots = [mount, *(f"{mount}/{name}" for name in os.listdir(mount))]
        return cls({root: f"{root}{path}" for root in roots if os.path.isdir(f"{root}{path}")})

    @property
    def memory(self) -> str:
        """Directory that counts memory, "" if there is none."""
        return self._of("memory")

    def _of(self, controller: str) -> str:
        for name, path in self._directories.items():
            if controller in name.split(","):
                return path
        unified = self._directories.get("", "")
        return unified if len(self._directories) == 1 else ""

    def memory_in_use(self) -> int:
        """Bytes that the kernel cannot simply take back: usage without inactive files; 0 if unknown."""
        base = self.memory
        usage = _number(f"{base}/memory.current") or _number(f"{base}/memory.usage_in_bytes")
        return max(0, usage - (_field(f"{base}/memory.stat", ("total_inactive_file", "inactive_file"))))

    def has_cpu_quota(self) -> bool:
        """Whether there is a CPU quota in the spelling of v1."""
        return os.path.exists(f"{self._of('cpu')}/{_CPU_QUOTA}")

    def unlimit_cpu(self) -> None:
        """Take the CPU quota of v1 away."""
        _write(f"{self._of('cpu')}/{_CPU_QUOTA}", "-1")

    def limit_hugepages(self, page_size: str, limit: int) -> bool:
        """Set the limit of one page size ("2MB"). False if it could not be."""
        base = self._of("hugetlb")
        files = (f"hugetlb.{page_size}.max", f"hugetlb.{page_size}.limit_in_bytes")
        return bool(base) and any(_write(f"{base}/{name}", str(limit)) for name in files)

    @property
    def _tracking(self) -> str:
        """Directory by which processes are told."""
        return self._of("freezer") or self._of("pids") or next(iter(self._directories.values()), "")

    def pids(self) -> list[int]:
        """Return every process in the container's groups."""
        return [pid for path in _tree(self._tracking) for pid in _pids(path)]

    def known(self) -> bool:
        """False if the container has no group of its own that we could find."""
        return bool(self._directories)

    def freeze(self, frozen: bool) -> None:
        """Freeze or thaw the container, whoever froze it."""
        for path in _tree(self._tracking):
            if os.path.exists(f"{path}/freezer.state"):
                _write(f"{path}/freezer.state", "FROZEN" if frozen else "THAWED")
            else:
                _write(f"{path}/cgroup.freeze", "1" if frozen else "0")

    def kill(self) -> int:
        """SIGKILL every process; return how many there were. Call again until it returns 0."""
        pids = [pid for pid in self.pids() if pid != os.getpid()]
        if not pids:
            return 0
        if not _write(f"{self._directories.get('', '')}/cgroup.kill", "1"):
            self.freeze(True)
            pids = [pid for pid in self.pids() if pid != os.getpid()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.freeze(False)  # a frozen process of v1 dies only when it is thawed
        return len(pids)

    def clear(self) -> bool:
        """SIGKILL whatever is in any of the groups, remove them. True if none is left; else call again."""
        for root in self._directories.values():
            for pid in [pid for path in _tree(root) for pid in _pids(path)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.remove()
        return not any(os.path.isdir(root) for root in self._directories.values())

    def remove(self) -> None:
        """Remove the groups that are empty."""
        for root in self._directories.values():
            for path in reversed(list(_tree(root))):
                with contextlib.suppress(OSError):
                    os.rmdir(path)


def _tree(root: str) -> Iterator[str]:
    """A group and then those below it; nothing if it is not there."""
    if not root:
        return
    try:
        below = [entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    yield root
    for path in below:
        yield from _tree(path)


def _pids(path: str) -> list[int]:
    try:
        with open(f"{path}/cgroup.procs", "rb") as file:
            return [int(pid) for pid in file.read().split() if pid != b"0"]
    except OSError:
        return []


def _number(path: str) -> int:
    try:
        with open(path, "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _field(path: str, names: tuple[str, ...]) -> int:
    """The first of the named fields of a flat keyed file, 0 without one."""
    try:
        with open(path, encoding="ascii") as file:
            fields = dict(line.split(" ", 1) for line in file.read().splitlines())
    except (OSError, ValueError):
        return 0
    return next((int(fields[name]) for name in names if name in fields), 0)


def _write(path: str, value: str) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, value.encode())
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
