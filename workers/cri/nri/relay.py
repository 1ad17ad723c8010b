"""Runs in: cri. Tells the nri worker of pods and containers, and does what plugins want of them.

Owns the session: a standing call through which nri asks, since nobody calls cri. The supervisor tells when
a nri worker comes and goes; while there is none, nothing is sent anywhere. Whether a plugin is told of a
container by its synchronization or by an event is decided at one moment: when CreateContainer was answered,
or would have been asked if there were anybody (`_told`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from ipc import log
from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError, unavailable
from ipc.messages import Body, Request, nri, storage
from ipc.settings import CriSettings
from workers.cri.node import Node
from workers.cri.nri import facts, limits
from workers.cri.nri.gate import Gate
from workers.cri.peers import SHORT
from workers.cri.plugins import Plugins
from workers.cri.spec import Built, cdi, cgroups
from workers.cri.spec.build import hook
from workers.cri.state import Container, Phase, Pod

R = TypeVar("R", bound=Body)
PIECE = 32  # containers in one message of the state
#: Seconds that an evicted container has to end by itself.
EVICTION_GRACE = 10.0
_SYNCHRONIZED = frozenset({Phase.CREATED, Phase.RUNNING})

#: Change a container's limits; given by Updates.
Change = Callable[[str, dict[str, Any]], Coroutine[Any, Any, None]]
#: Stop a container; given by Containers.
Stop = Callable[[str, float], Coroutine[Any, Any, None]]


class Relay(Plugins):
    """Whoever is connected to the nri worker."""

    def __init__(self, node: Node, change: Change, stop: Stop) -> None:
        self._node = node
        self._change = change
        self._stop = stop
        self._gate = Gate()
        self._worker = 0
        self._session: asyncio.Task[None] | None = None
        self._linked = False
        self._ready = asyncio.Event()
        #: Pods and containers in the making whose time to be told of has passed, with their spec.
        self._told: dict[str, bytes] = {}
        self._stopped_pods: set[str] = set()
        self._ends: dict[str, asyncio.Task[None]] = {}

    # -- the session ----------------------------------------------------------------------------------

    def reload(self, settings: CriSettings) -> None:
        """A nri worker came, or went."""
        if settings.nri_worker == self._worker:
            return
        self._worker = settings.nri_worker
        if self._session is not None:
            self._session.cancel()
        self._linked = False
        self._ready.clear()
        if self._worker:
            self._session = self._node.operations.background("nri session", self._hold())

    async def _hold(self) -> None:
        """Stay in the session until nri ends it, or dies: the supervisor will tell of the next one."""
        mine = self._worker
        await self._node.peers.nri.close()  # what is left of a connection to an earlier one
        self._linked = True
        try:
            await self._node.peers.nri.call(nri.SessionOpen(), on_update=self._asked)
        except RemoteError as error:
            log.get().warning("nri is gone", text=error.text)
        finally:
            if self._worker == mine:
                self._linked = False
                self._ready.clear()

    def _asked(self, ask: nri.Ask) -> None:
        match ask.kind:
            case "ready":
                self._ready.set()
            case "synchronize":
                self._node.operations.background(f"synchronize plugin {ask.plugin}", self._synchronize(ask))
            case "update":
                self._node.operations.background(f"wishes of plugin {ask.plugin}", self._answer(ask))

    async def _synchronize(self, ask: nri.Ask) -> None:
        """Tell a plugin of everything, while nothing happens that it would hear of as an event."""
        try:
            async with self._gate.exclusive():
                wishes = await self._put_state(ask.number)
            await self._grant_quietly(wishes)
        except RemoteError as error:
            log.get().warning("a plugin was not synchronized", plugin=ask.plugin, text=error.text)

    async def _put_state(self, number: int) -> nri.Wishes:
        store = self._node.store
        ready = [pod for pod in store.pods.values() if pod.phase is Phase.READY or self._is_told(pod)]
        pods = [facts.of_pod(pod) for pod in ready]
        live = [one for one in store.containers.values() if self._is_synchronized(one)]
        for at in range(0, len(live), PIECE):
            found = [self._container(one) for one in live[at : at + PIECE] if one.id in store.containers]
            piece = nri.StatePut(number=number, containers=found, more=True)
            await self._node.peers.nri.call(piece, timeout=SHORT)
        # No limit here: nri's own ends it.
        return await self._node.peers.nri.call(nri.StatePut(number=number, pods=pods))

    def _is_told(self, thing: Pod | Container) -> bool:
        return thing.phase is Phase.CREATING and thing.id in self._told

    def _is_synchronized(self, container: Container) -> bool:
        return not container.record.sandbox and (container.phase in _SYNCHRONIZED or self._is_told(container))

    def _container(self, container: Container, spec: bytes | None = None) -> nri.ContainerFacts:
        return facts.of_container(container, spec or self._told.get(container.id) or self._spec(container))

    def _spec(self, container: Container) -> bytes:
        """Its spec; an empty one for a container that was lost with it and found again."""
        try:
            return self._node.store.spec(container.id)
        except RemoteError:
            return b"{}"

    # -- asking ---------------------------------------------------------------------------------------

    async def _link(self) -> bool:
        """Whether there is anybody to ask; where plugins are installed, wait until they are there.

        Raises RemoteError(UNAVAILABLE) if they do not come.
        """
        if self._node.settings.nri_needed:
            try:
                await asyncio.wait_for(self._ready.wait(), SHORT)
            except TimeoutError:
                raise unavailable("the node resource plugins are not there yet") from None
        return self._linked

    async def _ask(self, request: Request[R]) -> R | None:
        """Ask nri; None if it has just died and may be done without. Raises RemoteError."""
        try:
            timeout = self._node.settings.container_create_timeout
            return await self._node.peers.nri.call(request, timeout=timeout)
        except RemoteError as error:
            if error.code is not Code.UNAVAILABLE or self._node.settings.nri_needed:
                raise
            log.get().warning("nri is gone: it goes on without plugins", request=request.NAME)
            return None

    async def _tell(self, request: Request[R]) -> R | None:
        """Tell nri of what has happened anyway: an objection is logged."""
        if not self._linked:
            return None
        async with self._gate.shared():
            try:
                return await self._ask(request)
            except RemoteError as error:
                log.get().warning("plugins were not told", request=request.NAME, text=error.text)
                return None

    # -- pods -----------------------------------------------------------------------------------------

    async def run_pod(self, pod: Pod) -> None:
        """RunPodSandbox."""
        if not await self._link():
            self._told[pod.id] = b""
            return
        async with self._gate.shared():
            self._told[pod.id] = b""
            await self._ask(nri.PodEvent(event="RunPodSandbox", pod=facts.of_pod(pod)))

    async def update_pod(self, pod: Pod, request: pb.UpdatePodSandboxResourcesRequest) -> None:
        """UpdatePodSandbox."""
        if not await self._link():
            return
        event = nri.PodEvent(
            event="UpdatePodSandbox",
            pod=facts.of_pod(pod),
            overhead=facts.encoded(request.overhead),
            resources=facts.encoded(request.resources),
        )
        async with self._gate.shared():
            await self._ask(event)

    async def pod_updated(self, pod: Pod) -> None:
        """PostUpdatePodSandbox."""
        await self._tell(nri.PodEvent(event="PostUpdatePodSandbox", pod=facts.of_pod(pod)))

    async def stop_pod(self, pod: Pod) -> None:
        """StopPodSandbox, once."""
        if pod.id not in self._stopped_pods:
            self._stopped_pods.add(pod.id)
            await self._tell(nri.PodEvent(event="StopPodSandbox", pod=facts.of_pod(pod)))

    async def remove_pod(self, pod: Pod) -> None:
        """RemovePodSandbox."""
        self._told.pop(pod.id, None)
        self._stopped_pods.discard(pod.id)
        await self._tell(nri.PodEvent(event="RemovePodSandbox", pod=facts.of_pod(pod)))

    async def undo_pod(self, pod: Pod) -> None:
        """Whoever was told of it is told of its end."""
        if pod.id in self._told:
            await self.stop_pod(pod)
            await self.remove_pod(pod)

    # -- containers -----------------------------------------------------------------------------------

    async def create(self, pod: Pod, container: Container, built: Built) -> Built:
        """CreateContainer."""
        if container.record.sandbox:
            return built
        if not await self._link():
            self._told[container.id] = built.spec
            return built
        runtime = await self._node.runtime_info(pod.record.runtime or pod.record.handler)
        async with self._gate.shared():
            self._told[container.id] = built.spec
            adjusted = await self._ask(
                nri.ContainerCreate(
                    pod=facts.of_pod(pod),
                    container=self._container(container, built.spec),
                    oci_version=runtime.oci_version_max,
                )
            )
        if adjusted is None:
            return built
        await self._grant(adjusted.wishes)
        return await self._adjusted(container, built, adjusted)

    async def _adjusted(self, container: Container, built: Built, adjusted: nri.Adjusted) -> Built:
        for sentence in adjusted.degraded:
            log.get().warning("degraded", container=container.id, what=sentence)
        path, spec = built.cgroup_path, adjusted.spec
        if adjusted.cgroups_path:
            driver = "systemd" if built.systemd_cgroup else "cgroupfs"
            path = cgroups.relative(driver, adjusted.cgroups_path)
        if adjusted.cdi_devices:
            spec = await self._with_cdi(spec, adjusted.cdi_devices)
        return dataclasses.replace(built, spec=spec, cgroup_path=path)

    async def _with_cdi(self, spec: bytes, names: list[str]) -> bytes:
        request = storage.CdiResolve(names=names)
        found = await self._node.peers.storage.call(request, timeout=SHORT)
        decoded = msgspec.json.decode(spec)
        cdi.apply(decoded, found.edits)
        for stage, hooks in found.hooks.items():
            decoded.setdefault("hooks", {}).setdefault(stage, []).extend(map(hook, hooks))
        return msgspec.json.encode(decoded)

    async def created(self, container: Container) -> None:
        """PostCreateContainer."""
        self._told.pop(container.id, None)
        await self._event("PostCreateContainer", container)

    async def undo(self, container: Container) -> None:
        """Whoever was told of it is told of its end."""
        if container.id in self._told:
            await self._event("StopContainer", container)
            await self._event("RemoveContainer", container)
            del self._told[container.id]

    async def start(self, container: Container) -> None:
        """StartContainer."""
        event = self._event_of("StartContainer", container)
        if event is not None and await self._link():
            async with self._gate.shared():
                await self._ask(event)

    async def started(self, container: Container) -> None:
        """PostStartContainer."""
        await self._event("PostStartContainer", container)

    async def update(
        self, container: Container, asked: pb.LinuxContainerResources
    ) -> tuple[pb.LinuxContainerResources, dict[str, object]]:
        """UpdateContainer."""
        event = self._event_of("UpdateContainer", container)
        if event is None or not await self._link():
            return asked, {}
        before = limits.to_oci(asked)
        request = nri.ContainerUpdate(
            pod=event.pod, container=event.container, resources=msgspec.json.encode(before)
        )
        async with self._gate.shared():
            updated = await self._ask(request)
        if updated is None:
            return asked, {}
        await self._grant(updated.wishes)
        changed = limits.changes(before, msgspec.json.decode(updated.resources))
        wanted = pb.LinuxContainerResources()
        wanted.CopyFrom(asked)
        limits.override(wanted, limits.to_cri(changed))
        return wanted, limits.beyond(changed)

    async def updated(self, container: Container) -> None:
        """PostUpdateContainer."""
        await self._event("PostUpdateContainer", container)

    def ended(self, container: Container) -> None:
        """StopContainer, beside whatever goes on; `settled` waits for it."""
        if self._linked and not container.record.sandbox:
            name = f"plugins hear of the end of {container.id}"
            task = self._node.operations.background(name, self._event("StopContainer", container))
            self._ends[container.id] = task
            task.add_done_callback(lambda _task: self._ends.pop(container.id, None))

    async def settled(self, container: Container) -> None:
        """Wait for the event of its end."""
        if task := self._ends.get(container.id):
            await asyncio.wait({task})

    async def remove(self, container: Container) -> None:
        """RemoveContainer, after the event of its end."""
        await self.settled(container)
        await self._event("RemoveContainer", container)

    def _event_of(self, event: str, container: Container) -> nri.ContainerEvent | None:
        """None for what plugins do not see: sandbox containers, and those whose pod is gone."""
        pod = self._node.store.pods.get(container.record.pod_id)
        if pod is None or container.record.sandbox:
            return None
        return nri.ContainerEvent(event=event, pod=facts.of_pod(pod), container=self._container(container))

    async def _event(self, event: str, container: Container) -> None:
        """Tell of something that has happened anyway."""
        request = self._event_of(event, container) if self._linked else None
        wishes = await self._tell(request) if request is not None else None
        if wishes is not None:
            await self._grant_quietly(wishes)

    # -- what plugins want ----------------------------------------------------------------------------

    async def _answer(self, ask: nri.Ask) -> None:
        """A plugin wants something out of turn: say what could not be granted."""
        failed = [one.container_id for one in ask.wishes.updates if await self._apply(one) is not None]
        self._evict(ask.wishes.evictions)
        done = nri.WishesDone(number=ask.number, failed=failed)
        try:
            await self._node.peers.nri.call(done, timeout=SHORT)
        except RemoteError as error:  # the plugin, or nri, is gone: nobody wants to know any more
            log.get().info("a plugin does not wait for its answer", plugin=ask.plugin, text=error.text)

    async def _grant(self, wishes: nri.Wishes) -> None:
        """Do what plugins want besides. Raises RemoteError if an update fails that must not."""
        self._evict(wishes.evictions)
        for update in wishes.updates:
            error = await self._apply(update)
            if error is not None and not update.ignore_failure:
                raise error

    async def _grant_quietly(self, wishes: nri.Wishes) -> None:
        """As `_grant`, where nothing can be refused any more; the log has what failed."""
        self._evict(wishes.evictions)
        for update in wishes.updates:
            await self._apply(update)

    async def _apply(self, update: nri.Update) -> RemoteError | None:
        """Change a container's limits; return what went wrong, which is in the log."""
        try:
            await self._change(update.container_id, msgspec.json.decode(update.resources))
        except RemoteError as error:
            log.get().warning("an update failed", container=update.container_id, text=error.text)
            return error
        return None

    def _evict(self, evictions: list[nri.Eviction]) -> None:
        """Beside whatever goes on: the plugin that wants it may be the one that is told of it."""
        for eviction in evictions:
            reason = eviction.reason[:1000]
            log.get().warning("a plugin evicts a container", container=eviction.container_id, reason=reason)
            step = self._evicted(eviction.container_id)
            self._node.operations.background(f"evict {eviction.container_id}", step)

    async def _evicted(self, container_id: str) -> None:
        try:
            await self._stop(container_id, EVICTION_GRACE)
        except RemoteError as error:
            log.get().warning("an eviction failed", container=container_id, text=error.text)
