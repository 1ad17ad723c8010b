"""Runs in: cri. What /proc shows anybody of a process: network counters of its namespace, number of its
descriptors, its soft limits. Absent is None or empty: the process has ended, or /proc hides it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from workers.cri.stats.cgroupfs import read

_LARGEST = 1 << 20


@dataclass(slots=True)
class Interface:
    """Counters of one network interface (/proc/PID/net/dev)."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


def interfaces(pid: int) -> list[Interface] | None:
    """The interfaces of a process's network namespace but for lo, in the kernel's order."""
    try:
        fd = os.open(f"/proc/{pid}/net/dev", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = b"".join(iter(lambda: os.read(fd, _LARGEST), b""))
    except OSError:
        return None
    finally:
        os.close(fd)
    return parse_dev(text.decode("utf-8", "replace"))


def parse_dev(text: str) -> list[Interface]:
    """/proc/net/dev: two lines of titles, then a line for each interface."""
    found = []
    for line in text.splitlines()[2:]:
        name, _, counters = line.rpartition(":")
        values = [int(word) for word in counters.split()]
        if name.strip() != "lo" and len(values) >= 12:
            found.append(Interface(name.strip(), *values[:4], *values[8:12]))
    return found


def sockets(pid: int) -> int | None:
    """How many sockets are open in a process's network namespace (/proc/PID/net/sockstat)."""
    try:
        words = read(f"/proc/{pid}/net/sockstat").split(b"\n", 1)[0].split()
        return int(words[2])  # "sockets: used N"
    except (OSError, IndexError, ValueError):
        return None


def descriptors(pid: int) -> int | None:
    """How many descriptors a process has open: the size of /proc/PID/fd, from Linux 6.2 on."""
    try:
        return os.stat(f"/proc/{pid}/fd").st_size or None
    except OSError:
        return None


def open_files_limit(pid: int) -> int | None:
    """The soft limit of open files; None if there is none (/proc/PID/limits)."""
    try:
        for line in read(f"/proc/{pid}/limits").splitlines():
            if line.startswith(b"Max open files"):
                return int(line.split()[3])
    except (OSError, ValueError):
        return None
    return None
