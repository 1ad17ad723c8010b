"""Runs in: the monitor.

What the monitor leaves on disk for whoever comes after: `cri.json`, in the words of who asked for the
container, `state.json` while the container lives, `exit.json` when it has ended. Each is written beside its
place and renamed, so a reader sees all of it or none.
"""

from __future__ import annotations

import os

import msgspec

from ipc.messages import Body
from ipc.messages.monitor import ExitRecord

STATE = "state.json"
EXIT = "exit.json"
BUNDLE, CONFIG = "bundle", "config.json"
KEPT = "cri.json"
OOM_KILLED = "OOMKilled"
COMPLETED = "Completed"
ERROR = "Error"
START_ERROR = "StartError"


class StateRecord(Body):
    """Content of `state.json`. `pid_start` is field 22 of /proc/PID/stat: with the pid it names a process."""

    container_id: str
    pod_id: str
    status: str
    pid: int
    pid_start: int
    monitor_pid: int
    runtime_name: str
    runtime_path: str
    runtime_root: str
    log_path: str
    created_at_ns: int
    started_at_ns: int = 0
    start_error: str = (
        ""  # why the runtime could not start it; "" too if it was ended before that could be told
    )
    ours: bool = True  # the init is the monitor's child
    runtime_args: list[str] = []
    systemd_cgroup: bool = False
    cgroup_version: int = 2
    cgroups: dict[str, str] = {}  # the container's own: controllers -> directory
    unit: str = ""  # of systemd, if that makes the group
    stdio_uid: int = 0  # who must be able to open the container's streams again
    stdio_gid: int = 0
    terminal: bool = False
    stdin_once: bool = False
    successions: int = 0  # how many monitors have died
    log_bytes_unsure: int = 0  # output that may be missing in the log for that, at most
    output_lost: bool = False  # since one died together with the supervisor
    pipes: list[int] = []  # the inodes of standard output and error; empty for a terminal
    init_program: str = ""  # procfs.program of what executes the container's command


#: Made once, before the forks: what makes them touches many pages, and a monitor has few of its own.
_STATE, _EXIT = msgspec.json.Decoder(StateRecord), msgspec.json.Decoder(ExitRecord)


def exit_reason(code: int, *, oom_kills: int) -> str:
    """Return the CRI's word for an end with `code`."""
    if code == 0:
        return COMPLETED
    return OOM_KILLED if oom_kills else ERROR


def write_state(directory: str, record: StateRecord) -> None:
    """Replace `state.json`. Not fsynced: a machine that loses it has lost the container too."""
    _replace(directory, STATE, msgspec.json.encode(record), durable=False)


def read_state(directory: str) -> StateRecord | None:
    """Return the state record, None if there is none. Raises OSError, msgspec.DecodeError."""
    try:
        with open(os.path.join(directory, STATE), "rb") as file:
            return _STATE.decode(file.read())
    except FileNotFoundError:
        return None


def write_kept(directory: str, data: bytes) -> None:
    """Replace `cri.json`. Not fsynced, like the state record. Raises OSError."""
    _replace(directory, KEPT, data, durable=False)


def write_exit(directory: str, record: ExitRecord) -> None:
    """Replace `exit.json`, on disk before it is seen. Raises OSError."""
    _replace(directory, EXIT, msgspec.json.encode(record), durable=True)


def read_exit(directory: str) -> ExitRecord | None:
    """Return the exit record, None if there is none. Raises OSError, msgspec.DecodeError."""
    try:
        with open(os.path.join(directory, EXIT), "rb") as file:
            return _EXIT.decode(file.read())
    except FileNotFoundError:
        return None


def write_file(path: str, data: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Make or truncate a file with `data` in it. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def write_updated(directory: str, spec: bytes, kept: bytes) -> None:
    """Replace the bundle's config.json and, if there are any, the caller's words. Raises OSError."""
    _replace(os.path.join(directory, BUNDLE), CONFIG, spec, durable=False)
    if kept:
        write_kept(directory, kept)


def _replace(directory: str, name: str, data: bytes, *, durable: bool) -> None:
    path = os.path.join(directory, name)
    write_file(path + ".new", data, mode=0o640, durable=durable)
    os.rename(path + ".new", path)
    if durable:
        _sync_directory(directory)


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
