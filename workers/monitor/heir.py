"""Runs in: the monitor, in a keeper that follows one that died.

The container lives; its descriptors lie in the vault (ipc/vault.py), all else stands in `state.json`. The
successor takes them up, and what is not to be known any more it says: how much output may be missing, as a
record in the log, in the state and in the exit record. The init is no child of it: its exit code comes from
the kernel (a pidfd tells it since Linux 6.15) or from the supervisor, which inherits the init and reaps it.
A vault that died with a supervisor is replaced by what the kernel gives: a pipe lives as long as somebody
writes to it, and can be opened again at the writer's descriptor.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ipc import kernel, vault
from ipc.fds import close_all
from workers.monitor import handing, procfs, records
from workers.monitor.cgroups import Cgroups
from workers.monitor.link import CHILD, GONE, STRANGER, TAKEN, Taken
from workers.monitor.log import Clock, LoggedStream
from workers.monitor.records import StateRecord
from workers.monitor.stdio import PIPE_BYTES, open_log

if TYPE_CHECKING:
    from workers.monitor.keeper import Keeper

LINE_LIMIT = 16 * 1024  # a line begun, which the dead one may have held, beside what it had just read
UNSURE = PIPE_BYTES + LINE_LIMIT
REAPED = "reaped.json"
CODE_PATIENCE = 3.0  # seconds until an exit code that nobody tells is unknown
_POLL = 0.01


def deposit(vault_fd: int, what: Taken, fds: list[int]) -> None:
    """In a hand: what its keeper is given also goes into the vault, but for the log, which has a path, and
    with a pidfd of the init in any case. `fds` stay the caller's. Raises OSError."""
    kept = fds[1:] if what.log else list(fds)
    pidfd = -1
    if what.pid and what.kin == CHILD:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(what.pid)
            kept.insert(int(what.stdin), pidfd)
    kin = STRANGER if pidfd >= 0 else what.kin
    *numbers, memory = what._replace(log=False, kin=kin)
    try:
        vault.put(vault_fd, vault.TAKEN, TAKEN.pack(*numbers) + memory.encode(), kept)
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def without_stdin(vault_fd: int) -> None:
    """In a hand: standard input is closed for good, and a duplicate would keep it open. Raises OSError."""

    def change(kind: bytes, data: bytes, fds: list[int]) -> vault.Message:
        if kind != vault.TAKEN:
            return kind, data, fds
        pid, kin, stdin, *numbers = TAKEN.unpack(data[: TAKEN.size])
        packed = TAKEN.pack(pid, kin, False, *numbers) + data[TAKEN.size :]
        return kind, packed, fds[1:] if stdin else fds

    for _kind, _data, fds in vault.look(vault_fd, change):
        close_all(fds)


def inheritance(
    keeper: Keeper, directory: str, listener: int, vault_fd: int
) -> tuple[int, Callable[[], object] | None]:
    """Return a new keeper's socket, in place of `listener`, and what takes up the rest, None if there is
    nothing.

    The vault has all of it still, for the next one. Raises OSError, msgspec.DecodeError.
    """
    listeners, taken = _look(vault_fd)
    for fd in listeners:
        os.close(listener)
        listener = fd
    state = records.read_state(directory)
    if taken is not None and (state is None or _pid(taken[0]) != state.pid):
        close_all(taken[1])
        taken = None
    if state is None:
        return listener, None
    known = state
    data, fds = taken or _find(state)
    return listener, lambda: _inherit(keeper, directory, known, data, fds)


def _find(state: StateRecord) -> tuple[bytes, list[int]]:
    """What is to be had without a vault: a pidfd, and the pipes, which have kept what is in them."""
    init_fd = procfs.open_pid(state.pid, state.pid_start)
    if init_fd < 0:
        return TAKEN.pack(state.pid, GONE, False, False, 0, 0, -1), []
    oom = handing.follow_oom(state)
    group = Cgroups(state.cgroups)
    version = state.cgroup_version if oom.fds else 0
    # Standard input has had its end: nobody had it open any more.
    data = TAKEN.pack(state.pid, STRANGER, False, False, version, len(oom.fds), oom.others)
    pids = [state.pid, *(group.pids() if group.known() else [])]
    return data + group.memory.encode(), [init_fd, *oom.fds, *reopened(state.pipes, pids)]


def reopened(inodes: list[int], pids: list[int]) -> list[int]:
    """Reading ends of pipes that these processes write to, one for each inode; none if there is no pipe."""
    found: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it is gone
            for name in os.listdir(f"/proc/{pid}/fd"):
                _reopen(f"/proc/{pid}/fd/{name}", inodes, found)
    if not found:
        return []
    return [found[inode] if inode in found else _ended_pipe() for inode in inodes]


