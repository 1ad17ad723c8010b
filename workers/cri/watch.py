"""Runs in: cri. How the ends of containers become known.

The process of each monitor is watched by a pidfd, which costs the monitor nothing: when it ends, its exit
record is read from its directory. While its lock is held, or a successor may still come, nothing is
concluded. A container is never thought to run because nobody said otherwise: without a monitor and without
a record it has ended, with an unknown code.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

import msgspec

from ipc import log
from ipc.errors import RemoteError
from ipc.messages import storage, supervisor
from ipc.messages.monitor import ExitRecord
from ipc.messages.supervisor import MonitorState
from workers.cri.node import Node
from workers.cri.peers import SHORT
from workers.cri.rebuild import lives
from workers.cri.state import Container, Phase

#: Seconds that a lost monitor's successor (forked by the supervisor) has to appear.
ORPHAN_GRACE = 10.0
POLL = 0.2
#: Seconds after its end when a container is unmounted, unless it was removed, which does that too.
UNMOUNT_AFTER = 0.5
UNKNOWN_EXIT = -1


class Watcher:
    """Follows every container that has not ended."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._ended: dict[str, asyncio.Event] = {}

    def watch(self, container: Container) -> None:
        """Begin to follow a container; once is enough."""
        if container.id not in self._ended:
            self._ended[container.id] = asyncio.Event()
            self._node.operations.background(f"watch {container.id}", self._watch(container))

    async def ended(self, container: Container, timeout: float) -> bool:
        """Wait until the container is known to have ended; False if it is not after `timeout` seconds."""
        event = self._ended.get(container.id)
        if event is None or container.phase is Phase.EXITED:
            return container.phase is Phase.EXITED
        try:
            await asyncio.wait_for(event.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def record(self, container: Container, exit_: ExitRecord) -> None:
        """The container has ended: keep how. Later reports of the same end change nothing."""
        if container.phase not in {Phase.CREATED, Phase.RUNNING}:
            return
        container.record.phase = Phase.EXITED
        container.record.exit = exit_
        container.record.started_at_ns = exit_.started_at_ns or container.record.started_at_ns
        self._node.store.save_container(container)
        self._announce(container, exit_)

    def _announce(self, container: Container, exit_: ExitRecord) -> None:
        event = self._ended.pop(container.id, None)
        if event is not None:
            event.set()
        log.get().info("container ended", container=container.id, code=exit_.exit_code, oom=exit_.oom_killed)
        self._node.plugins.ended(container)
        self._node.operations.background(f"unmount {container.id}", self._unmount(container))
        if container.record.sandbox:
            self._sandbox_ended(container)

    def _sandbox_ended(self, container: Container) -> None:
        """A pod does not outlive its sandbox container; unless it is being stopped, that is news."""
        pod = self._node.store.pods.get(container.record.pod_id)
        if pod is not None and pod.phase is Phase.READY:
            pod.record.phase = Phase.STOPPED
            self._node.store.save_pod(pod)
            log.get().error("the sandbox container ended: the pod is not ready", pod=pod.id)

    async def _unmount(self, container: Container) -> None:
        """An ended container needs no overlay mount until it is removed, which may be soon."""
        await asyncio.sleep(UNMOUNT_AFTER)
        if container.id not in self._node.store.containers:
            return
        try:
            request = storage.ContainerUnmount(container_id=container.id)
            await self._node.peers.storage.call(request, timeout=SHORT)
        except RemoteError as error:  # removal will do it
            log.get().warning("unmounting failed", container=container.id, text=error.text)

    async def _watch(self, container: Container) -> None:
        orphan_since = 0.0
        while (
            container.phase in {Phase.CREATED, Phase.RUNNING} and container.id in self._node.store.containers
        ):
            alive = await self._follow(container.id)
            exit_ = self.read_record(container.id)
            if exit_ is None and (alive or lives(self._node.settings.monitor_directory(container.id))):
                orphan_since = 0.0  # who runs has not ended, though nobody watches it just now
            elif exit_ is None:
                orphan_since = orphan_since or time.monotonic()
                if time.monotonic() - orphan_since > ORPHAN_GRACE:
                    exit_ = lost(container)
            if exit_ is not None:
                return self.record(container, exit_)
            await asyncio.sleep(POLL)
        self._ended.pop(container.id, None)

    async def outlive(self, container_id: str, timeout: float) -> None:
        """Wait for the end of a monitor that is about to end, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._follow(container_id), timeout)

    async def _follow(self, container_id: str) -> bool:
        """Wait for the end of the monitor; False if there is none.

        While the supervisor cannot be asked, nothing is concluded.
        """
        try:
            state = await self._monitor(container_id)
            if state is None or not state.alive:
                return False
            if state.pid:
                await self._outlive(state)
        except (RemoteError, ProcessLookupError):
            return True
        return True

    async def _outlive(self, state: MonitorState) -> None:
        pidfd = os.pidfd_open(state.pid)
        try:
            # Asked again: before the pidfd was open, the number could have changed hands.
            if await self._monitor(state.container_id) == state:
                await readable(pidfd)
        finally:
            os.close(pidfd)

    async def _monitor(self, container_id: str) -> MonitorState | None:
        request = supervisor.MonitorList(container_id=container_id)
        answer = await self._node.peers.supervisor.call(request, timeout=SHORT)
        return next((state for state in answer.monitors if state.container_id == container_id), None)

    def read_record(self, container_id: str) -> ExitRecord | None:
        """The exit record that the monitor left, None if there is none."""
        path = f"{self._node.settings.monitor_directory(container_id)}/exit.json"
        try:
            with open(path, "rb") as file:
                return msgspec.json.decode(file.read(), type=ExitRecord)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:  # records are renamed into place: only a broken disk does this
            log.get().error("an exit record is damaged", container=container_id, text=error)
            return None


async def readable(fd: int) -> None:
    """Wait until a descriptor is."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def lost(container: Container) -> ExitRecord:
    """The record of a container whose monitor is gone and left none."""
    return ExitRecord(
        container_id=container.id,
        exit_code=UNKNOWN_EXIT,
        started_at_ns=container.record.started_at_ns,
        finished_at_ns=time.time_ns(),
        reason="Error",
        message="the container's monitor is gone and left no exit record",
    )
