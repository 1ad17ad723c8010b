"""Runs in: every process that gives privileges up.

Capability sets by name (without the CAP_ prefix): read from the kernel, and shrunk, never widened.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable

from ipc import kernel

_TEXT = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
PERFMON BPF CHECKPOINT_RESTORE
"""
#: linux/capability.h, in the order of their numbers.
NAMES = tuple(_TEXT.split())

_NUMBERS = {name: number for number, name in enumerate(NAMES)}
_PR_SET_KEEPCAPS = 8


def from_mask(mask: int) -> list[str]:
    """Names of the bits of a mask, in the order of their numbers; unknown ones as numbers."""
    bits = (number for number in range(64) if mask >> number & 1)
    return [NAMES[number] if number < len(NAMES) else str(number) for number in bits]


def to_mask(names: Iterable[str]) -> int:
    """The mask of some names. Raises KeyError for a name that is none."""
    mask = 0
    for name in names:
        mask |= 1 << _NUMBERS[name]
    return mask


def status_fields(text: str) -> dict[str, str]:
    """The fields of a /proc/PID/status."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key: value.strip() for key, value in pairs}


def effective() -> set[str]:
    """What this process can do now, asked without /proc."""
    words = struct.unpack("=6I", kernel.capget())
    return set(from_mask(words[0] | words[3] << 32))


def drop_bounding(keep: Collection[str]) -> None:
    """Take everything but `keep` out of the bounding set. Raises OSError without SETPCAP."""
    kept = to_mask(keep)
    for number in range(64):
        try:
            present = kernel.prctl(kernel.PR_CAPBSET_READ, number)
        except OSError:  # EINVAL: this kernel's list ends here
            return
        if present and not kept >> number & 1:
            kernel.prctl(kernel.PR_CAPBSET_DROP, number)


def set_exactly(keep: Collection[str]) -> None:
    """Permitted and effective are `keep`, inheritable and ambient empty. Raises OSError if `keep` is more
    than this process has."""
    mask = to_mask(keep)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    kernel.capset(struct.pack("=6I", low, low, 0, high, high, 0))
    kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)


def survive_setuid() -> None:
    """The next setresuid away from 0 leaves the permitted set alone."""
    kernel.prctl(_PR_SET_KEEPCAPS, 1)
