"""Runs in: every process that locks itself in (data only).

System calls by purpose: what the seccomp lists of workers (supervisor/sandbox/seccomp.py) and of
short-lived children (ipc/confine.py) are composed of. A call that is in no group of a list is refused.
"""

from __future__ import annotations

import socket
import termios

from ipc.seccomp import SELF, Check, Conditions, one_of


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Memory, time, own identity, signals to oneself: what any Python process does.
PROCESS = _words(
    "munmap mremap madvise brk membarrier mincore msync"
    " futex futex_waitv futex_wait futex_wake futex_requeue"
    " set_robust_list get_robust_list rseq set_tid_address"
    " sched_yield sched_getaffinity sched_getparam sched_getscheduler getcpu"
    " clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times"
    " getpid gettid getppid getpgrp getpgid getsid"
    " getuid geteuid getgid getegid getresuid getresgid getgroups"
    " rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack"
    " pause alarm getitimer setitimer restart_syscall exit exit_group"
    " uname sysinfo getrusage getrlimit getrandom capget"
)

#: Descriptors that are there already, and making pipes, timers and sealed memory.
DESCRIPTORS = _words(
    "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range"
    " dup dup2 dup3 fcntl pipe pipe2 eventfd eventfd2 memfd_create ftruncate sendfile splice tee"
    " epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll select pselect6"
    " timerfd_create timerfd_settime timerfd_gettime signalfd signalfd4"
)

#: Looking at files; which ones is a matter of the mount view and Landlock.
READ_FILES = _words(
    "open openat openat2 stat lstat fstat newfstatat statx statfs fstatfs access faccessat faccessat2"
    " readlink readlinkat getcwd getdents64 fadvise64 readahead flock"
    " getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr"
)

#: Making, changing and removing regular files and directories.
WRITE_FILES = _words(
    "truncate fallocate fsync fdatasync sync_file_range copy_file_range creat umask"
    " rename renameat renameat2 unlink unlinkat mkdir mkdirat rmdir link linkat"
    " chmod fchmod fchmodat fchmodat2 utime utimes futimesat utimensat"
)

#: What an archive contains beyond that: owners, links, device nodes, extended attributes.
ARCHIVE_FILES = _words(
    "symlink symlinkat mknod mknodat chown lchown fchown fchownat"
    " setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr chdir fchdir"
)

#: Sockets that are there already, and those that CONDITIONAL lets a list make.
SOCKETS = _words(
    "bind listen accept accept4 connect shutdown getsockname getpeername getsockopt setsockopt"
    " sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg"
)

#: Only descriptors that are there already: no connect, no bind.
MESSAGES = _words("sendto recvfrom sendmsg recvmsg shutdown getsockopt setsockopt getsockname getpeername")

#: glibc tries clone3 first, whose flags no filter can see, and falls back on clone if it is missing.
MISSING = _words("clone3")

_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020000 | 0x00000080  # every CLONE_NEW* flag: NS, CGROUP, UTS, IPC, USER, PID, NET; TIME
_PROT_EXEC = 0x4

#: Threads, never processes, never namespaces.
THREADS: dict[str, Conditions] = {
    "clone": ((Check(0, _CLONE_THREAD, _CLONE_THREAD | _CLONE_NEW),),),
}

_IOCTLS = (
    termios.TCGETS,  # isatty
    termios.TIOCGWINSZ,
    termios.FIONREAD,
    termios.FIONBIO,
    termios.FIOCLEX,
    termios.FIONCLEX,
)
_PRCTLS = (
    1,  # PR_SET_PDEATHSIG
    2,  # PR_GET_PDEATHSIG
    3,  # PR_GET_DUMPABLE
    15,  # PR_SET_NAME
    16,  # PR_GET_NAME
    21,  # PR_GET_SECCOMP
    23,  # PR_CAPBSET_READ
    39,  # PR_GET_NO_NEW_PRIVS
)

#: Calls that a closed list lets pass with these arguments only.
CONDITIONAL: dict[str, Conditions] = {
    "mmap": ((Check(2, 0, _PROT_EXEC),),),  # no new code: everything is loaded by now
    "mprotect": ((Check(2, 0, _PROT_EXEC),),),
    "kill": one_of(0, (SELF,)),
    "tgkill": one_of(0, (SELF,)),
    "prlimit64": one_of(0, (0, SELF)),
    "ioctl": one_of(1, _IOCTLS),
    "prctl": one_of(0, _PRCTLS),
    "socketpair": one_of(0, (socket.AF_UNIX,)),
}

#: For the size of a container's terminal, besides the rest.
TERMINALS: dict[str, Conditions] = {"ioctl": one_of(1, (*_IOCTLS, termios.TIOCSWINSZ))}

#: Sockets of this host only.
LOCAL_SOCKETS: dict[str, Conditions] = {"socket": one_of(0, (socket.AF_UNIX,))}

#: Those, the internet's, and the routing question that getaddrinfo asks (AI_ADDRCONFIG).
INTERNET_SOCKETS: dict[str, Conditions] = {
    "socket": (
        *one_of(0, (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)),
        (Check(0, socket.AF_NETLINK), Check(2, 0)),
    )
}

#: What no worker and no child of one has any use for, privileged or not.
DANGEROUS = _words(
    "kexec_load kexec_file_load init_module finit_module delete_module reboot swapon swapoff acct"
    " ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd"
    " perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register"
    " add_key request_key keyctl open_by_handle_at lookup_dcookie"
    " clock_settime clock_adjtime adjtimex settimeofday iopl ioperm modify_ldt vhangup syslog"
    " move_pages migrate_pages mbind set_mempolicy get_mempolicy set_mempolicy_home_node"
    " nfsservctl uselib _sysctl personality"
)
