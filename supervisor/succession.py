"""Runs in: the supervisor.

Monitors that die have successors. For each monitor the supervisor holds a vault (ipc/vault.py), in which the
descriptors of the container lie: nothing that the container writes to is ever without a reader. It owns the
vaults, and the codes of inits that it inherited and reaped (`reaped.json`); what a vault holds it does not
know. A supervisor that is new gets duplicates of the vaults from the monitors that live; those of monitors
that died with the supervisor from the service manager, if there is one that keeps descriptors. Else their
successors find what the kernel has by itself (workers/monitor/heir.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ipc import kernel, vault
from supervisor import held
from supervisor.heritage import WardRow
from supervisor.notify import Notifier
from supervisor.worker import Ground

REAPED, STATE, EXIT = "reaped.json", "state.json", "exit.json"
VAULT = "vault."  # and the container's id: a vault's name where the service manager keeps it
STORE_PATIENCE = 1.0  # seconds until the manager is told again
LOCK_PATIENCE = 0.02  # seconds until a lock is tried again that the dead one's last child holds
SPELL, QUICK = 10.0, 3  # after so many deaths within so many seconds
SLOW = 5.0  # the next successor comes so many seconds later
ORPHANS = 256  # whose codes are remembered: an init may be reaped before its monitor is

#: Forks a successor, returns its pid: container, pod, directory, lock, vault. Raises OSError.
Fork = Callable[[str, str, str, int, int], int]


#: Binds the socket of a container's monitor anew. Raises OSError.
Listen = Callable[[str], socket.socket]


@dataclass
class Ward:
    """A container whose monitor has, or will have, successors."""

    pod_id: str
    vault_fd: int
    pidfd: int = -1  # of a monitor that is no child of this supervisor
    init_pid: int = 0  # known when a monitor has died
    bereft: bool = False  # its monitor has died, and there is no successor yet
    successions: int = 0
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=QUICK))


class Succession:
    """All wards."""

    def __init__(self, ground: Ground, root: str, fork: Fork, listen: Listen, notifier: Notifier) -> None:
        self._ground = ground
        self._listen = listen
        self._notifier = notifier
        prefix = len(VAULT)
        left = notifier.stored
        self._stored = {name[prefix:]: left.pop(name) for name in list(left) if name.startswith(VAULT)}
        self._root = root
        self._fork = fork
        self._wards: dict[str, Ward] = {}
        self._orphans: deque[tuple[int, int, int]] = deque(maxlen=ORPHANS)  # pid, code, when, in wall ns
        ground.reaper.orphaned = self._orphan

    # -- beginning and end ----------------------------------------------------------------------------

    def begin(self, container_id: str, pod_id: str, listener_fd: int) -> int:
        """Return the vault of a monitor that is about to be forked. Raises OSError."""
        self.forget(container_id)
        ward = self._wards[container_id] = Ward(pod_id, vault.make())
        vault.put(ward.vault_fd, vault.LISTENER, fds=[listener_fd])
        self._ground.loop.call_soon(lambda: self._store(container_id, ward))  # nobody waits for that
        return ward.vault_fd

    def _store(self, container_id: str, ward: Ward) -> None:
        """Have the service manager keep the vault too, if there is one."""
        current = self._wards.get(container_id) is ward
        if current and not self._notifier.store(VAULT + container_id, ward.vault_fd):
            self._ground.loop.call_later(STORE_PATIENCE, lambda: self._store(container_id, ward))

    def forget(self, container_id: str) -> None:
        """No monitor of this container will have a successor."""
        ward = self._wards.pop(container_id, None)
        stored_fd = self._stored.pop(container_id, -1)
        for fd in (ward.vault_fd if ward is not None else -1, stored_fd):
            if fd >= 0:
                os.close(fd)
                self._notifier.unstore(VAULT + container_id)
        if ward is not None:
            self._unwatch(ward)

    # -- an upgrade in place --------------------------------------------------------------------------

    def rows(self) -> list[WardRow]:
        """What the program after this one must know."""
        return [
            WardRow(
                container_id=container_id,
                pod_id=ward.pod_id,
                vault_fd=ward.vault_fd,
                pidfd=ward.pidfd,
                pid=0 if ward.bereft else held.holder(f"{self._root}/{container_id}"),
                init_pid=ward.init_pid,
                bereft=ward.bereft,
                successions=ward.successions,
            )
            for container_id, ward in self._wards.items()
        ]

    def inherit(self, row: WardRow) -> None:
        """Take over a ward of the program before this one."""
        ward = Ward(row.pod_id, row.vault_fd, row.pidfd, row.init_pid, row.bereft, row.successions)
        self._wards[row.container_id] = ward
        self._store(row.container_id, ward)

    def look_after(self, container_id: str) -> None:
        """Of a ward whose monitor is no child of ours, or had died already: go on where it was left."""
        ward = self._wards[container_id]
        if ward.bereft:
            self._succeed(container_id, ward)
        elif ward.pidfd >= 0:
            self._ground.loop.add_reader(ward.pidfd, lambda: self._stranger_ended(container_id, ward))
        elif self._is_over(container_id):
            self.forget(container_id)
        else:
            self.died(container_id)

    def has(self, container_id: str) -> bool:
        """True if there is something to succeed to."""
        return container_id in self._wards

    def is_due(self, container_id: str) -> bool:
        """True if a monitor has died, or ended and nobody has looked how, and its successor has not begun."""
        ward = self._wards.get(container_id)
        return ward is not None and (ward.bereft or ward.pidfd >= 0)

    def count(self, container_id: str) -> int:
        """How many of a container's monitors have died."""
        ward = self._wards.get(container_id)
        return ward.successions if ward else 0

    def _unwatch(self, ward: Ward) -> None:
        if ward.pidfd >= 0:
            self._ground.loop.remove_reader(ward.pidfd)
            os.close(ward.pidfd)
            ward.pidfd = -1

    # -- a death --------------------------------------------------------------------------------------

    def died(self, container_id: str) -> None:
        """A monitor has died: fork its successor, at once unless they die one after the other."""
        ward = self._wards.get(container_id)
        if ward is None:
            return
        now = self._ground.loop.time()
        often = len(ward.deaths) == QUICK and now - ward.deaths[0] < SPELL
        ward.deaths.append(now)
        ward.successions += 1
        ward.bereft = True
        self._note_init(container_id, ward)
        if often:
            self._ground.loop.call_later(SLOW, lambda: self._succeed(container_id, ward))
        else:
            self._succeed(container_id, ward)

    def _succeed(self, container_id: str, ward: Ward) -> None:
        if self._wards.get(container_id) is not ward or not ward.bereft:
            return
        try:
            lock_fd = held.acquire(f"{self._root}/{container_id}")
            if lock_fd is None:
                self._ground.loop.call_later(LOCK_PATIENCE, lambda: self._succeed(container_id, ward))
                return
            try:
                self.succeed(container_id, lock_fd)
            finally:
                os.close(lock_fd)
        except OSError as error:
            self._ground.log.error("no successor of a monitor", container=container_id, why=error)
            self._ground.loop.call_later(SLOW, lambda: self._succeed(container_id, ward))

    def succeed(self, container_id: str, lock_fd: int) -> int:
        """Fork a successor now, with the lock of the one that died; return its pid. Raises OSError."""
        ward = self._wards[container_id]
        directory = f"{self._root}/{container_id}"
        pid = self._fork(container_id, ward.pod_id, directory, lock_fd, ward.vault_fd)
        ward.bereft = False
        return pid

    # -- inits ----------------------------------------------------------------------------------------

    def _note_init(self, container_id: str, ward: Ward) -> None:
        state = self._state(container_id)
        ward.init_pid = int(state.get("pid", 0))
        for pid, code, when in list(self._orphans):
            # One that was reaped before the container was made had the number before its init.
            if pid == ward.init_pid and when > int(state.get("created_at_ns", 0)):
                self._write_reaped(container_id, ward, code)

    def _orphan(self, pid: int, code: int) -> None:
        """Somebody whom this process inherited has ended: perhaps the init of a container."""
        self._orphans.append((pid, code, time.time_ns()))
        for container_id, ward in self._wards.items():
            if ward.init_pid == pid:
                self._write_reaped(container_id, ward, code)

    def _write_reaped(self, container_id: str, ward: Ward, code: int) -> None:
        pid, ward.init_pid = ward.init_pid, 0  # the number is anybody's now
        path = f"{self._root}/{container_id}/{REAPED}"
        try:
            with open(f"{path}.new", "w", encoding="ascii") as file:
                json.dump({"pid": pid, "code": code}, file)
            os.rename(f"{path}.new", path)
        except OSError as error:
            self._ground.log.error("exit code not written", container=container_id, code=code, why=error)

    def _is_over(self, container_id: str) -> bool:
        """True if a monitor has nothing left to do: its record is there, and the runtime's state is not."""
        root = self._state(container_id).get("runtime_root", "")
        ended = os.path.lexists(f"{self._root}/{container_id}/{EXIT}")
        return ended and not (root and os.path.lexists(f"{root}/{container_id}"))

    def _state(self, container_id: str) -> dict[str, Any]:
        with (
            contextlib.suppress(OSError, ValueError),
            open(f"{self._root}/{container_id}/{STATE}", "rb") as file,
        ):
            state = json.load(file)
            return state if isinstance(state, dict) else {}
        return {}

    # -- monitors of an earlier supervisor --------------------------------------------------------------

    def adopt(self) -> None:
        """Take over the monitors that live, and succeed to those that do not, one a turn of the loop."""
        names = held.names(self._root)
        for container_id in self._stored.keys() - set(names):
            self.forget(container_id)
        self._adopt_next(names)

    def _adopt_next(self, names: list[str]) -> None:
        if not names:
            return
        if names[0] not in self._wards:
            with contextlib.suppress(OSError):  # it ended meanwhile
                self._adopt(names[0])
        self._ground.loop.call_soon(lambda: self._adopt_next(names[1:]))

    def _adopt(self, container_id: str) -> None:
        pid = held.holder(f"{self._root}/{container_id}")
        if pid:
            self._adopt_living(container_id, pid)
        elif held.is_held(f"{self._root}/{container_id}"):  # by what a dead one has left for a moment
            self._ground.loop.call_later(STORE_PATIENCE, lambda: self._adopt_next([container_id]))
        else:
            self.claim(container_id)
            if container_id in self._wards:
                self._ground.log.error("monitor died with the supervisor", container=container_id)
                self.died(container_id)

    def _adopt_living(self, container_id: str, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        # The holder is asked again: before the pidfd was open, the number could have changed hands.
        vault_fd = _find_vault(pidfd, pid) if held.holder(f"{self._root}/{container_id}") == pid else -1
        if vault_fd < 0:
            os.close(pidfd)
            self._ground.log.warning("a monitor without a vault: it will have no successor", pid_of=pid)
            return
        ward = self._admit(container_id, vault_fd, pidfd)
        self._ground.loop.add_reader(pidfd, lambda: self._stranger_ended(container_id, ward))

    def claim(self, container_id: str) -> None:
        """Of one whose monitor nobody has, and who is nobody's ward: make it one if its container may live.

        Raises OSError.
        """
        directory = f"{self._root}/{container_id}"
        stored_fd = self._stored.pop(container_id, -1)
        if stored_fd >= 0:
            self._admit(container_id, stored_fd)
        elif os.path.lexists(f"{directory}/{STATE}") and not self._is_over(container_id):
            self._admit(container_id, vault.make())
            with self._listen(directory) as listener:
                vault.put(self._wards[container_id].vault_fd, vault.LISTENER, fds=[listener.fileno()])

    def _admit(self, container_id: str, vault_fd: int, pidfd: int = -1) -> Ward:
        pod_id = str(self._state(container_id).get("pod_id", "unknown"))
        ward = self._wards[container_id] = Ward(pod_id, vault_fd, pidfd)
        stored_fd = self._stored.pop(container_id, -1)
        if stored_fd >= 0:
            os.close(stored_fd)
        self._store(container_id, ward)
        return ward

    def _stranger_ended(self, container_id: str, ward: Ward) -> None:
        status = kernel.pidfd_exit_status(ward.pidfd)
        self._unwatch(ward)
        if status == 0 or (status is None and self._is_over(container_id)):
            self.forget(container_id)
            return
        self._ground.log.error("monitor died", container=container_id, status=status)
        self.died(container_id)


def _find_vault(pidfd: int, pid: int) -> int:
    """Return a duplicate of a monitor's vault, -1 if it has none. Raises OSError."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
            fd = kernel.pidfd_getfd(pidfd, int(name))
            if vault.is_one(fd):
                return fd
            os.close(fd)
    return -1
