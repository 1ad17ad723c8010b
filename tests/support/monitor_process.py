"""Runs in: the tests and benchmarks of the monitor (as root).

A monitor forked as the supervisor forks it: its directory, its lock, its socket, everything loaded before. At
the end of the context nothing of its container may be left: no process, group, runtime state.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ipc import vault
from ipc.blocking import Client
from ipc.log import Log
from ipc.messages import monitor as messages
from ipc.messages.monitor import ExitRecord
from ipc.settings import MonitorSettings
from workers.monitor import main as monitor_main

RUNTIMES = ("crun", "runc")
APPLETS = (
    "sh",
    "cat",
    "ls",
    "sleep",
    "true",
    "false",
    "dd",
    "yes",
    "kill",
    "setsid",
    "stty",
    "head",
    "nohup",
    "seq",
)
TIMEOUT = 30.0
CGROUP_MOUNT = Path("/sys/fs/cgroup")


@dataclass
class MonitorContext:
    """The part of a worker's context that a monitor uses."""

    settings: MonitorSettings
    log: Log = field(default_factory=lambda: Log("monitor", level="debug"))


def busybox_root(directory: Path) -> Path:
    """Make a root file system of busybox-static alone, return it."""
    for name in ("bin", "proc", "dev", "sys", "tmp"):
        (directory / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", directory / "bin/busybox")
    for applet in APPLETS:
        (directory / "bin" / applet).symlink_to("busybox")
    return directory


@dataclass
class Wish:
    """What a container is to be like."""

    args: list[str]
    terminal: bool = False
    stdin: bool = False
    pid_namespace: bool = True
    memory: int = 0  # bytes, 0: no limit
    log: bool = True
    timeout_ms: int = 30_000
    runtime_path: str = ""
    cgroup: bool = True


class MonitorProcess:
    """One monitor and, through it, one container."""

    def __init__(self, base: Path, root: Path, runtime: str) -> None:
        self.id = uuid.uuid4().hex * 2
        self.runtime = runtime
        self.root = root
        self.run_root = base / "run"
        self.directory = self.run_root / "monitors" / self.id
        self.runtime_root = base / f"state-{runtime}"
        self.log_path = base / "logs" / self.id / "0.log"
        self.cgroup = f"/bhmon-{os.getpid()}/{self.id}"
        self.pid = 0
        self._exit_status: int | None = None
        self._clients: list[Client] = []

    # -- the supervisor's part --------------------------------------------------------------------------

    def start_monitor(self, *, log_buffer: int = 256 * 1024) -> None:
        """Do what the supervisor does: directory, lock, socket, fork."""
        self.directory.mkdir(parents=True)
        lock_fd = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        listener.bind(str(self.directory / "ctl.sock"))
        listener.listen(64)
        settings = MonitorSettings(root="/", run_root=str(self.run_root), log_buffer=log_buffer)
        vault_fd = vault.make()
        vault.put(vault_fd, vault.LISTENER, fds=[listener.fileno()])
        self.pid = os.fork()
        if self.pid == 0:
            self._be_monitor(settings, lock_fd, listener, vault_fd)
        os.close(lock_fd)
        os.close(vault_fd)
        listener.close()

    def adopt(self, pid: int) -> None:
        """Take over a monitor that another process has forked; that process reaps it."""
        self.pid = pid
        self._exit_status = 0

    def _be_monitor(
        self, settings: MonitorSettings, lock_fd: int, listener: socket.socket, vault_fd: int
    ) -> None:
        code = 1
        try:
            os.setsid()
            null = os.open("/dev/null", os.O_RDWR)
            said = os.open(self.directory / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            for target, source in ((0, null), (1, said), (2, said)):
                os.dup2(source, target)
            context = MonitorContext(settings)
            monitor_main.run(
                ("monitor", self.id, "pod", str(self.directory)),
                (lock_fd, listener.fileno(), vault_fd),
                monitor_main.prepare_process(lambda _id: context, ["/usr/bin/crun"], rehearsed=False),
            )
            code = 0
        finally:
            os.write(2, traceback.format_exc().encode() if code else b"")
            os._exit(code)

    def wait_monitor(self, timeout: float = TIMEOUT) -> int:
        """Wait for the monitor's end, return its exit status as in subprocess."""
        if self._exit_status is None:
            fd = os.pidfd_open(self.pid)
            try:
                assert select.select([fd], [], [], timeout)[0], f"the monitor lives on: {self.said()}"
            finally:
                os.close(fd)
            self._exit_status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._exit_status

    def alive(self) -> bool:
        """True while the monitor holds its lock, as everybody else tells it."""
        with open(self.directory / "lock", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def said(self) -> str:
        """What the monitor logged."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "stderr").read_text()
        return ""

    # -- cri's part -----------------------------------------------------------------------------------

    def client(self) -> Client:
        """A new connection."""
        client = Client(str(self.directory / "ctl.sock"), timeout=TIMEOUT)
        self._clients.append(client)
        return client

    def create_request(self, wish: Wish) -> messages.Create:
        """Return the request that creates such a container."""
        return messages.Create(
            spec=msgspec.json.encode(self.spec(wish)),
            runtime_name=self.runtime,
            runtime_path=wish.runtime_path or f"/usr/bin/{self.runtime}",
            runtime_root=str(self.runtime_root),
            log_path=str(self.log_path) if wish.log else "",
            terminal=wish.terminal,
            stdin=wish.stdin,
            cgroup_path=self.cgroup if wish.cgroup else "",
            cgroup_version=1,
            timeout_ms=wish.timeout_ms,
        )

    def run(self, *args: str, **wishes: Any) -> int:
        """Start the monitor, create and start a container; return its pid."""
        pid = self.create(*args, **wishes)
        self.client().call(messages.Start())
        return pid

    def create(self, *args: str, **wishes: Any) -> int:
        """Start the monitor and create a container; return its pid."""
        if not self.pid:
            self.start_monitor()
        return self.client().call(self.create_request(Wish(list(args), **wishes))).pid

    def sh(self, script: str, **wishes: Any) -> int:
        """As `run`, with a shell script."""
        return self.run("sh", "-c", script, **wishes)

    def wait(self) -> ExitRecord:
        """Wait for the container's end and the monitor's; return the record on disk."""
        assert self.wait_monitor() == 0, self.said()
        record = self.exit_record()
        assert record is not None, self.said()
        return record

    def exit_record(self) -> ExitRecord | None:
        """The exit record on disk."""
        with contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode((self.directory / "exit.json").read_bytes(), type=ExitRecord)
        return None

    def stop(self, signal_name: str = "SIGTERM", grace_ms: int = 10_000) -> ExitRecord:
        """Stop the container."""
        return self.client().call(messages.Stop(signal=signal_name, grace_ms=grace_ms)).exit

    def exec(self, *args: str, **options: Any) -> messages.ExecDone:
        """Run a command in the container."""
        return self.client().call(messages.ExecSync(process=self.process(list(args)), **options))

    def state(self) -> messages.State:
        """What the monitor knows."""
        return self.client().call(messages.StateGet())

    def process(self, args: list[str]) -> bytes:
        """An OCI process object."""
        return msgspec.json.encode(_process(args, terminal=False))

    def log_lines(self) -> list[str]:
        """The lines of the log file."""
        return self.log_path.read_text().splitlines()

    def log_text(self, stream: str = "stdout") -> bytes:
        """The stream's bytes, joined from the log's records."""
        return joined(self.log_path.read_bytes(), stream)

    def spec(self, wish: Wish) -> dict[str, Any]:
        """An OCI config.json."""
        namespaces = [{"type": name} for name in ("mount", "ipc", "uts", "network")]
        if wish.pid_namespace:
            namespaces.append({"type": "pid"})
        resources: dict[str, Any] = (
            {"memory": {"limit": wish.memory, "swap": wish.memory}} if wish.memory else {}
        )
        return {
            "ociVersion": "1.0.2",
            "process": _process(wish.args, terminal=wish.terminal),
            "root": {"path": str(self.root), "readonly": False},
            "hostname": "box",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {
                    "destination": "/dev",
                    "type": "tmpfs",
                    "source": "tmpfs",
                    "options": ["nosuid", "mode=755"],
                },
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
            ],
            "linux": {"namespaces": namespaces, "resources": resources, "cgroupsPath": self.cgroup},
        }

    # -- what is left -----------------------------------------------------------------------------------

    def cgroups(self) -> list[Path]:
        """The container's groups that exist."""
        tail = self.cgroup.strip("/")
        return [path for root in _hierarchies() if (path := root / tail).exists()]

    def leftovers(self) -> list[str]:
        """Processes, groups and runtime state of the container that are still there."""
        left = [str(path) for path in self.cgroups()]
        left += [str(path) for path in self.runtime_root.glob(self.id)]
        left += [f"process {pid}" for path in self.cgroups() for pid in _procs(path)]
        return left + [f"process {pid} of the monitor" for pid in children_of(self.pid)]

    def close(self) -> None:
        """End everything, by force if need be; raise AssertionError if the monitor left something."""
        for client in self._clients:
            client.close()
        if self.pid and self._exit_status is None:
            with contextlib.suppress(Exception):
                self.client().call(messages.Delete(), timeout=10)
            self._force_monitor()
        left = self.leftovers()
        self._force_container()
        assert not left, (left, self.said())

    def _force_monitor(self) -> None:
        try:
            self.wait_monitor(5)
        except AssertionError:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _force_container(self) -> None:
        for _ in range(50):
            groups = self.cgroups()
            for path in groups:
                for pid in _procs(path):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    path.rmdir()
            if not groups:
                break
            time.sleep(0.05)
        shutil.rmtree(self.runtime_root / self.id, ignore_errors=True)
        for root in _hierarchies():
            with contextlib.suppress(OSError):
                (root / f"bhmon-{os.getpid()}").rmdir()
        # Where the cgroup2 mount is hidden from it, crun makes plain files in its place.
        if not os.path.ismount(CGROUP_MOUNT / "unified"):
            shutil.rmtree(CGROUP_MOUNT / f"unified/bhmon-{os.getpid()}", ignore_errors=True)


def _process(args: list[str], *, terminal: bool) -> dict[str, Any]:
    return {
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin", "TERM=xterm"],
        "cwd": "/",
    }


def _hierarchies() -> list[Path]:
    return [path for path in (CGROUP_MOUNT, *CGROUP_MOUNT.iterdir()) if (path / "cgroup.procs").exists()]


def _procs(path: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in (path / "cgroup.procs").read_text().split()]
    return []


def children_of(pid: int) -> list[int]:
    """The children of a process."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def joined(log: bytes, stream: str) -> bytes:
    """Join the records of one stream to the bytes that were written, as a reader of CRI logs does."""
    parts: list[bytes] = []
    for line in log.split(b"\n"):
        fields = line.split(b" ", 3)
        if len(fields) == 4 and fields[1].decode() == stream:
            parts.append(fields[3] + (b"\n" if fields[2] == b"F" else b""))
    return b"".join(parts)


def until(condition: Any, timeout: float = 10.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


@contextlib.contextmanager
def monitor(root: Path, runtime: str) -> Iterator[MonitorProcess]:
    """A monitor that is not started yet; afterwards nothing of it may be left."""
    base = Path(tempfile.mkdtemp(prefix="bhmon-", dir="/tmp"))  # short: the path of a socket has 107 bytes
    process = MonitorProcess(base, root, runtime)
    try:
        yield process
    finally:
        try:
            process.close()
        finally:
            shutil.rmtree(base)
