"""Runs in: the supervisor.

What must stand before anybody is forked: the directories with their owners, the locks that make an instance
the only one, and a run root that belongs to this boot. It owns the layout of `<run_root>`; what other
processes keep in their directories is theirs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Mapping

from supervisor.config import Config
from supervisor.files import remove_tree
from supervisor.hostinfo import boot_id
from supervisor.sandbox.spec import Identity
from supervisor.settings import bind_directory

#: Below run_root; what a supervisor of an earlier boot left there says nothing any more.
OF_THIS_BOOT = ("ipc", "monitors", "inits", "draining", "tally", "parents.json")


class InstanceRunning(Exception):
    """Another supervisor holds the lock."""


class Locks:
    """The locks on root and run_root, held until the process ends."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def take(self, directory: str) -> None:
        """Take a directory's lock. Raises InstanceRunning, OSError."""
        path = f"{directory}/lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise InstanceRunning(
                f"another instance runs on {directory} (pid {holder or 'unknown'})"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fds.append(fd)

    def inherit(self, fds: list[int]) -> None:
        """Hold what the program before this one held."""
        self._fds += fds

    @property
    def descriptors(self) -> list[int]:
        """What holds them."""
        return list(self._fds)

    def release(self) -> None:
        """Let go, at the very end."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def make(path: str, mode: int, uid: int = 0, gid: int = 0) -> None:
    """Make a directory, or give the one that stands there its mode and owner. Raises OSError."""
    os.makedirs(path, mode=0o755, exist_ok=True)
    os.chown(path, uid, gid, follow_symlinks=False)
    os.chmod(path, mode)


def prepare_roots(config: Config) -> None:
    """Make root and run_root, nothing below. Raises OSError."""
    for path in (config.root, config.run_root):
        make(path, 0o711)


def prepare(config: Config, who: Mapping[str, Identity], *, in_use: bool = False) -> bool:
    """Make the layout of run_root. Returns True if it was left by an earlier boot. Raises OSError.

    `in_use`: by workers that go on; their sockets stay.
    """
    run_root = config.run_root
    rebooted = _new_boot(run_root)
    cri = who.get("cri", Identity(0, 0))
    for name, mode in (("ipc", 0o711), ("ns", 0o711), ("pods", 0o711), ("containers", 0o711)):
        make(f"{run_root}/{name}", mode)
    for name in ("inits", "draining", "tally", "net", "runtimes"):
        make(f"{run_root}/{name}", 0o700)
    make(f"{run_root}/monitors", 0o750, 0, cri.gid)
    make(f"{run_root}/cri", 0o700, cri.uid, cri.gid)
    os.makedirs(os.path.dirname(config.listen), mode=0o755, exist_ok=True)
    make(bind_directory(config), 0o700, cri.uid, cri.gid)
    if not in_use:
        _clean_sockets(f"{run_root}/ipc")
        empty(bind_directory(config))
    return rebooted


def _new_boot(run_root: str) -> bool:
    """Forget what an earlier boot left of ours, if run_root is no tmpfs."""
    path = f"{run_root}/boot_id"
    now = boot_id()
    before = ""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
        before = file.read().strip()
    if before != now:
        for name in OF_THIS_BOOT:
            remove_tree(f"{run_root}/{name}")
        with open(path, "w", encoding="ascii") as file:
            file.write(now + "\n")
    return before not in {"", now}


def _clean_sockets(directory: str) -> None:
    for name in os.listdir(directory):
        os.unlink(f"{directory}/{name}")


def empty(directory: str) -> None:
    """Remove the files of a directory (cri's bind directory, before a new cri)."""
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")
