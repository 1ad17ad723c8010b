"""Runs in: the tests. System calls of a live process that fail, lie, or are its last.

strace's fault injection: nothing of ours is in the process. Each process and thread counts its own calls. A
disk that can lose power is an ext4 image on a loop device: what stands in the image file is on disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

#: What changes a file system, or a database on it. `write` is not here: pipes and logs have it too.
CHANGES = (
    "mkdir,mkdirat,rmdir,rename,renameat,renameat2,unlink,unlinkat,symlink,symlinkat,linkat,mknod,mknodat,"
    "pwrite64,ftruncate,fallocate,fsync,fdatasync,syncfs,sync_file_range,mount,umount2,fsetxattr,chown,lchown,fchown,fchownat,"
    "chmod,fchmod,fchmodat,utimensat,move_mount"
)
ATTACH_SECONDS = 10.0


class Strace:
    """Injects into a process and (`follow`) its children and threads, from `with` to its end.

    `what` as in strace(1): error=EIO, signal=KILL, retval=0. `nth`: which one of each of the `calls`, in
    every process; 0 is every one.
    """

    def __init__(
        self, pid: int, what: str = "", *, nth: int = 0, calls: str = CHANGES, follow: bool = True
    ) -> None:
        self._pid, self._follow, self._deadly = pid, follow, what.startswith("signal=")
        self._log = Path(tempfile.mkstemp(prefix="bh-strace-")[1])
        when = f":when={nth}" if nth else ""
        inject = ["-e", f"inject={calls}:{what}{when}"] if what else []
        self._command = [
            "strace",
            *(["-f"] if follow else []),
            "-q",
            "-o",
            str(self._log),
            "-e",
            f"trace={calls}",
        ]
        self._command += [*inject, "-p", str(pid)]
        self._strace: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Strace:
        self._strace = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + ATTACH_SECONDS
        while not self._has_begun():
            assert time.monotonic() < end, "strace did not attach"
            time.sleep(0.002)
        return self

    def _has_begun(self) -> bool:
        """It is attached; or its victim has died already, in a call that it was in and that goes on then."""
        try:
            return _traced(self._pid, follow=self._follow)
        except ProcessLookupError:
            if not self._deadly:
                raise
            return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._strace is not None
        self._strace.send_signal(signal.SIGINT)  # it lets go of those that live
        self._strace.wait(20)
        self.text = self._log.read_text(errors="replace")
        self._log.unlink()

    @property
    def happened(self) -> int:
        """How often it was injected; known at the end."""
        return self.text.count("(INJECTED)") + self.text.count("+++ killed by SIGKILL")

    @property
    def steps(self) -> list[tuple[str, int]]:
        """Every step that was taken, as (system call, its number in its process); known at the end."""
        counts: Counter[tuple[str, str]] = Counter()
        found: dict[tuple[str, int], None] = {}
        for pid, call in _CALL.findall(self.text):
            counts[pid, call] += 1
            found[call, counts[pid, call]] = None
        return list(found)


_CALL = re.compile(r"^(?:(\d+) +)?([a-z0-9_]+)\(", re.MULTILINE)  # a pid if children are followed


def _traced(pid: int, *, follow: bool) -> bool:
    """Say whether it is traced. Raises ProcessLookupError if it has ended."""
    with contextlib.suppress(FileNotFoundError):
        tasks = os.listdir(f"/proc/{pid}/task") if follow else [str(pid)]
        texts = [Path(f"/proc/{pid}/task/{task}/status").read_text() for task in tasks]
        return all("TracerPid:\t0\n" not in text for text in texts)
    raise ProcessLookupError(f"process {pid} has ended")


class Disk:
    """A small ext4 file system that can be cut off: `cut` leaves what was on disk at that moment."""

    def __init__(self, mount_point: Path, megabytes: int = 48) -> None:
        self.mount_point = mount_point
        self._home = Path(tempfile.mkdtemp(prefix="bh-disk-"))
        self._image = self._home / "image"
        with self._image.open("wb") as file:
            file.truncate(megabytes << 20)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(self._image)], check=True)

    def mount(self) -> None:
        """Put it into its place."""
        self.mount_point.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-o", "loop", str(self._image), str(self.mount_point)], check=True)

    def cut(self) -> None:
        """What was not on disk is lost. Whoever used it must be dead."""
        survivor = self._home / "survivor"
        subprocess.run(["cp", "--sparse=always", str(self._image), str(survivor)], check=True)
        self.unmount()
        survivor.rename(self._image)

    def unmount(self) -> None:
        """Take it away."""
        subprocess.run(["umount", str(self.mount_point)], check=True)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Whoever writes hangs."""
        subprocess.run(["fsfreeze", "-f", str(self.mount_point)], check=True)
        try:
            yield
        finally:
            subprocess.run(["fsfreeze", "-u", str(self.mount_point)], check=True)

    def __enter__(self) -> Disk:
        self.mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        subprocess.run(["umount", "-l", str(self.mount_point)], check=False, capture_output=True)
        shutil.rmtree(self._home)
