"""Runs in: a process of its own, `python -m tests.support.monitor_parent RUN_ROOT ID...`.

A parent of monitors as small and quiet as the supervisor is meant to be: it loads the monitor, freezes, does
for each id what the supervisor does, says their pids and then only waits for the end of its input.
"""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import sys

from ipc.log import Log
from ipc.settings import MonitorSettings
from workers.monitor import main


class Context:
    """What the supervisor hands to a monitor."""

    def __init__(self, run_root: str) -> None:
        self.settings = MonitorSettings(root="/", run_root=run_root)
        self.log = Log("monitor", level="error")


def start(context: Context, container_id: str, ground: main.Ground) -> int:
    """Fork one monitor, return its pid."""
    directory = context.settings.monitor_directory(container_id)
    os.makedirs(directory)
    lock_fd = os.open(directory + "/lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(directory + "/ctl.sock")
    listener.listen(64)
    pid = os.fork()
    if pid == 0:
        try:
            main.run(
                lambda: context,
                container_id=container_id,
                pod_id="pod",
                directory=directory,
                lock_fd=lock_fd,
                listener_fd=listener.fileno(),
                ground=ground,
            )
        finally:
            os._exit(0)
    os.close(lock_fd)
    listener.close()
    return pid


def run(run_root: str, ids: list[str]) -> None:
    """Start them all, wait for the end of input, reap them."""
    main.preload()
    ground = main.prepare_process()
    gc.collect()
    gc.freeze()
    context = Context(run_root)
    for container_id in ids:
        os.write(1, b"%d\n" % start(context, container_id, ground))
    os.close(1)
    os.read(0, 1)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
