"""Runs in: the supervisor, and for the first moments in each of its children.

The one place where the supervisor forks. A child resets what it inherited, closes what it was not given, and
waits at a start gate until the parent has put it into its cgroup; it never runs the parent's cleanup and
leaves only through os._exit. It refuses to fork if there is more than one task in the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from ipc import kernel
from ipc import log as ipc_log
from ipc.log import Log
from ipc.messages.supervisor import SandboxReport
from ipc.settings import Common
from supervisor.sandbox.spec import Identity
from supervisor.table import Entry
from supervisor.title import set_title

DUMP_SIGNAL = signal.SIGUSR2  # a worker writes where each of its threads is
BUG_STATUS = 70  # EX_SOFTWARE: an exception nobody expected
GATE_STATUS = 75  # EX_TEMPFAIL: the parent went away before the gate opened

_TREE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BOOT = "workers.boot"  # the first code of every worker

#: Sockets and other things a child keeps beyond 0, 1, 2.
Descriptors = Collection[int]


@dataclass
class Child:
    """A child at the start gate."""

    pid: int
    gate_fd: int

    def open_gate(self) -> None:
        """Let it go on. No error if it died meanwhile."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.gate_fd, b"\n")
        os.close(self.gate_fd)


@dataclass
class WorkerContext:
    """What a monitor is handed: the same fields as workers.boot.Context, without the imports of boot, which
    the supervisor must not load."""

    kind: str
    settings: Common
    log: Log
    listener: socket.socket | None = None
    control: socket.socket | None = None
    extra: dict[str, socket.socket] = field(default_factory=dict)
    report: SandboxReport = field(default_factory=lambda: SandboxReport(uid=0, gid=0))
    standby: bool = False


@dataclass(frozen=True)
class Job:
    """What to fork. `work` runs in the child after the gate; returning is a clean exit.

    `log`: the child's own. `keep`: descriptors it keeps. `stderr_fd`: where its standard error goes, None for
    /dev/null. `dies_with_parent`: SIGKILL when the supervisor dies.
    """

    title: str
    work: Callable[[], object]
    log: Log
    keep: Descriptors = ()
    stderr_fd: int | None = None
    dies_with_parent: bool = True


def freeze() -> None:
    """Once, after every module that children share is loaded: no collection touches their pages again."""
    gc.collect()
    gc.freeze()


def tasks() -> int:
    """Return the number of tasks (threads) of this process."""
    return os.stat("/proc/self/task").st_nlink - 2  # a directory per task


def fork(job: Job) -> Child:
    """Fork a child that waits at its gate. Raises OSError if there can be no child."""
    assert tasks() == 1, "the supervisor must have one task when it forks"
    look_in_kept_tree(_TREE)
    gate_read, gate_write = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        os.close(gate_read)
        os.close(gate_write)
        raise
    if pid == 0:
        _child(job, gate_read, parent)
    os.close(gate_read)
    return Child(pid, gate_write)


def _child(job: Job, gate_fd: int, parent: int) -> None:
    status = BUG_STATUS
    try:
        # The loop's handlers stay: they do nothing by themselves, exec resets them, and setting each anew
        # dirties 300 KiB in every child. The loop is left alone; its descriptor is closed with the rest.
        signal.set_wakeup_fd(-1)
        _redirect(job.stderr_fd)
        close_all_but({0, 1, 2, gate_fd, *job.keep})
        os.setsid()
        set_title(job.title)
        ipc_log.set_log(job.log)
        if job.dies_with_parent:
            kernel.die_with_parent(signal.SIGKILL, parent)
        if job.stderr_fd is not None:
            faulthandler.enable(2)  # SIGABRT of a worker that hangs shows where
            faulthandler.register(DUMP_SIGNAL, 2)  # and this one where a worker is that goes on
        status = GATE_STATUS
        if _pass_gate(gate_fd):
            status = BUG_STATUS
            job.work()
            status = 0
    except BaseException as error:  # noqa: BLE001 - a child never runs its parent's clean-up
        job.log.bug("process ended by a bug", error)
    finally:
        os._exit(status)


def _redirect(stderr_fd: int | None) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(null if stderr_fd is None else stderr_fd, 2)


def close_all_but(keep: Collection[int]) -> None:
    """Close every descriptor but these; close-on-exec means nothing without exec."""
    low = 0
    for fd in sorted(keep):
        if low < fd:  # closerange(0, 0) would close everything: CPython passes -1 on as the last one
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 20)


def _pass_gate(gate_fd: int) -> bool:
    opened = os.read(gate_fd, 1) == b"\n"
    os.close(gate_fd)
    return opened


# -- what children do ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerPlan:
    """Everything a worker is made of."""

    entry: Entry
    settings: Common
    identity: Identity
    paths: Mapping[str, str]
    log: Log
    control: socket.socket
    listener: socket.socket | None = None
    extra: Mapping[str, socket.socket] = field(default_factory=dict)
    standby: bool = False  # another worker of the kind still owns what this one will own

    def descriptors(self) -> list[int]:
        """What the worker keeps."""
        sockets = [self.control, *self.extra.values(), *([self.listener] if self.listener else [])]
        return [sock.fileno() for sock in sockets]


def run_worker(plan: WorkerPlan) -> None:
    """A worker's life, in the child: imports, sandbox, its module's run (workers/boot.py)."""
    do_without(plan.entry.without)
    boot = importlib.import_module(BOOT)
    module = importlib.import_module(plan.entry.module)
    context = boot.Context(
        kind=plan.entry.kind,
        settings=plan.settings,
        log=plan.log,
        listener=plan.listener,
        control=plan.control,
        extra=dict(plan.extra),
        standby=plan.standby,
    )
    boot.main(module, context, lambda: _enter(plan))


def do_without(modules: Collection[str]) -> None:
    """Make imports of these fail, here and in what is imported: libraries take what they find."""
    for name in modules:
        sys.modules[name] = None  # type: ignore[assignment]  # the language's own way to say so


def look_in_kept_tree(tree: str) -> None:
    """Import from `.NAME` beside the tree of this program if that is gone.

    Packages keep a copy there from when an upgrade removes the tree until the program was upgraded too.
    """
    directory, name = os.path.split(tree)
    kept = f"{directory}/.{name}"
    if os.path.isdir(f"{tree}/workers") or not os.path.isdir(f"{kept}/workers"):
        return
    sys.path[:] = [kept if path == tree else path for path in sys.path]
    for module in list(sys.modules.values()):
        places = getattr(module, "__path__", None)
        if isinstance(places, list):
            places[:] = [kept + path.removeprefix(tree) if path.startswith(tree) else path for path in places]
    sys.path_importer_cache.clear()


def _enter(plan: WorkerPlan) -> SandboxReport:
    # The log must be connected while its path can still be reached.
    with contextlib.suppress(OSError):
        plan.log.connect()
    if plan.entry.sandbox is None:
        return SandboxReport(uid=os.getuid(), gid=os.getgid(), groups=os.getgroups())
    from supervisor.sandbox import enter

    return enter(plan.entry.sandbox, plan.identity, plan.paths)


def spawn_program(argv: list[str], output_fd: int) -> int:
    """Start a program with its output into a descriptor and nothing else open. Returns its pid.

    Raises OSError. The parent's descriptors are all close-on-exec.
    """
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output_fd, 1),
        (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
    ]
    return os.posix_spawn(
        argv[0], argv, dict(os.environ), file_actions=actions, setsigmask=[], setsigdef=[signal.SIGPIPE]
    )
