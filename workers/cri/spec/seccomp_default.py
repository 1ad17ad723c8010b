"""Runs in: cri. The system calls that RuntimeDefault allows, as data.

Owns the tables only; `seccomp.py` makes a profile of them. The rule by which a call is in a table: ALLOWED if
it acts on the caller's own files, memory, processes and sockets, guarded by the kernel's ordinary checks;
GATED if it is for whoever holds a capability; DENIED (EPERM) if it reaches the node as a whole or keys and
interfaces that no namespace contains. In no table, or newer than these tables: ENOSYS, so that libraries
fall back to what they know. Names that a machine lacks do no harm, runtimes pass over them.
"""

from __future__ import annotations

from .words import words

_FILES = words("""
    access cachestat chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3
    faccessat faccessat2 fadvise64 fadvise64_64 arm_fadvise64_64 fallocate fanotify_mark fchdir fchmod
    fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr file_getattr file_setattr
    flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate
    ftruncate64 futimesat getcwd getdents getdents64 getxattr getxattrat inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch ioctl lchown lchown32 lgetxattr link linkat listxattr listxattrat
    llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat
    name_to_handle_at newfstatat open openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read
    readahead readdir readlink readlinkat readv removexattr removexattrat rename renameat renameat2 rmdir
    sendfile sendfile64 setxattr setxattrat splice stat stat64 statfs statfs64 statx symlink symlinkat sync
    sync_file_range sync_file_range2 arm_sync_file_range syncfs tee truncate truncate64 umask unlink
    unlinkat utime utimensat utimensat_time64 utimes vmsplice write writev
""")
_WAITING = words("""
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
    eventfd eventfd2 io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit
    _newselect pause poll ppoll ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64
""")
_MEMORY = words("""
    brk cacheflush get_mempolicy madvise map_shadow_stack mbind membarrier memfd_create memfd_secret mincore
    mlock mlock2 mlockall mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc
    pkey_free pkey_mprotect process_madvise process_mrelease remap_file_pages set_mempolicy
    set_mempolicy_home_node
""")
_PROCESSES = words("""
    alarm arch_prctl breakpoint capget capset execve execveat exit exit_group fork futex futex_requeue
    futex_time64 futex_wait futex_waitv futex_wake get_robust_list get_thread_area getcpu getegid getegid32
    geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid gettid
    getuid getuid32 ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self modify_ldt nice pidfd_open pidfd_send_signal pipe pipe2 prctl prlimit64 ptrace
    restart_syscall riscv_hwprobe rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
    rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
    sched_setparam sched_setscheduler sched_yield seccomp set_robust_list set_thread_area set_tid_address
    set_tls setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid
    setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32
    setrlimit setsid setuid setuid32 sigaction sigaltstack signal sigpending sigprocmask sigreturn
    sigsuspend sysinfo tgkill times tkill ugetrlimit uname vfork wait4 waitid waitpid
""")
_TIME = words("""
    clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64
    gettimeofday nanosleep time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64
    timer_settime timer_settime64
""")
_SOCKETS = words("""
    accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg
    recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair
""")
_IPC = words("""
    ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
    mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop
    semtimedop_time64 shmat shmctl shmdt shmget
""")

ALLOWED: tuple[str, ...] = (*_FILES, *_WAITING, *_MEMORY, *_PROCESSES, *_TIME, *_SOCKETS, *_IPC)

#: What every holder of the capability may call, whatever the arguments; who has none of them gets EPERM.
GATED: dict[str, tuple[str, ...]] = {
    "CAP_SYS_ADMIN": words("""
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick listmount listns lookup_dcookie
        lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree
        open_tree_attr perf_event_open pivot_root quotactl quotactl_fd setdomainname sethostname setns
        statmount syslog umount umount2 unshare
    """),
    "CAP_BPF": words("bpf"),
    "CAP_PERFMON": words("perf_event_open"),
    "CAP_DAC_READ_SEARCH": words("open_by_handle_at"),
    "CAP_SYS_BOOT": words("reboot"),
    "CAP_SYS_CHROOT": words("chroot"),
    "CAP_SYS_MODULE": words("delete_module finit_module init_module"),
    "CAP_SYS_NICE": words("migrate_pages move_pages"),
    "CAP_SYS_PACCT": words("acct"),
    "CAP_SYS_PTRACE": words("kcmp pidfd_getfd process_vm_readv process_vm_writev"),
    "CAP_SYS_RAWIO": words("ioperm iopl"),
    "CAP_SYS_TIME": words(
        "adjtimex clock_adjtime clock_adjtime64 clock_settime clock_settime64 settimeofday stime"
    ),
    "CAP_SYS_TTY_CONFIG": words("vhangup"),
    "CAP_SYSLOG": words("syslog"),
}

#: Gated calls that answer ENOSYS and not EPERM: C libraries try these first and know what to do without.
QUIET: tuple[str, ...] = ("clone3", "statmount", "listmount")

DENIED: tuple[str, ...] = words("""
    add_key keyctl request_key kexec_file_load kexec_load swapoff swapon userfaultfd nfsservctl
""")

#: clone(2) flags that make namespaces: NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET. (clone3 hides its
#: flags in memory where a filter cannot look, so it is gated as a whole.)
NAMESPACE_FLAGS: tuple[int, ...] = (
    0x00020000,
    0x02000000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)

#: Personalities that only report another kernel or word size: PER_LINUX, PER_LINUX32, UNAME26, both, and
#: "tell me".
PERSONALITIES: tuple[int, ...] = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)

#: The socket(2) family that no network namespace contains: AF_VSOCK talks to the hypervisor. (One only: rules
#: of one call are joined by OR, several "not equal" would allow all.)
DENIED_FAMILY = 40

#: Kernel's name of the machine -> architectures of one profile: 32-bit programs run under the same rules.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}
