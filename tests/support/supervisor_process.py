"""Runs in: the tests.

A supervisor as a process of its own, with directories, groups and a notify socket of its own, and the means
to look at it. Leaving the context ends it and checks that nothing stays behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from ipc.blocking import Client
from ipc.messages import storage
from ipc.messages import supervisor as messages
from supervisor.cgroup import instance_name
from tests.support.leaks import cgroups, mounts, processes

REPOSITORY = Path(__file__).resolve().parents[2]
T = TypeVar("T")

#: Short times, so that a test of a limit takes no minute.
CONFIG = """
[timeouts]
idle_exit = 0.5
worker_start = 2.0
worker_stop = 1.0
worker_answer = 1.0
ping = 0.2
[restart]
slow_retry = 30.0
"""


def eventually(what: Callable[[], T], timeout: float = 10.0) -> T:
    """Return the first true value of `what`."""
    deadline = time.monotonic() + timeout
    while not (value := what()):
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.02)
    return value


class Instance:
    """One supervisor. `module` is what to run: the fakes' or the real one."""

    def __init__(self, module: str = "tests.support.fake_supervisor", config: str = CONFIG) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="bh-sup-"))
        self.directory.chmod(0o755)
        self.run_root = self.directory / "run"
        self.module = module
        self.process: subprocess.Popen[bytes] | None = None
        self.config = self.directory / "bulkhead.toml"
        self.config.write_text(config)
        (self.run_root / "faults").mkdir(parents=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(f"{self.directory}/notify")
        self._notify.settimeout(20)
        self.notified: list[str] = []
        self.environment = {**os.environ, "NOTIFY_SOCKET": f"{self.directory}/notify"}
        self.output = self.directory / "log"

    # -- running --------------------------------------------------------------------------------------

    def start(self, *, wait: bool = True) -> None:
        """Start the supervisor; wait for READY=1."""
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments()],
                cwd=REPOSITORY,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        if wait:
            self.await_notice("READY=1")

    def arguments(self) -> list[str]:
        """The flags of `serve`."""
        directory = self.directory
        return [
            *("--config", str(self.config), "--root", f"{directory}/root", "--run-root", str(self.run_root)),
            *("--log-level", "debug"),
        ]

    def await_notice(self, line: str) -> None:
        """Wait until the supervisor has told the service manager this."""
        while True:
            for notice in self._notify.recv(4096).decode().splitlines():
                self.notified.append(notice)
                if notice == line:
                    return

    def quiet_for(self, seconds: float) -> bool:
        """True if the service manager hears nothing for so long."""
        self._notify.settimeout(seconds)
        try:
            self._notify.recv(4096)
        except TimeoutError:
            return True
        finally:
            self._notify.settimeout(20)
        return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(20)

    # -- looking --------------------------------------------------------------------------------------

    def fault(self, kind: str, word: str) -> None:
        """Order a fault of the next workers of a kind."""
        (self.run_root / "faults" / kind).write_text(word)

    def client(self, kind: str = "supervisor") -> Client:
        return Client(f"{self.run_root}/ipc/{kind}.sock", timeout=10)

    def workers(self, kind: str = "") -> list[messages.WorkerState]:
        """Every process the supervisor tells of, or those of a kind."""
        with self.client() as client:
            rows = client.call(messages.WorkerList()).workers
        return [row for row in rows if kind in {"", row.kind}]

    def worker(self, kind: str) -> messages.WorkerState:
        (row,) = self.workers(kind)
        return row

    def served_by(self, kind: str) -> int:
        """Ask a fake worker who it is."""
        with self.client(kind) as client:
            return client.call(storage.FsInfoGet()).used_bytes

    def log(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def await_log(self, text: str) -> None:
        eventually(lambda: text in self.log())

    def processes(self) -> set[str]:
        """Processes of this instance: those in its groups, and the supervisor's descendants."""
        found = processes(children_of=(self.pid,), titles=()) if self.process else set()
        return found | self._grouped()

    def _grouped(self) -> set[str]:
        found = set()
        for group in self.groups():
            for pid in Path(group, "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    found.add(f"{pid} {Path(f'/proc/{pid}/cmdline').read_text()}")
        return found

    def groups(self) -> set[str]:
        """Every cgroup of this instance."""
        name = instance_name(str(self.run_root))
        return cgroups([f"/{name}", f"/{name}.monitors", f"/{name}.pods"])

    # -- ending ---------------------------------------------------------------------------------------

    def __enter__(self) -> Instance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            self._end()
            sys.stderr.write(self.log())  # shown when the test fails
            if error is None:
                self._assert_nothing_left()
        finally:
            self._notify.close()
            self._clear()

    def _end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.kill()
                raise

    def _assert_nothing_left(self) -> None:
        assert not mounts([self.directory]), mounts([self.directory])
        assert not self._grouped(), self._grouped()
        assert not self.groups(), sorted(self.groups())

    def _clear(self) -> None:
        for line in self._grouped():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGKILL)
        for mount in mounts([self.directory]):
            subprocess.run(["umount", "-l", mount.rsplit(" (", 1)[0]], check=False)
        for _ in range(50):
            for group in sorted(self.groups(), reverse=True):
                with contextlib.suppress(OSError):
                    os.rmdir(group)
            if not self.groups():
                break
            time.sleep(0.05)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def running(config: str = CONFIG) -> Iterator[Instance]:
    """A supervisor with fake workers, ready."""
    with Instance(config=config) as instance:
        instance.start()
        yield instance
