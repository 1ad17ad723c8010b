"""Runs in: every worker that mounts nothing, after the drop of its identity.

Landlock rules for the paths of the mount view (Documentation/userspace-api/landlock.rst): a second lock on
the same door. Nothing may be executed, no device or symbolic link made, no TCP port used that the table does
not name, no signal and no abstract socket leaves the process.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Collection, Iterable

from ipc import kernel
from supervisor.sandbox.spec import Bind

#: The same numbers on every machine.
_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

# linux/landlock.h, LANDLOCK_ACCESS_FS_*
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
_MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _REFER, _TRUNCATE = 1 << 7, 1 << 8, 1 << 9, 1 << 13, 1 << 14

_READ = _READ_FILE | _READ_DIR
_WRITE = _WRITE_FILE | _TRUNCATE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _REFER
#: The rights that make sense on what is no directory; the kernel refuses a rule with others.
_OF_FILES = _READ_FILE | _WRITE_FILE | _TRUNCATE

#: ABI version -> how many rights on files it knows, counted from bit 0.
_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_ABI_TCP, _ABI_SCOPES = 4, 6
_TCP = {"bind": 1 << 0, "connect": 1 << 1}
_SCOPES = 1 << 0 | 1 << 1  # abstract Unix sockets, signals


def abi() -> int:
    """The kernel's Landlock version, 0 if there is none. Raises OSError."""
    try:
        return kernel.syscall(_SYS_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION, what="ask for Landlock")
    except OSError as error:
        # EPERM: we run in a container whose seccomp filter does not know the call
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def restrict(binds: Iterable[Bind], tcp: Collection[str]) -> list[str]:
    """Allow these paths and TCP operations and nothing else, for good. Needs no_new_privs.

    Returns what this kernel lacks. Raises OSError.
    """
    version = abi()
    if version == 0:
        return ["landlock: not in this kernel, or not enabled"]
    handled = _handled_rights(version)
    ruleset = _create_ruleset(version, handled, tcp)
    try:
        for bind in binds:
            _allow(ruleset, bind, handled)
        kernel.syscall(_SYS_RESTRICT_SELF, ruleset, 0, what="enter the Landlock rules")
    finally:
        os.close(ruleset)
    return _lacking(version)


def holds() -> bool:
    """Whether this process is locked: the view's root, which no rule names, cannot be listed."""
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError:
        return True
    return False


def _handled_rights(version: int) -> int:
    return (1 << _FS_RIGHTS[min(version, max(_FS_RIGHTS))]) - 1


def _create_ruleset(version: int, handled: int, tcp: Collection[str]) -> int:
    words = [handled]
    if version >= _ABI_TCP:
        words.append(sum(bit for name, bit in _TCP.items() if name not in tcp))
    if version >= _ABI_SCOPES:
        words.append(_SCOPES)
    attributes = struct.pack(f"={len(words)}Q", *words)
    return kernel.syscall(_SYS_CREATE_RULESET, attributes, len(attributes), 0, what="make Landlock rules")


def _allow(ruleset: int, bind: Bind, handled: int) -> None:
    """One rule: this path and what is beneath it."""
    path_fd = os.open(bind.path, os.O_PATH | os.O_CLOEXEC)
    try:
        rights = (_READ | _WRITE if bind.writable else _READ) & handled
        if not stat.S_ISDIR(os.fstat(path_fd).st_mode):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, path_fd)
        kernel.syscall(
            _SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0, what=f"Landlock rule {bind.path!r}"
        )
    finally:
        os.close(path_fd)


def _lacking(version: int) -> list[str]:
    gaps = {3: "truncation", _ABI_TCP: "TCP", 5: "device ioctls", _ABI_SCOPES: "signals and abstract sockets"}
    missing = [what for needed, what in gaps.items() if version < needed]
    return [f"landlock ABI {version}: does not cover {', '.join(missing)}"] if missing else []
