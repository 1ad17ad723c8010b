"""Runs in: cri. The RPCs by which kubelets watch: lists, streams, stats, metrics, events.

One method per RPC. Owns nothing: lists.py, stats/ and events.py do the work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError
from workers.cri import images as image_views
from workers.cri import views
from workers.cri.counts import Counts
from workers.cri.events import Events
from workers.cri.images import Images
from workers.cri.lists import Lists, pieces
from workers.cri.node import Node
from workers.cri.peers import SHORT
from workers.cri.server import Rpc
from workers.cri.state import HIDDEN, Container, Pod
from workers.cri.stats import descriptors
from workers.cri.stats.collect import Stats, wanted_container
from workers.cri.stats.metrics import Metrics


class Observing:
    """What can be seen of pods, containers and images."""

    def __init__(self, node: Node, images: Images) -> None:
        self._node = node
        self._store = node.store
        self._images = images
        self.lists = Lists(node.store)
        self.events = Events(node.store)
        self.stats = Stats(node)
        self.counts = Counts(node, self.stats)
        self._metrics = Metrics(node, self.stats)

    def begin(self) -> None:
        """The state is loaded: follow it."""
        self.events.begin()
        self._store.observers += [self.stats.changed, self.counts.changed]
        self._node.operations.background("sample CPU use", self.stats.sample())

    # -- lists ----------------------------------------------------------------------------------------

    async def list_pods(
        self, _rpc: Rpc, request: pb.ListPodSandboxRequest
    ) -> pb.ListPodSandboxResponse | bytes:
        return self.lists.pods(request)

    async def list_containers(
        self, _rpc: Rpc, request: pb.ListContainersRequest
    ) -> pb.ListContainersResponse | bytes:
        return self.lists.containers(request)

    def stream_pods(
        self, _rpc: Rpc, request: pb.StreamPodSandboxesRequest
    ) -> AsyncIterator[pb.StreamPodSandboxesResponse]:
        return self.lists.stream_pods(request.filter)

    def stream_containers(
        self, _rpc: Rpc, request: pb.StreamContainersRequest
    ) -> AsyncIterator[pb.StreamContainersResponse]:
        return self.lists.stream_containers(request.filter)

    async def stream_images(
        self, rpc: Rpc, request: pb.StreamImagesRequest
    ) -> AsyncIterator[pb.StreamImagesResponse]:
        wanted = request.filter.image if request.HasField("filter") else None
        found = await self._images.list(wanted, rpc.timeout(SHORT))
        pinned = image_views.pinned(self._node.settings)
        images = (image_views.to_cri(one, pinned) for one in found)
        async for piece in pieces(images, pb.StreamImagesResponse, "images"):
            yield piece

    # -- stats ----------------------------------------------------------------------------------------

    async def container_stats(
        self, _rpc: Rpc, request: pb.ContainerStatsRequest
    ) -> pb.ContainerStatsResponse:
        container = self._store.need_container(request.container_id)
        if container.phase in HIDDEN:
            raise RemoteError(Code.NOT_FOUND, f"container {container.id} is being made or removed")
        return pb.ContainerStatsResponse(stats=await self.stats.container(container))

    def _containers(self, wanted: pb.ContainerStatsFilter) -> list[Container]:
        pod_id = views.pod_of(self._store, wanted.pod_sandbox_id)
        found = self._store.match_containers(wanted.id)
        return [one for one in found if wanted_container(one, wanted, pod_id)]

    async def list_container_stats(
        self, _rpc: Rpc, request: pb.ListContainerStatsRequest
    ) -> pb.ListContainerStatsResponse:
        found = self._containers(request.filter)
        layers = await self.stats.layers.all(found)
        return pb.ListContainerStatsResponse(
            stats=(self.stats.container_stats(one, layers.get(one.id)) for one in found)
        )

    async def stream_container_stats(
        self, _rpc: Rpc, request: pb.StreamContainerStatsRequest
    ) -> AsyncIterator[pb.StreamContainerStatsResponse]:
        found = self._containers(request.filter)
        layers = await self.stats.layers.all(found)
        stats = (
            self.stats.container_stats(one, layers.get(one.id))
            for one in found
            if one.id in self._store.containers
        )
        async for piece in pieces(stats, pb.StreamContainerStatsResponse, "container_stats"):
            yield piece

    async def pod_stats(self, _rpc: Rpc, request: pb.PodSandboxStatsRequest) -> pb.PodSandboxStatsResponse:
        pod = self._store.need_pod(request.pod_sandbox_id)
        if pod.phase in HIDDEN:
            raise RemoteError(Code.NOT_FOUND, f"pod sandbox {pod.id} is being made or removed")
        return pb.PodSandboxStatsResponse(stats=await self.stats.pod(pod))

    async def _pod_stats(self, wanted: pb.PodSandboxStatsFilter) -> Iterable[pb.PodSandboxStats]:
        """Stats of the ready pods that pass the filter, made one after the other."""
        layers, shared = await self.stats.layers.all(self.stats.live()), self.stats.parents()
        found = views.match_pods(
            self._store,
            pb.PodSandboxFilter(
                id=wanted.id,
                label_selector=wanted.label_selector,
                state=pb.PodSandboxStateValue(state=pb.PodSandboxState.SANDBOX_READY),
            ),
        )
        here = (pod for pod in found if self._is_here(pod))
        return (self.stats.pod_stats(pod, layers, shared) for pod in here)

    def _is_here(self, pod: Pod) -> bool:
        return pod.id in self._store.pods

    async def list_pod_stats(
        self, _rpc: Rpc, request: pb.ListPodSandboxStatsRequest
    ) -> pb.ListPodSandboxStatsResponse:
        return pb.ListPodSandboxStatsResponse(stats=await self._pod_stats(request.filter))

    async def stream_pod_stats(
        self, _rpc: Rpc, request: pb.StreamPodSandboxStatsRequest
    ) -> AsyncIterator[pb.StreamPodSandboxStatsResponse]:
        stats = await self._pod_stats(request.filter)
        async for piece in pieces(stats, pb.StreamPodSandboxStatsResponse, "pod_sandbox_stats"):
            yield piece

    # -- metrics --------------------------------------------------------------------------------------

    async def metric_descriptors(
        self, _rpc: Rpc, _request: pb.ListMetricDescriptorsRequest
    ) -> pb.ListMetricDescriptorsResponse:
        return descriptors.listed(self._node.settings.pod_metrics)

    async def list_pod_metrics(
        self, _rpc: Rpc, _request: pb.ListPodSandboxMetricsRequest
    ) -> pb.ListPodSandboxMetricsResponse:
        answer = pb.ListPodSandboxMetricsResponse()
        async for metrics in self._metrics.each():
            answer.pod_metrics.append(metrics)
        return answer

    async def stream_pod_metrics(
        self, _rpc: Rpc, _request: pb.StreamPodSandboxMetricsRequest
    ) -> AsyncIterator[pb.StreamPodSandboxMetricsResponse]:
        async for metrics in self._metrics.each():
            yield pb.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=[metrics])

    # -- events ---------------------------------------------------------------------------------------

    def container_events(self, _rpc: Rpc, _request: pb.GetEventsRequest) -> AsyncIterator[Any]:
        return self.events.listen()
