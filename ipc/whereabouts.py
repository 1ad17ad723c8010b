"""Runs in: supervisor, storage, network. Where a process is just now, as far as the kernel tells it.

For the log, when something hangs: whoever waits in the kernel can write no stack of its own.
"""

from __future__ import annotations

import contextlib
import os

_STATES = {"D": "in an uninterruptible sleep", "S": "asleep", "R": "running", "T": "stopped", "Z": "dead"}
_FRAMES = 4


def whereabouts(pid: int) -> str:
    """A process's state and the kernel functions that it is in; "gone" if it has ended."""
    state = _state(pid)
    if not state:
        return "gone"
    where = _kernel_stack(pid) or _read(f"/proc/{pid}/wchan").strip("0\n")
    return f"{_STATES.get(state, state)}{f' in {where}' if where else ''}"


def plugin_of(pid: int) -> str:
    """The name of the program that a process has started and waits for, "" if there is none."""
    children = _read(f"/proc/{pid}/task/{pid}/children").split()
    return _read(f"/proc/{children[0]}/comm").strip() if children else ""


def _state(pid: int) -> str:
    return _read(f"/proc/{pid}/stat").rpartition(")")[2][1:2]


def _kernel_stack(pid: int) -> str:
    lines = _read(f"/proc/{pid}/stack").splitlines()[:_FRAMES]
    return " < ".join(line.rpartition(" ")[2].partition("+")[0] for line in lines)


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, 8192).decode("utf-8", "replace")
        finally:
            os.close(fd)
    return ""
