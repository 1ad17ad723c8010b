"""Runs in: the monitor, in a hand.

What a hand leaves of the container that it has created: the state record, for the hands to come, and what
it gives to its keeper. Also what a hand before it may have left that died while it created: nothing tells how
far it came, so all of it goes, and the creation begins anew.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence

from ipc.messages.monitor import Create
from workers.monitor import procfs
from workers.monitor.cgroups import Cgroups
from workers.monitor.creation import CONSOLE, PID_FILE, Born
from workers.monitor.ending import DELETE_TIMEOUT
from workers.monitor.link import CHILD, GONE, STRANGER, Taken
from workers.monitor.oom import Followed, follow
from workers.monitor.records import BUNDLE, CONFIG, StateRecord
from workers.monitor.runtime import Launcher, Runtime

_KILLS, _KILL_PAUSE = 50, 0.002


def kinship(pid: int, monitor_pid: int) -> tuple[int, int]:
    """Whose child the init is, and a pidfd if it is somebody else's (a virtual machine's, say)."""
    fact = procfs.stat(pid)
    if fact is not None and fact.parent != monitor_pid:
        with contextlib.suppress(ProcessLookupError):
            return STRANGER, os.pidfd_open(pid)
    return (CHILD if fact is not None else GONE), -1


def record_of(
    request: Create, born: Born, *, container_id: str, pod_id: str, monitor_pid: int, ours: bool
) -> StateRecord:
    """The state of a container that was created just now."""
    pid = born.pid
    fact = procfs.stat(pid)
    cgroups = Cgroups.of_process(pid, request.cgroup_path, container_id)
    return StateRecord(
        container_id=container_id,
        pod_id=pod_id,
        status="created",
        pid=pid,
        pid_start=fact.start if fact is not None else 0,
        monitor_pid=monitor_pid,
        runtime_name=request.runtime_name,
        runtime_path=request.runtime_path,
        runtime_root=request.runtime_root,
        log_path=request.log_path,
        created_at_ns=time.time_ns(),
        ours=ours,
        runtime_args=request.runtime_args,
        systemd_cgroup=request.systemd_cgroup,
        cgroup_version=request.cgroup_version,
        cgroups=cgroups.directories,
        unit=os.path.basename(request.cgroup_path) if request.systemd_cgroup else "",
        stdio_uid=request.stdio_uid,
        stdio_gid=request.stdio_gid,
        terminal=request.terminal,
        stdin_once=request.stdin_once,
        init_program=procfs.program(pid),
        pipes=[] if request.terminal else [os.fstat(fd).st_ino for _, fd in born.outputs],
    )


def gift(born: Born, kin: int, pidfd: int, log_fd: int, record: StateRecord) -> tuple[Taken, list[int]]:
    """What the keeper is given, in the order of `Taken`."""
    oom = follow_oom(record)
    first = (log_fd, -1 if born.stdin_fd is None else born.stdin_fd, pidfd)
    what = Taken(
        born.pid,
        kin,
        born.stdin_fd is not None,
        log_fd >= 0,
        record.cgroup_version if oom.fds else 0,
        len(oom.fds),
        oom.others,
        Cgroups(record.cgroups).memory,
    )
    return what, [*(fd for fd in first if fd >= 0), *oom.fds, *(fd for _, fd in born.outputs)]


def follow_oom(record: StateRecord) -> Followed:
    """Follow the count of kills where the group may vanish before it is read."""
    memory = Cgroups(record.cgroups).memory
    if record.systemd_cgroup and memory:
        with contextlib.suppress(OSError):  # without events there is still the count at the end
            return follow(memory, record.cgroup_version)
    return Followed([], -1)


# -- what a hand that died has left -------------------------------------------------------------------------


def was_begun(directory: str) -> bool:
    """True if a creation was begun here before."""
    return os.path.lexists(os.path.join(directory, BUNDLE, CONFIG))


def clear(
    launcher: Launcher, runtime: Runtime, container_id: str, directory: str, then: Callable[[], object]
) -> None:
    """End what a creation that was cut off has left, and go on. Raises RemoteError."""
    _kill(os.getppid(), runtime, container_id)
    for name in (PID_FILE, f".{PID_FILE}", CONSOLE):  # runc makes the second one only if it is not there
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
    argv: Sequence[str] = runtime.argv("delete", "--force", container_id)
    launcher.call(list(argv), lambda _outcome: then(), timeout=DELETE_TIMEOUT)


def _kill(monitor_pid: int, runtime: Runtime, container_id: str) -> None:
    """Kill the keeper's other children: while there is no container they are what is left of a runtime.

    So are calls for this container that are somebody else's: their keeper died too.
    """
    for _ in range(_KILLS):
        left = {*procfs.children(monitor_pid), *_calls(runtime, container_id)} - {os.getpid()}
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_KILL_PAUSE)


def _calls(runtime: Runtime, container_id: str) -> Iterator[int]:
    for pid in procfs.all_pids():
        words = procfs.command_line(pid)
        if words[-1:] == [container_id] and runtime.root in words:
            yield pid
