"""Runs in: the monitor, in a hand.

A hand may die while its start is under way: the runtime's call goes on as the keeper's child, and nobody
writes down that the container was started. The next hand finds out before it makes the call again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import msgspec

from ipc.errors import RemoteError
from workers.monitor import procfs
from workers.monitor.runtime import Launcher, Outcome, Runtime, Streams

CALL_PATIENCE, LOOK = 10.0, 0.005  # seconds
STATE_TIMEOUT = 10.0  # seconds for the runtime's `state`
STATE_LIMIT = 65536


def _orphans(keeper: int) -> Iterator[tuple[int, procfs.Stat]]:
    for pid in procfs.children(keeper):
        fact = procfs.stat(pid)
        if fact is not None and fact.state != "Z" and pid != os.getpid():
            yield pid, fact


def calls_go_on(keeper: int) -> bool:
    """Say whether a call of the runtime that a dead hand has made goes on.

    It is in our session, a container is not.
    """
    session = os.getsid(0)
    return any(fact.session == session for _pid, fact in _orphans(keeper))


def find_out(
    launcher: Launcher,
    runtime: Runtime,
    container_id: str,
    keeper: int,
    answer: Callable[[bool], object],
) -> None:
    """Say whether the container runs, once, when calls that a dead hand has made are over.

    They are not killed: that may leave a container of which the runtime does not know whether it runs.
    """
    loop = launcher.loop
    until = loop.time() + CALL_PATIENCE

    def look() -> None:
        if calls_go_on(keeper) and loop.time() < until:
            loop.call_later(LOOK, look)
        else:
            _ask(launcher, runtime, container_id, answer)

    look()


def _ask(launcher: Launcher, runtime: Runtime, container_id: str, answer: Callable[[bool], object]) -> None:
    fd = os.memfd_create("runtime-state", os.MFD_CLOEXEC)

    def told(outcome: Outcome) -> None:
        runs = outcome.ok and _status(os.pread(fd, STATE_LIMIT, 0)) == "running"
        os.close(fd)
        answer(runs)

    argv = runtime.argv("state", container_id)
    try:
        launcher.call(argv, told, timeout=STATE_TIMEOUT, streams=Streams(stdout=fd))
    except RemoteError:
        os.close(fd)
        answer(False)


def _status(said: bytes) -> str:
    try:
        return str(msgspec.json.decode(said, type=dict[str, object]).get("status", ""))
    except msgspec.DecodeError:
        return ""