def _reopen(path: str, inodes: list[int], found: dict[int, int]) -> None:
    with contextlib.suppress(OSError):
        inode = os.stat(path).st_ino
        if inode not in inodes or inode in found or not os.readlink(path).startswith("pipe:"):
            return
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if os.fstat(fd).st_ino == inode:  # else it was closed just then, and the number is another file's
            found[inode] = fd
        else:
            os.close(fd)


def _ended_pipe() -> int:
    read_fd, write_fd = os.pipe()
    os.close(write_fd)
    return read_fd


def _look(vault_fd: int) -> tuple[list[int], tuple[bytes, list[int]] | None]:
    """The listening sockets, and what was handed over: the last; a hand that died may have left others."""
    listeners: list[int] = []
    taken: tuple[bytes, list[int]] | None = None
    for kind, data, fds in vault.look(vault_fd):
        if kind == vault.LISTENER:
            listeners += fds
        elif kind == vault.TAKEN:
            close_all(taken[1] if taken else [])
            taken = data, fds
    return listeners, taken


def _pid(data: bytes) -> int:
    return int(TAKEN.unpack(data[: TAKEN.size])[0])


def recover(keeper: Keeper, directory: str) -> None:
    """In a keeper whose hand died: if it had created a container, take that up as if it had handed it over.

    Raises OSError, msgspec.DecodeError.
    """
    if keeper.vault < 0:
        return
    listeners, taken = _look(keeper.vault)
    close_all(listeners)
    state = records.read_state(directory)
    if taken is None or state is None or _pid(taken[0]) != state.pid:
        close_all(taken[1] if taken else [])
        return
    data, fds = taken
    pid, kin, stdin, *others = TAKEN.unpack(data[: TAKEN.size])
    if kin == STRANGER and state.ours:  # a successor would be none of its family; this one is its parent
        os.close(fds.pop(int(stdin)))
        data = TAKEN.pack(pid, CHILD, stdin, *others) + data[TAKEN.size :]
    _take_up_log(keeper, state)
    keeper.take(data, fds)


def _inherit(keeper: Keeper, directory: str, state: StateRecord, data: bytes, fds: list[int]) -> None:
    ended = records.read_exit(directory) is not None
    streams = _outputs(data, fds)
    if not ended:
        _take_up_log(keeper, state)
        _note(directory, state, streams)
    keeper.take(data, fds)
    if ended:
        return
    if streams:
        _say_unsure(keeper.outputs)
    else:
        text = "[bulkhead] the container's monitor and the supervisor died together: its output is lost\n"
        LoggedStream("stdout", Clock(), keeper.file).take(text.encode(), False)


def _outputs(data: bytes, fds: list[int]) -> int:
    """How many streams there are."""
    what = Taken._make((*TAKEN.unpack(data[: TAKEN.size]), ""))
    return len(fds) - int(what.stdin) - int(what.kin == STRANGER) - what.oom_fds


def _take_up_log(keeper: Keeper, state: StateRecord) -> None:
    if not state.log_path:
        return
    try:
        fd = open_log(state.log_path)
        _end_torn_record(fd, state.log_path)
    except OSError as error:
        keeper.file.trouble("a successor cannot open the log", error=error)
        return
    keeper.file.replace(fd)


def _end_torn_record(fd: int, path: str) -> None:
    """The dead one may have written half a record."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            os.write(fd, b"\n")


def _note(directory: str, state: StateRecord, streams: int) -> None:
    """Write down that output may be missing. The keeper is alone: no hand writes the state now."""
    changed = msgspec.structs.replace(
        state,
        successions=state.successions + 1,
        log_bytes_unsure=state.log_bytes_unsure + UNSURE * streams,
        output_lost=state.output_lost or not streams,
    )
    with contextlib.suppress(OSError):  # a full disk: the log says it
        records.write_state(directory, changed)


def _say_unsure(streams: list[LoggedStream]) -> None:
    """A record in the log, where output may be missing."""
    for stream in streams:
        text = f"[bulkhead] the container's monitor was replaced: up to {UNSURE} bytes may be missing here\n"
        stream.take(text.encode(), False)


def exit_status(init_fd: int, pid: int, directory: str) -> int | None:
    """The code of an init that was no child of ours: -N for signal N, None if nobody can tell."""
    end = time.monotonic() + CODE_PATIENCE
    while time.monotonic() < end:
        status = kernel.pidfd_exit_status(init_fd) if init_fd >= 0 else None
        if status is not None:
            return os.waitstatus_to_exitcode(status)
        code = _reaped(pid, directory)
        if code is not None:
            return code
        time.sleep(_POLL)
    return None


def _reaped(pid: int, directory: str) -> int | None:
    """What the supervisor wrote down when it reaped the init."""
    with contextlib.suppress(OSError, ValueError, KeyError), open(f"{directory}/{REAPED}", "rb") as file:
        told = json.load(file)
        return int(told["code"]) if told["pid"] == pid else None
    return None
