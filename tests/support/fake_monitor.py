"""Runs in: the tests' supervisor, as the monitor of a container.

It answers `monitor.container.state`; on `monitor.container.delete` it writes an exit record and ends.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ipc import vault
from ipc.loop import Loop
from ipc.messages import Empty, monitor
from ipc.serve import Call, Server
from ipc.table import Handler, table

CALLERS = frozenset({"root", "cri"})


def prepare_process(
    make_context: Callable[[str], Any], _programs: Sequence[str], _group_fd: int
) -> Callable[[str], Any]:
    """All that is needed."""
    return make_context


def run(names: Sequence[str], fds: Sequence[int], make_context: Callable[[str], Any]) -> None:
    _, container_id, pod_id, directory, *successor = names
    lock_fd, listener_fd, *_ = fds
    if successor:
        listener_fd = next(found[0] for kind, _, found in vault.look(fds[2]) if kind == vault.LISTENER)
    context = make_context(container_id)
    loop = Loop()
    listener = socket.socket(fileno=listener_fd)

    def state(_call: Call, _body: monitor.StateGet) -> monitor.State:
        fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        text = " ".join(
            f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}"
            for fd in fds
            if os.path.lexists(f"/proc/self/fd/{fd}")
        )
        return monitor.State(container_id=f"{container_id}/{pod_id}", status=text, monitor_pid=os.getpid())

    def delete(call: Call, _body: monitor.Delete) -> None:
        Path(directory, "exit.json").write_text("{}")
        call.reply(Empty())
        loop.call_later(0.05, loop.stop)

    handlers = table(Handler(monitor.StateGet, state, CALLERS), Handler(monitor.Delete, delete, CALLERS))
    Server(loop, handlers, context.settings.uids).listen(listener)
    context.log.info("fake monitor runs", container=container_id)
    assert os.fstat(lock_fd)
    loop.run()
