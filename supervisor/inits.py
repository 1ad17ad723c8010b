"""Runs in: the supervisor.

Pod inits: starts one (supervisor/podinit.py is what runs in it), pins its PID namespace at
`<run_root>/ns/<pod_id>/pid`, ends it and unpins. It owns `<run_root>/inits/`. Inits outlive the supervisor;
the next one finds them by their locks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ipc import kernel, log
from ipc.errors import RemoteError, internal, invalid
from ipc.log import Log
from ipc.messages.supervisor import InitStarted, InitState
from supervisor import held, podinit
from supervisor.cgroup import parent_path
from supervisor.files import remove_tree
from supervisor.monitors import SHORT_ID
from supervisor.nursery import Life, Nursery
from supervisor.sandbox.spec import Identity
from supervisor.worker import Ground

Started = Callable[[InitStarted | RemoteError], object]
Stopped = Callable[[], object]


@dataclass
class _Starting:
    """An init between its first fork and the answer."""

    pod_id: str
    group: str
    lock_fd: int
    link_fd: int
    done: Started


class Inits:
    """All of them. `default_parent` is the cgroup parent of pods that name none; a reload may change it."""

    def __init__(
        self, ground: Ground, identity: Identity, run_root: str, default_parent: str, nursery: Nursery
    ) -> None:
        self._ground = ground
        self._identity = identity
        self._run_root = run_root
        self.default_parent = default_parent
        self._empty = f"{run_root}/inits/.empty"
        self._starting: dict[str, list[Started]] = {}
        self._nursery = nursery
        nursery.add("init", self._prepare_lives)

    def inherit(self) -> None:
        """Watch those that are children already: the program before this one had them forked."""
        now = self._ground.loop.time()
        for state in self.states():
            if state.pid:
                self._watch(state.pod_id, state.pid, now)

    def _watch(self, pod_id: str, pid: int, started: float) -> None:
        self._ground.reaper.watch(pid, lambda code: self._ended(pod_id, pid, started, code))

    @property
    def starting(self) -> bool:
        """True while one is between its first fork and the answer."""
        return bool(self._starting)

    def _directory(self, pod_id: str) -> str:
        return f"{self._run_root}/inits/{held.check_id(pod_id, 'pod')}"

    def _pin(self, pod_id: str) -> str:
        return f"{self._run_root}/ns/{pod_id}/pid"

    def _user_pin(self, pod_id: str) -> str:
        return f"{self._run_root}/ns/{pod_id}/user"

    # -- starting -------------------------------------------------------------------------------------

    def start(self, pod_id: str, cgroup_parent: str, done: Started, *, user_namespace: bool = False) -> None:
        """Start the pod's init, or find the one that lives; `done` is called once.

        `user_namespace`: in the one that is pinned for the pod. Raises RemoteError, OSError.
        """
        directory = self._directory(pod_id)
        if pod_id in self._starting:
            self._starting[pod_id].append(done)
            return
        group = self._group(pod_id, cgroup_parent)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        lock_fd = held.acquire(directory)
        if lock_fd is None:
            done(InitStarted(pid=held.holder(directory), pid_namespace=self._pin(pod_id)))
            return
        try:
            self._prepare(pod_id)
            self._starting[pod_id] = [done]
            self._fork(pod_id, group, lock_fd, self._user_pin(pod_id) if user_namespace else "")
        except BaseException:
            self._starting.pop(pod_id, None)
            os.close(lock_fd)
            raise

    def _group(self, pod_id: str, cgroup_parent: str) -> str:
        try:
            parent = parent_path(cgroup_parent or self.default_parent)
        except ValueError as error:
            raise invalid(str(error)) from error
        return f"{parent}/bulkhead-init-{pod_id[:SHORT_ID]}"

    def _prepare(self, pod_id: str) -> None:
        os.makedirs(self._empty, mode=0o555, exist_ok=True)
        pin = self._pin(pod_id)
        self._unpin(pod_id)  # what an init that died left
        os.makedirs(os.path.dirname(pin), mode=0o711, exist_ok=True)
        os.close(os.open(pin, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o400))

    def _fork(self, pod_id: str, group: str, lock_fd: int, user_namespace: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = self._nursery.fork(["init", pod_id, user_namespace], (lock_fd, theirs.fileno()))
            except OSError:
                ours.close()
                raise
        starting = _Starting(pod_id, group, lock_fd, ours.detach(), self._announce(pod_id))
        self._ground.reaper.watch(pid, lambda _code: None)
        self._ground.loop.add_reader(starting.link_fd, lambda: self._forked(starting))

    def _prepare_lives(self) -> Life:
        """In the nursery. Return an init's life."""
        program = podinit.filter_program()

        def live(words: Sequence[str], fds: Sequence[int]) -> None:
            _, pod_id, user_namespace = words
            name = f"init {pod_id[:SHORT_ID]}"
            log.set_log(Log(name, sink=self._ground.log_socket))
            podinit.launch(
                f"bulkhead: {name}",
                self._identity,
                self._empty,
                program,
                lock_fd=fds[0],
                link_fd=fds[1],
                user_namespace=user_namespace,
            )

        return live

    def _announce(self, pod_id: str) -> Started:
        def all_of_them(answer: InitStarted | RemoteError) -> None:
            for done in self._starting.pop(pod_id):
                done(answer)

        return all_of_them

    def _forked(self, starting: _Starting) -> None:
        """The first child told the pid of process 1, waiting at its gate; or it failed and told nothing."""
        self._ground.loop.remove_reader(starting.link_fd)
        text = os.read(starting.link_fd, 32)
        try:
            if not text:
                raise internal(f"the init of pod {starting.pod_id} could not be started (see the log)")
            starting.done(self._place(starting, int(text)))
        except RemoteError as error:
            self._forget(starting.pod_id)
            starting.done(error)
        finally:
            os.close(starting.link_fd)
            os.close(starting.lock_fd)

    def _place(self, starting: _Starting, pid: int) -> InitStarted:
        pin = self._pin(starting.pod_id)
        self._watch(starting.pod_id, pid, self._ground.loop.time())
        try:
            held.write_holder(starting.lock_fd, pid)
            with open(f"{self._directory(starting.pod_id)}/group", "w", encoding="utf-8") as file:
                json.dump(starting.group, file)
            self._ground.groups.make(starting.group)
            self._ground.groups.enter(starting.group, pid)
            kernel.bind_mount(f"/proc/{pid}/ns/pid", pin)
            os.write(starting.link_fd, b"\n")
        except OSError as error:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise internal(f"the init of pod {starting.pod_id}: {error}") from error
        self._ground.log.info("init started", pod=starting.pod_id, pid_of=pid)
        return InitStarted(pid=pid, pid_namespace=pin)

    def _ended(self, pod_id: str, pid: int, started: float, code: int) -> None:
        self._ground.log.info(
            "init ended", pod=pod_id, pid_of=pid, code=code, after=round(self._ground.loop.time() - started)
        )

    # -- stopping -------------------------------------------------------------------------------------

    def stop(self, pod_id: str, done: Stopped) -> None:
        """Kill the init, and with it everything in its namespace; `done` when it is gone and unpinned.

        Absent is success. Raises RemoteError, OSError.
        """
        if pod_id in self._starting:
            self._starting[pod_id].append(lambda _answer: self.stop(pod_id, done))
            return
        pid = held.holder(self._directory(pod_id))
        try:
            pidfd = os.pidfd_open(pid) if pid else -1
        except ProcessLookupError:
            pidfd = -1
        # The holder is asked again: before the pidfd was open, the number could have changed hands.
        if pidfd < 0 or held.holder(self._directory(pod_id)) != pid:
            if pidfd >= 0:
                os.close(pidfd)
            self._forget(pod_id)
            done()
            return
        self._ground.loop.add_reader(pidfd, lambda: self._killed(pod_id, pidfd, done))
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _killed(self, pod_id: str, pidfd: int, done: Stopped) -> None:
        self._ground.loop.remove_reader(pidfd)
        os.close(pidfd)
        self._ground.reaper.reap()
        self._forget(pod_id)
        done()

    def _forget(self, pod_id: str) -> None:
        """Remove every trace of an init that is gone."""
        self._unpin(pod_id)
        directory = self._directory(pod_id)
        with contextlib.suppress(OSError, ValueError), open(f"{directory}/group", encoding="utf-8") as file:
            self._ground.groups.remove(json.load(file))
        remove_tree(directory)

    def _unpin(self, pod_id: str) -> None:
        pin = self._pin(pod_id)
        with contextlib.suppress(OSError):  # EINVAL: nothing is mounted there
            kernel.umount(pin, kernel.MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(pin)
        with contextlib.suppress(OSError):  # the network worker's pins may stand beside it
            os.rmdir(os.path.dirname(pin))

    def states(self) -> list[InitState]:
        """Every init that we have a directory of."""
        found = []
        for name in held.names(f"{self._run_root}/inits"):
            if not name.startswith("."):
                pid = held.holder(f"{self._run_root}/inits/{name}")
                found.append(InitState(pod_id=name, alive=pid != 0, pid=pid))
        return found
