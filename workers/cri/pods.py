"""Runs in: cri. The life of a pod sandbox: run, stop, remove.

A pod is its files (storage), its namespaces and addresses (network) and, if it shares its PID namespace, its
init (supervisor). Only where a pause image is configured it has a sandbox container (sandbox.py), which is
the init then. Every step can be repeated and taken back by the pod's id, so a pod that could not be made is
removed like any other, for as long as that takes, while its name is free at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ipc import log
from ipc.cri import api_pb2 as pb
from ipc.errors import RemoteError, precondition
from ipc.messages import network, storage, supervisor
from workers.cri.inits import Inits
from workers.cri.names import new_id
from workers.cri.node import Node
from workers.cri.operations import Key, uncancelled
from workers.cri.peers import SHORT, settle_all, together, within
from workers.cri.sandbox import Sandboxes
from workers.cri.spec import cgroups, userns, validate
from workers.cri.spec import pod as podspec
from workers.cri.state import Phase, Pod, PodRecord, pod_name

#: Seconds between attempts to remove what is left of a pod: doubled up to the second number, for ever.
REAP_BACKOFF = (1.0, 60.0)

#: Removes a container entirely, whatever it does; given by Containers.
RemoveContainer = Callable[[str], Coroutine[Any, Any, None]]
#: Kills a container and waits for its end; given by Containers.
KillContainer = Callable[[str], Coroutine[Any, Any, None]]


def shown(pod: Pod) -> str:
    """namespace/name for logs."""
    return f"{pod.config.metadata.namespace}/{pod.config.metadata.name}"


class Pods:
    """Pod sandboxes."""

    def __init__(
        self, node: Node, kill: KillContainer, remove: RemoveContainer, sandboxes: Sandboxes
    ) -> None:
        self._node = node
        self._store = node.store
        self._sandboxes = sandboxes
        self.inits = Inits(node)
        self._kill_container = kill
        self._remove_container = remove

    # -- run ------------------------------------------------------------------------------------------

    async def run(self, config: pb.PodSandboxConfig, handler: str) -> str:
        """Make a pod and return its id; the same metadata again joins the first call or gets its pod."""
        self._check(config)
        self._node.runtime(handler)  # refused at once if there is none of the name
        if userns.of_pod(config):
            await self._need_user_namespaces(handler)
        key = ("pod.run", *pod_name(config))
        return await self._node.operations.run(key, lambda: self._run(config, handler))

    def _check(self, config: pb.PodSandboxConfig) -> None:
        """Everything that can be said before anything is made. Raises RemoteError(INVALID_ARGUMENT)."""
        validate.pod(config)
        any_id = new_id()
        settings = self._node.settings
        cgroups.cgroup_path(
            settings.cgroup_driver, config.linux.cgroup_parent, settings.default_cgroup_parent, any_id
        )
        podspec.network_setup(any_id, config, default_sysctls=settings.default_sysctls)
        podspec.storage_setup(any_id, config, node_name=self._node.node_name)

    async def _need_user_namespaces(self, handler: str) -> None:
        support = await self._node.idmap()
        if not support.supported:
            raise precondition(f"this node cannot have pods with a user namespace: {support.why}")
        runtime = await self._node.runtime_info(handler)
        if not runtime.user_namespaces:
            raise precondition(f"runtime handler {runtime.name!r} cannot join a user namespace")

    async def _run(self, config: pb.PodSandboxConfig, handler: str) -> str:
        twin = self._store.pod_named(pod_name(config))
        if twin is not None and twin.phase is Phase.READY:
            return twin.id
        if twin is not None:  # it has ended: it makes room
            await self._remove_joined(twin)
        record = PodRecord(
            id=new_id(),
            created_at_ns=time.time_ns(),
            handler=handler,
            runtime=self._node.runtime(handler).name,
            pause_image=self._node.settings.pause_image,
        )
        record.hostname = podspec.hostname(config, record.id, self._node.node_name)
        return await self._build(self._store.add_pod(record, config))

    async def resume(self, pod: Pod) -> str:
        """Finish a pod that the last worker began; every step may be repeated. A repeated request joins."""
        return await self._node.operations.run(("pod.run", *pod.name), lambda: self._build(pod))

    async def _build(self, pod: Pod) -> str:
        try:
            await within(self._node.settings.pod_setup_timeout, "setting up the pod", self._set_up(pod))
            self._sandboxes.check(pod)
            await self._node.plugins.run_pod(pod)
        except (RemoteError, asyncio.CancelledError):
            await uncancelled(self._discard(pod))
            raise
        pod.record.phase = Phase.READY
        self._store.save_pod(pod, done="pod.run")
        self.inits.watch(pod)
        log.get().info("pod runs", pod=pod.id, name=shown(pod), ips=pod.record.ips)
        return pod.id

    async def _set_up(self, pod: Pod) -> None:
        steps = [self._set_up_network(pod), self._set_up_files(pod), self._note_parent(pod)]  # longest first
        if pod.record.pause_image:
            await together(*steps, self._sandboxes.need_image(pod.record.pause_image))
            await self._sandboxes.run(pod)
        else:
            await together(*steps)
            if podspec.shares_pid(pod.config):
                await self._start_init(pod)

    async def _set_up_files(self, pod: Pod) -> None:
        request = podspec.storage_setup(pod.id, pod.config, node_name=self._node.node_name)
        timeout = self._node.settings.pod_setup_timeout
        pod.record.files = await self._node.peers.storage.call(request, timeout=timeout)

    async def _note_parent(self, pod: Pod) -> None:
        """Whoever removes the pod removes what the runtime will have made of its cgroup parent."""
        if pod.config.linux.cgroup_parent:
            request = supervisor.ParentNote(pod_id=pod.id, cgroup_parent=self._cgroup_parent(pod))
            await self._node.peers.supervisor.call(request, timeout=SHORT)

    async def _set_up_network(self, pod: Pod) -> None:
        settings = self._node.settings
        request = podspec.network_setup(pod.id, pod.config, default_sysctls=settings.default_sysctls)
        request.cgroup_parent = self._cgroup_parent(pod)
        timeout = settings.pod_setup_timeout
        answer = await self._node.peers.network.call(request, timeout=timeout)
        pod.record.ips = answer.ips
        pod.record.namespaces = {**pod.record.namespaces, **answer.namespaces}
        pod.record.cni_result = answer.cni_result

    async def _start_init(self, pod: Pod) -> None:
        request = supervisor.InitStart(
            pod_id=pod.id,
            cgroup_parent=self._cgroup_parent(pod),
            user_namespace="user" in pod.record.namespaces,
        )
        answer = await self._node.peers.supervisor.call(request, timeout=SHORT)
        pod.record.init_pid = answer.pid
        pod.record.namespaces = {**pod.record.namespaces, "pid": answer.pid_namespace}

    def _cgroup_parent(self, pod: Pod) -> str:
        settings = self._node.settings
        return cgroups.pod_group(
            settings.cgroup_driver, pod.config.linux.cgroup_parent, settings.default_cgroup_parent
        )

    async def _discard(self, pod: Pod) -> None:
        """What could not be made is taken back; its name is free from now on, whatever that takes."""
        pod.record.phase = Phase.GONE
        self._store.save_pod(pod, done="pod.run")
        await self._node.plugins.undo_pod(pod)
        try:
            await self._tear_down(pod)
        except RemoteError as error:
            log.get().error("undoing a pod failed", pod=pod.id, code=error.code, text=error.text)
            self._node.operations.background(f"reap pod {pod.id}", self.reap(pod))

    async def reap(self, pod: Pod) -> None:
        """Remove what is left of a pod that nobody sees any more; tries until it is done."""
        delay, longest = REAP_BACKOFF
        while True:
            try:
                return await self._tear_down(pod)
            except RemoteError as error:
                log.get().warning("removing a pod goes on", pod=pod.id, text=error.text, again_in=delay)
            await asyncio.sleep(delay)
            delay = min(delay * 2, longest)

    async def _tear_down(self, pod: Pod) -> None:
        await self._of_all_containers(pod, self._remove_container)
        await self._release(pod)
        await self._free(pod)

    # -- stop -----------------------------------------------------------------------------------------

    async def stop(self, text: str) -> None:
        """Kill its containers, give its addresses and namespaces back. Unknown or stopped is success."""
        pod = await self._find(text)
        if pod is not None:
            await self._stop_joined(pod)

    async def _find(self, text: str) -> Pod | None:
        """The pod, unless it is being reaped; one that is being made is ended first."""
        pod = self._store.find_pod(text)
        if pod is not None and pod.phase is Phase.CREATING:
            key = ("pod.run", *pod.name)
            await self._node.operations.end(lambda running: running == key)
        return None if pod is None or pod.phase is Phase.GONE else pod

    async def _stop_joined(self, pod: Pod) -> None:
        await self._node.operations.run(("pod.stop", pod.id), lambda: self._stop(pod))

    async def _stop(self, pod: Pod) -> None:
        if pod.record.released or pod.phase is Phase.GONE:
            return
        self._store.begin_ending(pod.id, "pod.stop")
        pod.record.phase = Phase.STOPPED  # from here on no container is made or started in it
        self._store.save_pod(pod)
        await self._end_creations(pod)
        await self._of_all_containers(pod, self._kill_container)
        await self._node.plugins.stop_pod(pod)
        await self._release(pod)
        self._store.save_pod(pod, done="pod.stop")
        log.get().info("pod stopped", pod=pod.id, name=shown(pod))

    async def _of_all_containers(self, pod: Pod, step: KillContainer | RemoveContainer) -> None:
        """Do something to all containers of a pod at the same time, and to its sandbox container last."""
        for last in (False, True):
            containers = self._store.containers_of(pod.id)
            await settle_all(*(step(one.id) for one in containers if one.record.sandbox is last))

    async def _end_creations(self, pod: Pod) -> None:
        def of_pod(key: Key) -> bool:
            return key[:2] == ("container.create", pod.id)

        await self._node.operations.end(of_pod)

    async def _release(self, pod: Pod) -> None:
        """End the init and give the network back; both are tried even if one fails."""
        if pod.record.released:
            return
        peers, settings = self._node.peers, self._node.settings
        await settle_all(
            peers.supervisor.call(supervisor.InitStop(pod_id=pod.id), timeout=SHORT),
            peers.network.call(network.PodTeardown(pod_id=pod.id), timeout=settings.pod_setup_timeout),
        )
        pod.record.released = True
        self._store.save_pod(pod)

    # -- remove ---------------------------------------------------------------------------------------

    async def remove(self, text: str) -> None:
        """Stop the pod if need be, remove it with its containers. Unknown is success."""
        pod = await self._find(text)
        if pod is not None:
            await self._remove_joined(pod)

    async def _remove_joined(self, pod: Pod) -> None:
        await self._node.operations.run(("pod.remove", pod.id), lambda: self._remove(pod))

    async def _remove(self, pod: Pod) -> None:
        if pod.id not in self._store.pods:
            return
        self._store.begin_ending(pod.id, "pod.remove")
        await self._stop_joined(pod)
        await self._of_all_containers(pod, self._remove_container)
        await self._node.plugins.remove_pod(pod)
        await self._free(pod)
        log.get().info("pod removed", pod=pod.id, name=shown(pod))

    async def _free(self, pod: Pod) -> None:
        peers, timeout = self._node.peers, self._node.settings.pod_setup_timeout
        steps: list[Coroutine[Any, Any, Any]] = [
            peers.storage.call(storage.PodTeardown(pod_id=pod.id), timeout=timeout)
        ]
        if pod.config.linux.cgroup_parent:
            release = supervisor.ParentRelease(pod_id=pod.id)
            steps.append(peers.supervisor.call(release, timeout=SHORT))
        await settle_all(*steps)
        self._store.drop_pod(pod)

    # -- look -----------------------------------------------------------------------------------------

    def need_ready(self, text: str) -> Pod:
        """The pod, if containers may be made in it. Raises RemoteError NOT_FOUND, FAILED_PRECONDITION."""
        pod = self._store.need_pod(text)
        if pod.phase is not Phase.READY:
            raise precondition(f"pod sandbox {pod.id} is not ready ({pod.phase})")
        return pod
