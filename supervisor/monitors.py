"""Runs in: the supervisor.

Has the monitor of a container forked (supervisor/nursery.py); from then on it belongs to nobody, but one that
dies has a successor (supervisor/succession.py). Directory, lock and listening socket are made before the
fork, so that whoever asked may connect as soon as he has the answer.
It owns `<run_root>/monitors/`, but for what a monitor writes into its own directory.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Sequence

from ipc import channel
from ipc.errors import precondition
from ipc.log import Log
from ipc.messages.supervisor import MonitorState
from ipc.settings import MonitorSettings
from supervisor import held, spawn
from supervisor.files import remove_tree
from supervisor.heritage import WardRow
from supervisor.notify import Notifier
from supervisor.nursery import Life, Nursery
from supervisor.sandbox.spec import Identity
from supervisor.succession import Succession
from supervisor.table import Entry
from supervisor.tally import Tally, describe
from supervisor.title import set_title
from supervisor.worker import Ground

SHORT_ID = 12
SUCCESSOR = 4  # the word that makes one


class Monitors:
    """All of them."""

    def __init__(
        self,
        ground: Ground,
        entry: Entry,
        settings: Callable[[], MonitorSettings],
        cri: Identity,
        *,
        tally: Tally,
        nursery: Nursery,
        notifier: Notifier,
    ) -> None:
        self._ground = ground
        self._entry = entry
        self._settings = settings
        self._cri = cri
        self._tally = tally
        self._root = f"{settings().run_root}/monitors"
        self._module = importlib.import_module(entry.module)  # preloaded
        self._nursery_settings = settings()
        self._nursery = nursery
        nursery.add("monitor", self._prepare, lambda pid, fds: held.write_holder(fds[0], pid))
        self._succession = Succession(ground, self._root, self._fork_successor, self._listen, notifier)
        self.adopt = self._succession.adopt

    def start(self, container_id: str, pod_id: str) -> int:
        """Return the pid of the container's monitor, forked now if none lives.

        Raises RemoteError, OSError.
        """
        directory = self._directory(container_id)
        held.check_id(pod_id, "pod")
        if os.path.lexists(f"{directory}/exit.json"):
            raise precondition(f"container {container_id} has an exit record: it ended")
        os.makedirs(directory, mode=0o750, exist_ok=True)
        os.chown(directory, 0, self._cri.gid)
        # cri, and nobody else, may reach ctl.sock; records made here are of its group, so that it reads them.
        os.chmod(directory, 0o2750)  # noqa: S103
        self._ground.reaper.reap()  # the end of an earlier one is not that of the next
        lock_fd = held.acquire(directory)
        if lock_fd is None:
            return held.holder(directory)
        try:
            if not self._succession.has(container_id):
                self._succession.claim(container_id)
            if self._succession.has(container_id):  # one died just now, and this is sooner than its turn
                return self._succession.succeed(container_id, lock_fd)
            return self._fork(container_id, pod_id, directory, lock_fd)
        finally:
            os.close(lock_fd)

    def _directory(self, container_id: str) -> str:
        return f"{self._root}/{held.check_id(container_id, 'container')}"

    def _fork(self, container_id: str, pod_id: str, directory: str, lock_fd: int) -> int:
        with self._listen(directory) as listener:
            vault_fd = self._succession.begin(container_id, pod_id, listener.fileno())
            words = ["monitor", container_id, pod_id, directory]
            return self._bear(words, (lock_fd, listener.fileno(), vault_fd))

    def _listen(self, directory: str) -> socket.socket:
        return channel.listen(f"{directory}/ctl.sock", mode=0o660, uid=0, gid=self._cri.gid)

    def _fork_successor(
        self, container_id: str, pod_id: str, directory: str, lock_fd: int, vault_fd: int
    ) -> int:
        words = ["monitor", container_id, pod_id, directory, "successor"]
        return self._bear(words, (lock_fd, vault_fd, vault_fd))

    def _bear(self, words: Sequence[str], fds: Sequence[int]) -> int:
        settings = self._settings()
        if settings != self._nursery_settings:  # a reload changed them
            self._nursery.close()
            self._nursery_settings = settings
        pid = self._nursery.fork(words, fds)
        container_id = words[1]
        self._watch(container_id, pid)
        event = "monitor succeeded" if len(words) > SUCCESSOR else "monitor started"
        self._ground.log.info(event, container=container_id, pod=words[2], pid_of=pid)
        return pid

    def _prepare(self) -> Life:
        """In the nursery. Return a monitor's life."""
        group_fd = self._ground.groups.open(self._ground.groups.monitors)
        ground = self._module.prepare_process(self._context, self._nursery_settings.sealed, group_fd)
        run, title = self._module.run, set_title

        def live(words: Sequence[str], fds: Sequence[int]) -> None:
            title("bulkhead: monitor " + words[1][:SHORT_ID])
            run(words, fds, ground)

        return live

    def _context(self, container_id: str) -> spawn.WorkerContext:
        settings = self._nursery_settings
        log = Log(
            f"monitor {container_id[:SHORT_ID]}", sink=self._ground.log_socket, level=settings.log_level
        )
        return spawn.WorkerContext(kind=self._entry.kind, settings=settings, log=log)

    def _ended(self, container_id: str, pid: int, started: float, code: int) -> None:
        self._ground.sink.forget(pid)
        if code == 0:
            self._succession.forget(container_id)
            self._ground.log.info("monitor ended", container=container_id, pid_of=pid)
            return
        sentence = describe(code, self._ground.loop.time() - started)
        self._tally.add("monitor", pid, f"{container_id}: {sentence}")
        self._ground.log.error("monitor died", container=container_id, pid_of=pid, how=sentence)
        self._succession.died(container_id)

    def inherit(self, rows: Sequence[WardRow]) -> None:
        """Go on watching those whom the program before this one watched."""
        for row in rows:
            self._succession.inherit(row)
            if row.pid and row.pidfd < 0:
                self._watch(row.container_id, row.pid)
            else:
                self._succession.look_after(row.container_id)

    def rows(self) -> list[WardRow]:
        """What the program after this one must know of monitors."""
        return self._succession.rows()

    def _watch(self, container_id: str, pid: int) -> None:
        started = self._ground.loop.time()
        self._ground.reaper.watch(pid, lambda code: self._ended(container_id, pid, started, code))

    def remove(self, container_id: str) -> None:
        """Remove the directory of a monitor that has ended; absent is success.

        Raises RemoteError, OSError.
        """
        directory = self._directory(container_id)
        self._ground.reaper.reap()  # one that has died and not been reaped is about to have a successor
        if held.is_held(directory):
            raise precondition(f"the monitor of container {container_id} lives")
        if os.path.isdir(directory) and self._succession.is_due(container_id):
            # What it held is free; what it left undone (the runtime's state, its groups) nobody has done.
            raise precondition(f"the monitor of container {container_id} has died and has no successor yet")
        self._succession.forget(container_id)
        remove_tree(directory)

    def states(self, container_id: str = "") -> list[MonitorState]:
        """Every directory, or that of one container, and whether its lock is held."""
        found = []
        for name in held.names(self._root):
            if container_id not in ("", name):
                continue
            directory = f"{self._root}/{name}"
            alive = held.is_held(directory)
            pid = held.holder(directory) if alive else 0
            successions = self._succession.count(name)
            found.append(MonitorState(container_id=name, alive=alive, pid=pid, successions=successions))
        return found
