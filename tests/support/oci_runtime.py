"""Runs in: the tests (as root).

A pod's namespaces without network and supervisor, a busybox root file system, and an OCI runtime run to its
end. Everything is gone when the context managers are left, also after a failure.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUNTIMES = ("crun", "runc")
_BUSYBOX = Path("/bin/busybox")
_APPLETS = ("sh", "cat", "ls", "mount", "unshare", "touch", "grep", "sleep", "tty", "true")
TIMEOUT = 30


def busybox_rootfs(directory: Path) -> Path:
    """A root file system of busybox-static alone."""
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "data"):
        (directory / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, directory / "bin/busybox")
    for name in _APPLETS:
        (directory / "bin" / name).symlink_to("busybox")
    (directory / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    return directory


@contextlib.contextmanager
def pod_namespaces() -> Iterator[dict[str, str]]:
    """net, ipc, uts and pid of a fresh pod, as paths."""
    keeper = subprocess.Popen(["unshare", "-n", "-i", "-u", "-p", "--fork", "--kill-child", "sleep", "600"])
    try:
        paths = {name: f"/proc/{keeper.pid}/ns/{name}" for name in ("net", "ipc", "uts")}
        yield paths | {"pid": f"/proc/{_child(keeper.pid)}/ns/pid"}
    finally:
        keeper.kill()
        keeper.wait()


def _child(pid: int) -> int:
    """The first child of a process that has one soon, when it has become the program that it will be."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text().strip() == "sleep":
            return int(children[0])
        time.sleep(0.005)
    raise TimeoutError(f"process {pid} has no child")


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


@dataclass
class Bundle:
    """One container: `run` runs it to its end, `create` leaves it created until the context is left."""

    runtime: str
    directory: Path
    container_id: str

    @property
    def _base(self) -> list[str]:
        return [self.runtime, "--root", str(self.directory / "state")]

    def run(self, spec: bytes) -> Outcome:
        (self.directory / "config.json").write_bytes(spec)
        arguments = [*self._base, "run", "--bundle", str(self.directory), self.container_id]
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            errors="replace",
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def create(self, spec: bytes, *arguments: str) -> None:
        """Raises CalledProcessError with the runtime's sentence in stderr."""
        (self.directory / "config.json").write_bytes(spec)
        command = [*self._base, "create", "--bundle", str(self.directory), *arguments, self.container_id]
        # files, not pipes: the container's process inherits them and would hold a pipe open
        with (self.directory / "log").open("wb") as log:
            subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=TIMEOUT, check=True
            )

    def start(self) -> None:
        subprocess.run([*self._base, "start", self.container_id], timeout=TIMEOUT, check=True)

    def exec(self, process: bytes) -> Outcome:
        path = self.directory / "process.json"
        path.write_bytes(process)
        arguments = [*self._base, "exec", "--process", str(path), self.container_id]
        done = subprocess.run(
            arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False, text=True
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def delete(self) -> None:
        command = [*self._base, "delete", "--force", self.container_id]
        subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)


@contextlib.contextmanager
def bundle(runtime: str, directory: Path) -> Iterator[Bundle]:
    """A bundle directory (its rootfs is the caller's) and the promise that the container is gone after it."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Bundle(runtime, directory, f"spec-{uuid.uuid4().hex}")
    try:
        yield made
    finally:
        made.delete()


def kill(pid: int) -> None:
    """SIGKILL for a process of the test's own, gone or not."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
