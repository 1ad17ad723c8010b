"""Runs in: cri. Changes of limits while a container or a pod lives.

A container's new limits are merged with the old ones, put in force by its monitor, and only then recorded, so
that the status shows what holds; a repetition after a crash in between does the same again. Updates of one
container wait for each other. A pod's are recorded: its cgroup is whose who made it, and that is the kubelet.
"""

from __future__ import annotations

import asyncio
from typing import Any
from weakref import WeakValueDictionary

from ipc import log
from ipc.cri import api_pb2 as pb
from ipc.errors import not_found, precondition
from ipc.messages import monitor
from workers.cri.containers import Containers
from workers.cri.node import Node
from workers.cri.pods import Pods
from workers.cri.spec import cgroups, notes, update
from workers.cri.state import Container, Phase

_ALIVE = frozenset({Phase.CREATED, Phase.RUNNING})


class Updates:
    """The updates of all containers and pods."""

    def __init__(self, node: Node, containers: Containers, pods: Pods) -> None:
        self._node = node
        self._containers = containers
        self._pods = pods
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def container(self, request: pb.UpdateContainerResourcesRequest) -> None:
        """UpdateContainerResources. Raises RemoteError."""
        container = self._containers.need(request.container_id)
        update.check(request)
        key = ("container.update", container.id, request.linux.SerializeToString(deterministic=True))
        await self._node.operations.run(key, lambda: self._by_plugins(container, request.linux))

    async def _by_plugins(self, container: Container, asked: pb.LinuxContainerResources) -> None:
        """Plugins have their say before the container's turn: they may want to update it themselves."""
        wanted, beyond = await self._node.plugins.update(container, asked)
        await self._in_turn(container, wanted, beyond)
        await self._node.plugins.updated(container)

    async def by_plugin(self, container_id: str, limits: dict[str, Any]) -> None:
        """A plugin wants other limits (those of the runtime-spec) in a container. Raises RemoteError."""
        from workers.cri.nri import limits as words  # loaded already where there are plugins

        container = self._containers.need(container_id)
        await self._in_turn(container, words.to_cri(limits), words.beyond(limits))

    async def _in_turn(
        self, container: Container, asked: pb.LinuxContainerResources, beyond: dict[str, Any]
    ) -> None:
        lock = self._locks.setdefault(container.id, asyncio.Lock())
        async with lock:
            if container.phase not in _ALIVE:
                text = f"container {container.id} is neither created nor running: {container.phase}"
                raise precondition(text)
            await self._update(container, asked, beyond)

    async def _update(
        self, container: Container, asked: pb.LinuxContainerResources, beyond: dict[str, Any]
    ) -> None:
        config = pb.ContainerConfig()
        config.CopyFrom(container.config)
        config.linux.resources.CopyFrom(update.merged(config.linux.resources, asked))
        if config == container.config and not beyond:
            return
        pod = self._node.store.pods.get(container.record.pod_id)
        if pod is None:
            raise not_found(f"the pod of container {container.id} is gone")
        host = await self._node.host()
        spec = self._node.store.spec(container.id)
        planned = update.update(spec, config.linux.resources, asked, host, beyond)
        for sentence in planned.degraded:
            log.get().warning("degraded", container=container.id, what=sentence)
        timeout = self._node.settings.container_create_timeout
        told = monitor.Update(
            resources=planned.resources,
            spec=planned.spec,
            keep=self._node.store.keep_container(pod, container, config),
            oom_score_adj=planned.oom_score,
            unit_properties=planned.unit_properties,
            timeout_ms=int(timeout * 1000),
        )
        await self._node.peers.monitor(container.id).call(told, timeout=timeout)
        self._node.store.save_update(container, config, planned.spec)
        log.get().info("container updated", container=container.id, pod=pod.id)

    async def pod(self, request: pb.UpdatePodSandboxResourcesRequest) -> None:
        """UpdatePodSandboxResources. Raises RemoteError."""
        pod = self._pods.need_ready(request.pod_sandbox_id)
        host = await self._node.host()
        for asked in (request.overhead, request.resources):
            cgroups.resources(asked, host, notes.Notes())
        await self._node.plugins.update_pod(pod, request)
        config = pb.PodSandboxConfig()
        config.CopyFrom(pod.config)
        if request.HasField("overhead"):
            config.linux.overhead.CopyFrom(request.overhead)
        if request.HasField("resources"):
            config.linux.resources.CopyFrom(request.resources)
        self._node.store.save_pod_update(pod, config)
        log.get().info("pod resources recorded", pod=pod.id)
        await self._node.plugins.pod_updated(pod)
