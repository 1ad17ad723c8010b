"""Runs in: the tests.

A virtual machine for one payload: user-mode-linux with systemd and cgroup v2, which the machine of the tests
may not have. It boots the image of tests/support/vm_image.py copy-on-write, sees the project read-only at its
own path and a directory of the test's as /share, runs /share/payload with the project as working directory,
and is gone: it lives in a PID namespace that ends with it or with its time, and in a directory that is
removed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support import vm_image

MEMORY_MIB = 1024
#: Kernel parameters: nothing that asks, waits or is not needed.
PARAMETERS = (
    *("rw", "root=/dev/ubda", "quiet", "panic=-1", "security=apparmor"),
    *("con0=null,fd:1", "con=null", "ssl=null"),
    *("systemd.unit=payload.service", "systemd.show_status=false", "systemd.default_timeout_start_sec=60"),
)


@dataclass(frozen=True)
class Outcome:
    """How a machine ended. `exit_code` is the payload's, None if it did not come to its end in time."""

    exit_code: int | None
    seconds: float
    console: str


def run(payload: str, share: Path, seconds: float) -> Outcome:
    """Boot, run the payload (a shell script), wait at most so many seconds for the end."""
    image = vm_image.path()
    assert image.exists(), f"{image} is missing: make vm-image builds it (tests have no network)"
    (share / "payload").write_text(payload)
    room = (MEMORY_MIB + 512) << 20
    with tempfile.TemporaryDirectory(prefix="bh-vm-", dir=vm_image.scratch(room)) as directory:
        console = Path(directory) / "console"
        began = time.monotonic()
        _boot(Path(directory), image, share, console, seconds)
        taken = time.monotonic() - began
        text = console.read_text(errors="replace")
    ended = share / "exit-code"
    return Outcome(int(ended.read_text()) if ended.exists() else None, taken, text)


def _boot(directory: Path, image: Path, share: Path, console: Path, seconds: float) -> None:
    command = [
        *("linux.uml", f"mem={MEMORY_MIB}M", "umid=vm", f"uml_dir={directory}"),
        f"ubd0={directory}/disk.cow,{image}",
        *(*PARAMETERS, f"bulkhead.repo={vm_image.REPO}", f"bulkhead.share={share}"),
    ]
    # In a namespace whose first process is a shell: every process of the kernel's dies with that one, which
    # dies with us.
    wrapped = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--",
        "sh",
        "-c",
        '"$@"; exit $?',
        "sh",
    ]
    with console.open("wb") as output:
        machine = subprocess.Popen(
            [*wrapped, *command],
            cwd=directory,
            env={"PATH": os.environ["PATH"], "TMPDIR": str(directory), "HOME": str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                machine.wait(seconds)
        finally:
            if machine.poll() is None:
                _end(machine)


def _end(machine: subprocess.Popen[bytes]) -> None:
    """Kill the namespace's first process, whose end is that of all the others; return when all are gone."""
    for pid in Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    try:
        machine.wait(30)
    except subprocess.TimeoutExpired:
        machine.kill()
        machine.wait()
