"""Runs in: a process of its own, `python -m tests.support.monitor_parent RUN_ROOT ID...`.

A parent of monitors that is as small as the supervisor is meant to be, with the supervisor's nursery: it
loads the monitor, freezes, has a monitor forked for each id, says their pids and then only waits for the end
of its input.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import socket
import sys
from collections.abc import Sequence
from typing import cast

from ipc import kernel
from ipc.log import Log
from ipc.settings import MonitorSettings
from supervisor import spawn
from supervisor.nursery import Life, Nursery
from supervisor.worker import Ground

main = importlib.import_module("workers.monitor.main")


class Context:
    """What the supervisor hands to a monitor."""

    def __init__(self, run_root: str) -> None:
        self.settings = MonitorSettings(root="/", run_root=run_root)
        self.log = Log("monitor", level="error")


class Parent:
    """What a nursery needs of the supervisor."""

    log_socket = ""
    log = Log("parent")

    @property
    def reaper(self) -> Parent:
        return self

    def watch(self, _pid: int, _callback: object) -> None:
        """Children are not reaped here."""

    @property
    def groups(self) -> Parent:
        return self

    monitors = ""

    def make(self, _group: str) -> None:
        """There are no groups."""

    def enter(self, _group: str, _pid: int) -> None:
        """Nor members."""


def start(context: Context, container_id: str, nursery: Nursery) -> int:
    """Have one monitor forked, return its pid."""
    directory = context.settings.monitor_directory(container_id)
    os.makedirs(directory)
    lock_fd = os.open(directory + "/lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(directory + "/ctl.sock")
        listener.listen(64)
        pid = nursery.fork(["monitor", container_id, "pod", directory], (lock_fd, listener.fileno()))
    os.close(lock_fd)
    return pid


def run(run_root: str, ids: list[str]) -> None:
    """Start them all, wait for the end of input, reap them."""
    context = Context(run_root)

    def make_context(_container_id: str) -> Context:
        return context

    def prepare() -> Life:
        ground = main.prepare_process(make_context)

        def live(words: Sequence[str], fds: Sequence[int]) -> None:
            main.run(words, fds, ground)

        return live

    main.preload()
    spawn.freeze()
    kernel.become_subreaper()
    nursery = Nursery(cast("Ground", Parent()))
    nursery.add("monitor", prepare)
    for container_id in ids:
        os.write(1, b"%d\n" % start(context, container_id, nursery))
    os.close(1)
    os.read(0, 1)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
