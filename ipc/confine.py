"""Runs in: short-lived children of workers (unpack and its like), and every worker as it enters its sandbox.

Giving up, piece by piece and in the right order: resource limits, root directory, identity and
capabilities, new privileges, system calls. It never gives anything back. Every function raises OSError if
the kernel refuses; what a kernel lacks is returned as sentences, so that the caller can say it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
from collections.abc import Collection, Mapping

from ipc import capabilities, kernel, seccomp, syscalls
from ipc import syscall_groups as calls

_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
#: What a kernel answers that was built without a mechanism.
LACKING = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})

#: The lists for children. Whatever they need from Python must be imported before.
LISTS = {
    policy.name: policy
    for policy in (
        seccomp.Policy(
            name="unpack",  # writes one layer, reports over descriptors that it has; makes no socket
            allowed=calls.PROCESS
            | calls.DESCRIPTORS
            | calls.READ_FILES
            | calls.WRITE_FILES
            | calls.ARCHIVE_FILES
            | calls.MESSAGES,
            conditional={**calls.CONDITIONAL, **calls.THREADS},
            missing=calls.MISSING,
        ),
        seccomp.Policy(
            name="lookup",  # reads a tree that somebody else made, reports the same way
            allowed=calls.PROCESS | calls.DESCRIPTORS | calls.READ_FILES | calls.MESSAGES,
            conditional=calls.CONDITIONAL,
            missing=calls.MISSING,
        ),
        seccomp.Policy(
            name="verify",  # executes programs, which read and write files and speak to nobody
            denied=calls.DANGEROUS
            | calls.ARCHIVE_FILES - {"chdir", "fchdir"}
            | {"bpf", "unshare", "setns", "mount", "umount2", "chroot", "pivot_root"}
            | {"socket", "socketpair", "connect", "bind", "listen", "accept", "accept4"},
            missing=calls.MISSING,
            open_list=True,
        ),
    )
}


def confine(
    root: str | None,
    keep_caps: Collection[str],
    seccomp: str,
    rlimits: Mapping[str, int],
    *,
    uid: int = 0,
    gid: int = 0,
) -> list[str]:
    """Lock a child in before it touches what somebody sent.

    `root`: its new root directory, None keeps the old one. `keep_caps`: capabilities without CAP_, also
    kept through a change to `uid`. `seccomp`: a name in LISTS. `rlimits`: by name without RLIMIT_.
    Returns what this machine lacks, a sentence each. Raises OSError, KeyError.
    """
    degraded = limit(rlimits)
    if root is not None:
        os.chdir(root)
        os.chroot(".")
        os.chdir("/")
    degraded += become(uid, gid, (), keep_caps)
    no_new_privileges()
    return degraded + filter_calls(LISTS[seccomp])


def limit(rlimits: Mapping[str, int]) -> list[str]:
    """Set soft and hard limits; a hard limit that is lower already stays. Returns what could not be met."""
    degraded = []
    for name, wanted in rlimits.items():
        number: int = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(number, (value, value))
        if value < wanted:
            degraded.append(f"rlimit {name}: {value} instead of {wanted}, the hard limit of this host")
    return degraded


def become(uid: int, gid: int, groups: Collection[int], keep: Collection[str]) -> list[str]:
    """Be this user for good, with these capabilities at most. Returns which of them this host lacks."""
    have = capabilities.effective()
    kept = set(keep) & have
    capabilities.drop_bounding(kept)
    if set(os.getgroups()) != set(groups):
        os.setgroups(list(groups))
    if uid != 0 and kept:
        capabilities.survive_setuid()
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    capabilities.set_exactly(kept)
    return [f"capability {name}: this host does not have it" for name in sorted(set(keep) - have)]


def no_new_privileges() -> None:
    """No program executed from here on gains anything by being setuid or having file capabilities."""
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)


def filter_calls(policy: seccomp.Policy) -> list[str]:
    """Put a seccomp policy in force for all threads, for good. Returns what this machine lacks."""
    return filter_by(program_of(policy, os.getpid()))


def program_of(policy: seccomp.Policy, pid: int) -> bytes | None:
    """Return a policy as a program for a process that will be `pid`; None for machines without a table."""
    try:
        return seccomp.assemble_here(policy, pid)
    except LookupError:
        return None


def filter_by(program: bytes | None) -> list[str]:
    """As `filter_calls`, with what `program_of` returned: it is much work, and need not be the child's."""
    if program is None:
        return [f"seccomp: no table of system calls for {platform.machine()}"]
    try:
        _install(program)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        return [f"seccomp: not in this kernel ({error.strerror})"]
    return []


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _install(program: bytes) -> None:
    """seccomp(2), needs no_new_privs. Raises OSError; EBUSY-like answers of TSYNC are a thread's id."""
    instructions = ctypes.create_string_buffer(program, len(program))
    argument = _Program(len(program) // 8, ctypes.addressof(instructions))
    raw = (ctypes.c_char * ctypes.sizeof(argument)).from_buffer(argument)
    number = syscalls.numbers(platform.machine())["seccomp"]
    stuck = kernel.syscall(
        number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, raw, what="install a seccomp filter"
    )
    if stuck:
        raise OSError(errno.EBUSY, f"install a seccomp filter: thread {stuck} has one of its own")
