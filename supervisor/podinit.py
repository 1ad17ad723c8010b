"""Runs in: the init of a pod that shares its PID namespace, first process of that namespace.

Forked twice: the first child makes the PID namespace and ends, the second is process 1 in it. That one has
an empty root, no capability, a user of its own and a short list of system calls; it reaps whatever is
orphaned in the pod and waits for SIGTERM. It holds a lock, by which a later supervisor finds it.

In a pod with a user namespace the PID namespace belongs to that one, and so does the init: its user is the
root of it, still without a capability, because nobody else is sure to be mapped.
"""

from __future__ import annotations

import contextlib
import os
import signal

from ipc import confine, kernel, log
from ipc import syscall_groups as calls
from ipc.seccomp import Policy
from supervisor.sandbox.spec import Identity
from supervisor.title import set_title

SIGNALS = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT})
OOM_SCORE = -998  # as the pause container it replaces: the pod's own processes go first

_CALLS = (
    "wait4 waitid rt_sigtimedwait rt_sigprocmask rt_sigaction rt_sigreturn restart_syscall exit exit_group "
    "munmap madvise brk mremap futex getpid gettid clock_gettime clock_nanosleep write close close_range"
)
POLICY = Policy(
    name="init", allowed=frozenset(_CALLS.split()), conditional={"mmap": calls.CONDITIONAL["mmap"]}
)


def filter_program() -> bytes | None:
    """Return the filter of system calls as what the kernel takes."""
    return confine.program_of(POLICY, 1)


def launch(
    title: str,
    identity: Identity,
    empty: str,
    program: bytes | None,
    *,
    lock_fd: int,
    link_fd: int,
    user_namespace: str = "",
) -> None:
    """In the first child: make the namespace, fork its first process, tell its pid. Raises OSError.

    `program`: what `filter_program` returned before the fork, for the first process to be small. `link_fd`: a
    socket to the supervisor, over which the pid goes and a newline comes when the first process may begin.
    `user_namespace`: the pin of the pod's, "" if it has none.
    """
    _lower_oom_score()
    if user_namespace:
        _enter(user_namespace)
        identity = Identity(0, 0)
    kernel.unshare(kernel.CLONE_NEWPID)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the kernel drops what a process 1 does not expect
    pid = kernel.bare_fork()
    if pid == 0:
        _first_process(title, identity, empty, program, lock_fd=lock_fd, link_fd=link_fd)
    os.write(link_fd, f"{pid}\n".encode())


def _first_process(
    title: str,
    identity: Identity,
    empty: str,
    program: bytes | None,
    *,
    lock_fd: int,
    link_fd: int,
) -> None:
    status = 1
    try:
        os.setsid()
        set_title(title)
        opened = os.read(link_fd, 1) == b"\n"
        os.close(link_fd)
        if opened:
            with contextlib.suppress(OSError):
                log.get().connect()  # while its path can be reached
            _confine(identity, empty, program)
            os.closerange(3, lock_fd)
            os.closerange(lock_fd + 1, 1 << 10)
            _reap_for_ever()
            status = 0
    except BaseException as error:  # noqa: BLE001 - a child never runs its parent's clean-up
        log.get().bug("pod init ended by a bug", error)
    finally:
        os._exit(status)


def _lower_oom_score() -> None:
    """Before a user namespace, in which it may not; without CAP_SYS_RESOURCE it keeps the supervisor's."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(OOM_SCORE))


def _enter(user_namespace: str) -> None:
    fd = os.open(user_namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        kernel.setns(fd, kernel.CLONE_NEWUSER)
    finally:
        os.close(fd)


def _confine(identity: Identity, empty: str, program: bytes | None) -> None:
    os.chdir(empty)
    os.chroot(".")
    confine.become(identity.uid, identity.gid, (), ())
    confine.no_new_privileges()
    confine.filter_by(program)


def _reap_for_ever() -> None:
    """Reap until SIGTERM or SIGINT. The signals are blocked, so none is lost between two turns."""
    while signal.sigwait(SIGNALS) == signal.SIGCHLD:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
