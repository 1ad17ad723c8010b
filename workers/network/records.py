"""Runs in: network and its children.

What stands on disk about each pod, `<run_root>/net/<pod_id>.json`: written before the first plugin runs and
removed after the last, so that whoever finds one can undo or finish what it tells of. Beside it, while an
operation runs, `<pod_id>.lock`, whose flock the operation's process and every plugin it started hold: what
survives a killed worker is found by it. It keeps nothing in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import time
from types import TracebackType
from typing import Any

import msgspec

from ipc import log
from ipc.errors import invalid, unavailable
from ipc.messages import Body
from workers.network.conflist import Network

ADDING, READY, REMOVING = "adding", "ready", "removing"
_POD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}\Z")
_SUFFIX = ".json"
_LOCK_WAIT = 10.0


class Record(Body, omit_defaults=False):
    """Everything that DEL needs, whatever has become of the configuration directory since.

    Written with every field, so that another release's defaults change nothing of what is recorded.
    """

    pod_id: str
    state: str = ADDING
    namespaces: dict[str, str] = {}  # path by name
    ifname: str = "eth0"
    network: Network | None = None  # None: host network
    args: str = ""
    runtime_config: dict[str, Any] = {}
    result: dict[str, Any] | None = None
    ips: list[str] = []
    boot_id: str = ""


def check_pod_id(pod_id: str) -> str:
    """Return the id; it names files, and CNI bounds its letters. Raises INVALID_ARGUMENT."""
    if not _POD_ID.match(pod_id):
        raise invalid(f"pod id {pod_id!r} is not made of letters, digits, '_', '.' and '-'")
    return pod_id


class Records:
    """The records of one directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def path(self, pod_id: str) -> str:
        """Path of a pod's record."""
        return os.path.join(self.directory, pod_id + _SUFFIX)

    def load(self, pod_id: str) -> Record | None:
        """Return a pod's record, None without one. One that cannot be read is set aside and logged."""
        path = self.path(pod_id)
        try:
            with open(path, "rb") as file:
                return msgspec.json.decode(file.read(), type=Record)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            log.get().error("network record damaged", pod=pod_id, path=path, why=error)
            os.replace(path, path + ".damaged")
            return None

    def save(self, record: Record) -> None:
        """Write a record whole or not at all, and surely. Raises OSError."""
        path = self.path(record.pod_id)
        temporary = path + ".new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)

    def remove(self, pod_id: str) -> None:
        """Forget a pod. No error if there is nothing."""
        for path in (self.path(pod_id), self.path(pod_id) + ".new"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def pods(self) -> list[str]:
        """Ids of every pod with a record."""
        with contextlib.suppress(FileNotFoundError):
            names = os.listdir(self.directory)
            return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
        return []

    def lock(self, pod_id: str) -> PodLock:
        """The lock of an operation on a pod, to be held as a context."""
        return PodLock(os.path.join(self.directory, pod_id + ".lock"))


class PodLock:
    """Held while an operation runs; `fd` is given to plugins, so it is held while any of them runs.

    The file goes when the operation ends in order: a daemon that a plugin left behind then holds nothing.
    If it is held on entry, a worker died during an operation and a process of that operation is still
    at work, unattended: it is killed before anything else happens to the pod.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1

    def __enter__(self) -> PodLock:
        deadline = time.monotonic() + _LOCK_WAIT
        while not self._try():
            if time.monotonic() >= deadline:
                raise unavailable(f"an earlier operation of this pod is still running ({self.path} is held)")
            time.sleep(0.01)
        return self

    def _try(self) -> bool:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            kill_holders(fd)
            os.close(fd)
            return False
        self.fd = fd
        return True

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        os.close(self.fd)


def kill_holders(fd: int) -> list[int]:
    """SIGKILL every other process that has the file of `fd` open; return their pids."""
    wanted = os.fstat(fd)
    holders = [
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and int(name) != os.getpid() and _holds(name, wanted)
    ]
    for pid in holders:
        log.get().warning("orphan of an interrupted network operation killed", pid=pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return holders


def _holds(pid: str, wanted: os.stat_result) -> bool:
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # it ended, or its descriptor closed, while we looked
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(f"{directory}/{name}"), wanted):
                    return True
    return False
