"""Runs in: supervisor, storage, network, monitor and their children.

One tiny wrapper per system call that Python 3.11 does not offer; an errno becomes a sentence.
This module and ipc/confine.py and supervisor/sandbox/ are the only ones that may use ctypes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC = 0x20, 0x1000, 0x2000, 0x4000
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 0x1, 0x2, 0x8

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000

PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 3, 4, 36
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 23, 24, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 0x01, 0x02, 0x04
RESOLVE_BENEATH, RESOLVE_IN_ROOT = 0x08, 0x10

_MADV_DONTNEED = 4

#: Numbers of calls that the C library has no function for. The same on x86_64 and aarch64 since 5.x.
SYS_OPENAT2, SYS_PIDFD_GETFD = 437, 438
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(platform.machine(), 155)

#: The mount API of 5.2 and 5.12, numbered alike on every machine.
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH, _MOUNT_ATTR_IDMAP = 0x1, 0x4, 0x00100000
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000

#: struct pidfd_info in its first version, and its bit for the exit status.
_PIDFD_INFO_SIZE, _PIDFD_INFO_EXIT = 64, 1 << 3
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO_SIZE << 16 | 0xFF << 8 | 11

#: struct __user_cap_header_struct: _LINUX_CAPABILITY_VERSION_3, this process.
_CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_bare_prctl, _bare_fork = ctypes.PyDLL(None).prctl, ctypes.PyDLL(None).fork


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None, what: str = "") -> int:
    """Call the kernel by number. Raises OSError with `what` in its text."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(int(_libc.syscall(ctypes.c_long(number), *converted)), what or f"system call {number}")


def trim_heap() -> None:
    """malloc_trim(3): free memory of the heap goes back. C libraries other than glibc do so by themselves."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def drop_pages(start: int, length: int) -> None:
    """madvise(2) with MADV_DONTNEED: unmap pages. What was written to them is lost. Raises OSError."""
    result = _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)
    _check(result, f"madvise({start:#x}, {length})")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError naming source, type and target."""
    result = _libc.mount(
        source.encode() or None,
        target.encode(),
        fstype.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _check(result, f"mount {fstype or 'bind'} {source!r} on {target!r}")


def bind_mount(source: str, target: str, *, recursive: bool = False) -> None:
    """Bind `source` on `target`. Raises OSError."""
    mount(source, target, "", MS_BIND | (MS_REC if recursive else 0))


def umount(target: str, flags: int = 0) -> None:
    """umount2(2), never following a final link. Raises OSError."""
    _check(_libc.umount2(target.encode(), flags | UMOUNT_NOFOLLOW), f"unmount {target!r}")


def clone_mount(source: str, *, recursive: bool = False) -> int:
    """open_tree(2): a copy of the mount at `source` that is attached nowhere. Returns a descriptor."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return syscall(SYS_OPEN_TREE, _AT_FDCWD, source.encode(), flags, what=f"copy the mount of {source!r}")


def idmap_mount(mount_fd: int, user_namespace_fd: int, *, recursive: bool = False) -> None:
    """mount_setattr(2): through this mount, never attached yet, ids on disk are seen as the namespace maps
    them. Raises OSError; EINVAL where the file system cannot."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, user_namespace_fd)  # struct mount_attr
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    syscall(SYS_MOUNT_SETATTR, mount_fd, b"", flags, buffer, len(attributes), what="map the ids of a mount")


def attach_mount(mount_fd: int, target: str) -> None:
    """move_mount(2): attach what `clone_mount` copied. Raises OSError."""
    arguments = (mount_fd, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH)
    syscall(SYS_MOVE_MOUNT, *arguments, what=f"attach a mount at {target!r}")


def syncfs(fd: int) -> None:
    """syncfs(2): write everything of the file system that `fd` is on to disk. Raises OSError."""
    _check(_libc.syncfs(fd), "syncfs")


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    _check(_libc.unshare(flags), f"unshare {flags:#x}")


def setns(fd: int, flags: int = 0) -> None:
    """setns(2). Raises OSError."""
    _check(_libc.setns(fd, flags), "setns")


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2). Raises OSError."""
    syscall(SYS_PIVOT_ROOT, new_root.encode(), put_old.encode(), what=f"pivot_root {new_root!r}")


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2) with integer arguments. Raises OSError."""
    arguments = (ctypes.c_ulong(a) for a in (arg2, arg3, arg4, arg5))
    return _check(int(_libc.prctl(option, *arguments)), f"prctl {option}")


def die_with_parent(signal_number: int, parent: int) -> None:
    """Get `signal_number` when the forking thread dies; exit at once if `parent` (a pid) is gone already."""
    prctl(PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        os._exit(1)


def pidfd_exit_status(pidfd: int) -> int | None:
    """The wait status of a process that has been reaped, by whomever; None while it has not, or where the
    kernel cannot tell (PIDFD_GET_INFO with PIDFD_INFO_EXIT, since Linux 6.15)."""
    info = bytearray(_PIDFD_INFO_SIZE)
    struct.pack_into("=Q", info, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    (mask,), (status,) = struct.unpack_from("=Q", info), struct.unpack_from("=i", info, _PIDFD_INFO_SIZE - 4)
    return int(status) if mask & _PIDFD_INFO_EXIT else None


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): a duplicate of another process's descriptor, close-on-exec. Raises OSError."""
    return syscall(SYS_PIDFD_GETFD, pidfd, fd, 0, what="duplicate a descriptor of another process")


def bare_prctl(option: int, arg2: int = 0) -> None:
    """prctl(2) with nothing around it, for what must execute little: ctypes dirties a third of a megabyte
    for the argument objects of the other one. Raises OSError without an errno."""
    if _bare_prctl(option, arg2, 0, 0, 0) < 0:
        raise OSError(f"prctl {option} failed")


def bare_fork() -> int:
    """fork(2) without what Python does around it (locks made anew, modules' hooks), which dirties pages.

    Only for a process with one thread, whose children have one: no lock is held by anybody else then.
    Raises OSError without an errno.
    """
    pid = int(_bare_fork())
    if pid < 0:
        raise OSError("fork failed")
    return pid


def become_subreaper() -> None:
    """Orphaned descendants become this process's children from now on. Raises OSError."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def capget() -> bytes:
    """The capability sets of this process: struct __user_cap_data_struct[2]."""
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(_CAPABILITY_HEADER, data), "read capabilities")
    return data.raw


def capset(data: bytes) -> None:
    """Set the capability sets, struct __user_cap_data_struct[2]. Raises OSError for more than there is."""
    _check(_libc.capset(_CAPABILITY_HEADER, data), "set capabilities")


def openat2(directory_fd: int, path: str | bytes, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): open with restrictions on how `path` is resolved. Returns a descriptor. Raises OSError."""
    raw = os.fsencode(path)
    how = ctypes.create_string_buffer(struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve), 24)
    return syscall(SYS_OPENAT2, directory_fd, raw, how, 24, what=f"open {os.fsdecode(raw)!r}")
