"""Runs in: cri. After a start: make the state true again, finish or undo what was begun.

`load` is quick and comes before the first answer: what the state has lost is taken in again (rebuild.py),
and the ends that were recorded meanwhile, so that lists are exact. `run` does the rest beside the serving:
ends of containers are followed again, operations with an intent are finished (removals, stops, starts,
creations, in this order of strength), and whatever other workers still have of pods and containers that
nobody knows is removed, however often it takes; but never a container that runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ipc import log
from ipc.errors import Code, RemoteError
from ipc.messages import monitor, network, storage, supervisor
from workers.cri.containers import Containers
from workers.cri.names import sandbox_id
from workers.cri.node import Node
from workers.cri.peers import SHORT
from workers.cri.pods import Pods
from workers.cri.rebuild import Rebuild, running
from workers.cri.state import Container, Intent, Phase, Pod
from workers.cri.watch import Watcher

#: Seconds for the questions that delay the first answer.
LOAD_TIMEOUT = 0.4
BACKOFF = (1.0, 60.0)
CLEAN_TIMEOUT = 120.0
#: If several operations on one thing were begun, the strongest is finished; it implies the others.
STRENGTH = ("remove", "stop", "start", "create", "run")


class Recovery:
    """What the last worker left."""

    def __init__(self, node: Node, pods: Pods, containers: Containers, watcher: Watcher) -> None:
        self._node = node
        self._store = node.store
        self._pods = pods
        self._containers = containers
        self._watcher = watcher
        self._spared: set[str] = set()

    # -- before the first answer ----------------------------------------------------------------------

    async def load(self) -> None:
        """Take in what happened while nobody looked."""
        await Rebuild(self._node).run()
        live = [c for c in self._store.containers.values() if c.phase in {Phase.CREATED, Phase.RUNNING}]
        for container in live:
            exit_ = self._watcher.read_record(container.id)
            if exit_ is not None:
                self._watcher.record(container, exit_)
        begun = [c for c in live if self._store.has_intent(c.id, "container.start")]
        await asyncio.gather(*(self._ask_started(container) for container in begun))

    async def _ask_started(self, container: Container) -> None:
        """A start was begun: only the monitor knows whether it came to pass."""
        try:
            state = await self._node.peers.monitor(container.id).call(
                monitor.StateGet(), timeout=LOAD_TIMEOUT
            )
        except RemoteError as error:
            log.get().warning("a monitor does not answer", container=container.id, text=error.text)
            return
        if state.status == "running" and container.phase is Phase.CREATED:
            container.record.phase = Phase.RUNNING
            container.record.started_at_ns = state.started_at_ns
            self._store.save_container(container)

    # -- beside the serving ---------------------------------------------------------------------------

    def run(self) -> None:
        """Start everything else in the background."""
        for container in self._store.containers.values():
            if container.phase in {Phase.CREATED, Phase.RUNNING}:
                self._watcher.watch(container)
        for pod in self._store.pods.values():
            self._pods.inits.watch(pod)
        for subject, intent in strongest(self._store.intents()).items():
            self._resume(subject, intent)
        for pod in self._store.pods.values():
            if pod.phase is Phase.GONE:
                self._node.operations.background(f"reap pod {pod.id}", self._pods.reap(pod))
        for container in self._store.containers.values():
            if container.phase is Phase.GONE:
                self._background("reap", container.id, self._containers.reap(container))
        self._node.operations.background("reconcile", self.reconcile())

    def _resume(self, subject: str, intent: Intent) -> None:
        if subject in self._store.pods:
            step = self._pod_step(self._store.pods[subject], intent)
        elif subject in self._store.containers:
            step = self._container_step(self._store.containers[subject], intent)
        else:
            return self._store.end(subject, intent.kind)
        if step is not None:
            log.get().info("operation goes on", operation=intent.kind, id=subject)
            self._background(intent.kind, subject, step)

    def _pod_step(self, pod: Pod, intent: Intent) -> Coroutine[Any, Any, Any] | None:
        if pod.phase is Phase.GONE:
            return None
        match intent.kind:
            case "pod.remove":
                return self._pods.remove(pod.id)
            case "pod.stop":
                return self._pods.stop(pod.id)
            case _:
                return self._pods.resume(pod)

    def _container_step(self, container: Container, intent: Intent) -> Coroutine[Any, Any, Any] | None:
        if container.phase is Phase.GONE or container.record.sandbox:
            return None  # a sandbox container is part of its pod's operations
        pod = self._store.pods.get(container.record.pod_id)
        match intent.kind:
            case "container.stop":
                return self._containers.resume_stop(container, float(intent.detail.get("grace", 0)))
            case "container.start" if container.phase is Phase.EXITED:
                return self._forget_start(container)
            case "container.start":
                return self._containers.resume_start(container)
            case "container.create" if pod is not None and pod.phase is Phase.READY:
                return self._containers.resume(pod, container)
            case _:  # a removal, or a creation in a pod that has stopped meanwhile
                return self._containers.remove(container.id)

    async def _forget_start(self, container: Container) -> None:
        self._store.end(container.id, "container.start")

    def _background(self, what: str, subject: str, step: Coroutine[Any, Any, Any]) -> None:
        self._node.operations.background(f"{what} {subject}", step)

    # -- what nobody knows ----------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Remove what others have of unknown pods and containers; each part is tried until it is done."""
        self._spare_running()
        parts = (self._clean_monitors, self._clean_inits, self._clean_network, self._clean_storage)
        await asyncio.gather(*(self._until_done(part) for part in parts))
        await self._until_done(self._clean_parents)  # they are empty only now

    def _spare_running(self) -> None:
        """What runs and cannot be known again stays, with its pod, until it ends."""
        for container_id, pod_id in running(f"{self._node.settings.run_root}/monitors").items():
            if container_id not in self._store.containers:
                log.get().error(
                    "an unknown container runs and is left alone", container=container_id, pod=pod_id
                )
                self._spared |= {container_id, pod_id}

    def _unknown(self, id_: str) -> bool:
        known = id_ in self._store.pods or id_ in self._store.containers
        return not known and id_ not in self._spared and id_ not in self._expected()

    def _expected(self) -> set[str]:
        """Sandbox containers that pods in the making will find, or make, under their id."""
        return {sandbox_id(pod.id) for pod in self._store.pods.values() if pod.phase is Phase.CREATING}

    async def _until_done(self, part: Callable[[], Coroutine[Any, Any, None]]) -> None:
        delay, longest = BACKOFF
        while True:
            try:
                return await part()
            except RemoteError as error:
                log.get().warning("cleaning up goes on", part=part.__name__, text=error.text, again_in=delay)
            await asyncio.sleep(delay)
            delay = min(delay * 2, longest)

    async def _clean_monitors(self) -> None:
        answer = await self._node.peers.supervisor.call(supervisor.MonitorList(), timeout=SHORT)
        for state in answer.monitors:
            if self._unknown(state.container_id):
                log.get().warning("an unknown monitor is removed", container=state.container_id)
                await self._remove_monitor(state.container_id, alive=state.alive)

    async def _remove_monitor(self, container_id: str, *, alive: bool) -> None:
        if alive:
            client = self._node.peers.monitor(container_id)
            try:
                await client.call(monitor.Delete(), timeout=CLEAN_TIMEOUT)
            except RemoteError as error:
                if error.code is not Code.UNAVAILABLE:
                    raise
            await self._node.peers.forget_monitor(container_id)
            await asyncio.sleep(0.1)  # it exits after its answer
        request = supervisor.MonitorRemove(container_id=container_id)
        await self._node.peers.supervisor.call(request, timeout=SHORT)

    async def _clean_inits(self) -> None:
        answer = await self._node.peers.supervisor.call(supervisor.InitList(), timeout=SHORT)
        for state in answer.inits:
            if self._unknown(state.pod_id):
                log.get().warning("an unknown pod init is ended", pod=state.pod_id)
                request = supervisor.InitStop(pod_id=state.pod_id)
                await self._node.peers.supervisor.call(request, timeout=SHORT)

    async def _clean_parents(self) -> None:
        answer = await self._node.peers.supervisor.call(supervisor.ParentList(), timeout=SHORT)
        for pod_id in answer.pods:
            if self._unknown(pod_id):
                request = supervisor.ParentRelease(pod_id=pod_id)
                await self._node.peers.supervisor.call(request, timeout=SHORT)

    async def _clean_network(self) -> None:
        answer = await self._node.peers.network.call(network.PodList(), timeout=SHORT)
        for pod_id in answer.pods:
            if self._unknown(pod_id):
                log.get().warning("an unknown pod's network is torn down", pod=pod_id)
                request = network.PodTeardown(pod_id=pod_id)
                await self._node.peers.network.call(request, timeout=CLEAN_TIMEOUT)

    async def _clean_storage(self) -> None:
        """Containers first: their mounts may lie on a pod's files."""
        answer = await self._node.peers.storage.call(storage.InventoryList(), timeout=SHORT)
        for container_id in answer.containers:
            if self._unknown(container_id):
                log.get().warning("an unknown container's files are removed", container=container_id)
                removal = storage.ContainerRemove(container_id=container_id)
                await self._node.peers.storage.call(removal, timeout=CLEAN_TIMEOUT)
        for pod_id in answer.pods:
            if self._unknown(pod_id):
                log.get().warning("an unknown pod's files are removed", pod=pod_id)
                teardown = storage.PodTeardown(pod_id=pod_id)
                await self._node.peers.storage.call(teardown, timeout=CLEAN_TIMEOUT)


def strongest(intents: list[Intent]) -> dict[str, Intent]:
    """Of each subject's intents the one that implies the others."""
    chosen: dict[str, Intent] = {}
    for intent in intents:
        other = chosen.get(intent.subject)
        if other is None or _strength(intent) < _strength(other):
            chosen[intent.subject] = intent
    return chosen


def _strength(intent: Intent) -> int:
    return STRENGTH.index(intent.kind.partition(".")[2])
