"""Runs in: ops.

What /proc tells anybody about a process. The proportional set (smaps) is for root only: `bulkheadctl workers`
shows it, ops has no right to it and does not guess.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """One live process: bytes, seconds, counts."""

    resident: int
    shared: int
    virtual: int
    cpu: float
    threads: int
    descriptors: int | None = None  # open ones; None before Linux 6.2


def read(pid: int) -> Process | None:
    """Facts of a process, None if it is gone or hidden (/proc mounted with hidepid)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            stat = file.read()
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            statm = file.read()
        descriptors = os.stat(f"/proc/{pid}/fd").st_size  # proc(5): their number, from Linux 6.2 on
    except OSError:
        return None
    return replace(parse(stat, statm), descriptors=descriptors or None)


def parse(stat: str, statm: str) -> Process:
    """Facts out of /proc/PID/stat and statm (proc(5)); the command in stat may contain anything."""
    fields = stat.rpartition(")")[2].split()  # field 3 of the manual page comes first
    virtual, resident, shared = (int(pages) * _PAGE for pages in statm.split()[:3])
    cpu = (int(fields[11]) + int(fields[12])) / _TICKS
    return Process(resident=resident, shared=shared, virtual=virtual, cpu=cpu, threads=int(fields[17]))
