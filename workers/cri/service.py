"""Runs in: cri. One method per RPC of the CRI: a request comes in, an answer goes out.

Owns nothing; each method hands over to the part whose business it is (pods, containers, images, pull,
status) and puts the result into CRI's words. Errors are RemoteErrors (server.py answers them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

import msgspec

from ipc import aio
from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError, invalid, not_found
from ipc.messages import monitor
from ipc.messages.cri import ContainerFacts, ContainerGet, CriInfo, InfoGet, StateCheck, StateChecked
from ipc.messages.image import Auth
from ipc.messages.storage import FsInfo
from workers.cri import check, status, views
from workers.cri import images as image_views
from workers.cri.containers import Containers
from workers.cri.images import Images
from workers.cri.metrics import RpcStats
from workers.cri.node import Node
from workers.cri.observing import Observing
from workers.cri.peers import SHORT
from workers.cri.pods import Pods
from workers.cri.pull import Pulls
from workers.cri.sandbox import Sandboxes
from workers.cri.server import Rpc
from workers.cri.spec import exec_process
from workers.cri.state import HIDDEN, Container, Phase, Pod
from workers.cri.streaming import Streaming
from workers.cri.updates import Updates
from workers.cri.watch import Watcher

#: Seconds on top of an exec's own timeout for the monitor to kill it and answer.
EXEC_MARGIN = 15.0
#: A client's deadline is over before ours, which begins when the request has come: seconds that may differ.
CLIENT_CLOCK = 0.5
MAX_EXEC = 10 * 365 * 24 * 3600  # seconds; a larger timeout means none, and would not fit into a message
UNLIMITED = 365 * 24 * 3600.0
PROGRESS_INTERVAL = 0.2


class Service:
    """The parts of this worker, put together, and the RPCs on them."""

    def __init__(self, node: Node, version: str) -> None:
        self.node = node
        self.stats = RpcStats()
        self.watcher = Watcher(node)
        self.images = Images(node)
        self.pulls = Pulls(node, self.images)
        self.containers = Containers(node, self.images, self.watcher)
        sandboxes = Sandboxes(self.containers, self.images, self.pulls)
        self.pods = Pods(node, self.containers.kill, self.containers.remove_whole, sandboxes)
        self.updates = Updates(node, self.containers, self.pods)
        self.streaming = Streaming(node, self.containers, self.pods)
        self.observing = Observing(node, self.images)
        if node.settings.nri:
            from workers.cri.nri.relay import Relay

            node.plugins = Relay(node, self.updates.by_plugin, self.containers.stop)
        self._version = version

    # -- the runtime ----------------------------------------------------------------------------------

    async def version(self, _rpc: Rpc, _request: pb.VersionRequest) -> pb.VersionResponse:
        return status.version(self._version)

    async def status(self, _rpc: Rpc, request: pb.StatusRequest) -> pb.StatusResponse:
        return await status.status(self.node, verbose=request.verbose)

    async def runtime_config(self, _rpc: Rpc, _request: pb.RuntimeConfigRequest) -> pb.RuntimeConfigResponse:
        return status.runtime_config(self.node.settings)

    async def update_runtime_config(
        self, _rpc: Rpc, _request: pb.UpdateRuntimeConfigRequest
    ) -> pb.UpdateRuntimeConfigResponse:
        """The pod CIDR is the CNI configuration's business: there is nothing to do."""
        return pb.UpdateRuntimeConfigResponse()

    # -- pods -----------------------------------------------------------------------------------------

    async def run_pod_sandbox(self, _rpc: Rpc, request: pb.RunPodSandboxRequest) -> pb.RunPodSandboxResponse:
        if not request.HasField("config"):
            raise invalid("the request has no pod sandbox config")
        pod_id = await self.pods.run(request.config, request.runtime_handler)
        return pb.RunPodSandboxResponse(pod_sandbox_id=pod_id)

    async def stop_pod_sandbox(
        self, _rpc: Rpc, request: pb.StopPodSandboxRequest
    ) -> pb.StopPodSandboxResponse:
        await self.pods.stop(request.pod_sandbox_id)
        return pb.StopPodSandboxResponse()

    async def remove_pod_sandbox(
        self, _rpc: Rpc, request: pb.RemovePodSandboxRequest
    ) -> pb.RemovePodSandboxResponse:
        await self.pods.remove(request.pod_sandbox_id)
        return pb.RemovePodSandboxResponse()

    async def pod_sandbox_status(
        self, _rpc: Rpc, request: pb.PodSandboxStatusRequest
    ) -> pb.PodSandboxStatusResponse:
        pod = self.node.store.need_pod(request.pod_sandbox_id)
        if pod.phase in HIDDEN:
            raise RemoteError(Code.NOT_FOUND, f"pod sandbox {pod.id} is being made or removed")
        answer = views.pod_status(pod, verbose=request.verbose)
        for container in self.node.store.containers_of(pod.id):
            if container.phase not in HIDDEN and not container.record.sandbox:
                answer.containers_statuses.append(views.container_status(container, None).status)
        return answer

    async def update_pod_sandbox_resources(
        self, _rpc: Rpc, request: pb.UpdatePodSandboxResourcesRequest
    ) -> pb.UpdatePodSandboxResourcesResponse:
        await self.updates.pod(request)
        return pb.UpdatePodSandboxResourcesResponse()

    # -- containers -----------------------------------------------------------------------------------

    async def create_container(
        self, _rpc: Rpc, request: pb.CreateContainerRequest
    ) -> pb.CreateContainerResponse:
        if not request.HasField("config"):
            raise invalid("the request has no container config")
        pod = self.pods.need_ready(request.pod_sandbox_id)
        container_id = await self.containers.create(pod, request.config)
        return pb.CreateContainerResponse(container_id=container_id)

    async def start_container(self, rpc: Rpc, request: pb.StartContainerRequest) -> pb.StartContainerResponse:
        await self.containers.start(request.container_id, lambda: rpc.timeout(SHORT) > CLIENT_CLOCK)
        return pb.StartContainerResponse()

    async def stop_container(self, _rpc: Rpc, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
        await self.containers.stop(request.container_id, float(request.timeout))
        return pb.StopContainerResponse()

    async def remove_container(
        self, _rpc: Rpc, request: pb.RemoveContainerRequest
    ) -> pb.RemoveContainerResponse:
        await self.containers.remove(request.container_id)
        return pb.RemoveContainerResponse()

    async def container_status(
        self, _rpc: Rpc, request: pb.ContainerStatusRequest
    ) -> pb.ContainerStatusResponse:
        container = self.containers.need(request.container_id)
        spec = self.node.store.spec(container.id) if request.verbose else None
        return views.container_status(container, spec)

    async def update_container_resources(
        self, _rpc: Rpc, request: pb.UpdateContainerResourcesRequest
    ) -> pb.UpdateContainerResourcesResponse:
        await self.updates.container(request)
        return pb.UpdateContainerResourcesResponse()

    async def reopen_container_log(
        self, rpc: Rpc, request: pb.ReopenContainerLogRequest
    ) -> pb.ReopenContainerLogResponse:
        await self.containers.reopen_log(request.container_id, rpc.timeout(SHORT))
        return pb.ReopenContainerLogResponse()

    async def exec_sync(self, rpc: Rpc, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
        """Run a command to its end. DEADLINE_EXCEEDED when its timeout ends: kubelets' probes know that."""
        container = self.containers.need_running(request.container_id)
        process = exec_process(self.node.store.spec(container.id), request.cmd)
        seconds = min(max(0, request.timeout), MAX_EXEC)
        asked = monitor.ExecSync(process=process, timeout_ms=seconds * 1000)
        timeout = rpc.timeout(seconds + EXEC_MARGIN if seconds else UNLIMITED)
        try:
            done = await self.node.peers.monitor(container.id).call(asked, timeout=timeout)
        except RemoteError as error:
            raise self.containers.why_unreachable(container, error) from error
        if done.timed_out:
            raise RemoteError(Code.DEADLINE_EXCEEDED, f"command timed out after {seconds} s")
        return pb.ExecSyncResponse(stdout=done.stdout, stderr=done.stderr, exit_code=done.exit_code)

    # -- streams --------------------------------------------------------------------------------------

    async def exec(self, _rpc: Rpc, request: pb.ExecRequest) -> pb.ExecResponse:
        return pb.ExecResponse(url=self.streaming.exec(request))

    async def attach(self, _rpc: Rpc, request: pb.AttachRequest) -> pb.AttachResponse:
        return pb.AttachResponse(url=self.streaming.attach(request))

    async def port_forward(self, _rpc: Rpc, request: pb.PortForwardRequest) -> pb.PortForwardResponse:
        return pb.PortForwardResponse(url=self.streaming.port_forward(request))

    # -- images ---------------------------------------------------------------------------------------

    async def pull_image(self, _rpc: Rpc, request: pb.PullImageRequest) -> pb.PullImageResponse:
        self.node.runtime(request.image.runtime_handler)  # must be one that is configured
        auth = to_auth(request.auth) if request.HasField("auth") else None
        namespace = request.sandbox_config.metadata.namespace
        return pb.PullImageResponse(image_ref=await self.pulls.pull(request.image, auth, namespace))

    async def list_images(self, rpc: Rpc, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
        wanted = request.filter.image if request.HasField("filter") else None
        found = await self.images.list(wanted, rpc.timeout(SHORT))
        pinned = image_views.pinned(self.node.settings)
        return pb.ListImagesResponse(images=[image_views.to_cri(one, pinned) for one in found])

    async def image_status(self, rpc: Rpc, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
        """An absent image is an empty answer, not an error."""
        found = await self.images.find(request.image, rpc.timeout(SHORT))
        if found is None:
            return pb.ImageStatusResponse()
        info = image_views.verbose_info(found) if request.verbose else {}
        image = image_views.to_cri(found, image_views.pinned(self.node.settings))
        return pb.ImageStatusResponse(image=image, info=info)

    async def remove_image(self, rpc: Rpc, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
        await self.images.remove(request.image, rpc.timeout(SHORT))
        return pb.RemoveImageResponse()

    async def image_fs_info(self, rpc: Rpc, _request: pb.ImageFsInfoRequest) -> pb.ImageFsInfoResponse:
        """Images and containers share one file system, and each tells what is its own."""
        info = await self.images.fs_info(rpc.timeout(SHORT))
        return pb.ImageFsInfoResponse(
            image_filesystems=[fs_usage(info, info.used_bytes, info.used_inodes)],
            container_filesystems=[fs_usage(info, info.layers_bytes, info.layers_inodes)],
        )

    # -- operators ------------------------------------------------------------------------------------

    async def watch_pulls(self, _request: bytes) -> AsyncIterator[bytes]:
        """JSON lists of cri.PullState: at once, five a second while something is pulled, and at the end."""
        while True:
            states = self.pulls.states()
            yield msgspec.json.encode(states)
            await self.pulls.changed(PROGRESS_INTERVAL if states else UNLIMITED)

    def running(self) -> dict[str, int]:
        """How many pods are ready and how many containers run."""
        store = self.node.store
        pods = sum(pod.phase is Phase.READY for pod in store.match_pods(""))
        containers = sum(one.phase is Phase.RUNNING for one in store.match_containers(""))
        return {"pods": pods, "containers": containers}

    async def container_facts(self, _call: aio.Call, body: ContainerGet) -> ContainerFacts:
        """One container, for the operators' page."""
        found = self.node.store.match_containers(body.id) if body.id else []
        if len(found) != 1:
            raise not_found(f"no container, or more than one, has an id that begins with {body.id[:64]!r}")
        return facts_of(found[0], self.node.store.pods[found[0].record.pod_id])

    async def check_state(self, _call: aio.Call, body: StateCheck) -> StateChecked:
        """Whom cri knows, and what is wrong with its state."""
        return check.check(self.node, body)

    async def info(self, _call: aio.Call, _body: InfoGet) -> CriInfo:
        """Numbers for /metrics and /info."""
        store, observing = self.node.store, self.observing
        return CriInfo(
            pods=dict(Counter(str(pod.phase) for pod in store.match_pods(""))),
            containers=dict(Counter(str(container.phase) for container in store.match_containers(""))),
            pulls=self.pulls.states(),
            rpcs=self.stats.counts(),
            pulls_succeeded=self.pulls.succeeded,
            pulls_failed=self.pulls.failures.total(),
            pull_failures=dict(self.pulls.failures),
            pull_seconds=self.pulls.seconds,
            pulled_bytes=self.pulls.bytes,
            layers=dict(self.pulls.layers),
            operations=len(self.node.operations),
            counts=observing.counts.all(),
            oom_kills=observing.stats.oom_total,
            log_bytes_dropped=observing.counts.dropped_total,
            log_bytes_unsure=observing.counts.unsure_total,
            events_sent=observing.events.sent,
            events_dropped=observing.events.dropped,
            event_clients=len(observing.events.clients),
        )


def facts_of(container: Container, pod: Pod) -> ContainerFacts:
    """A container with its pod, without its environment."""
    record, config, meta = container.record, container.config, pod.config.metadata
    return ContainerFacts(
        id=record.id,
        name=config.metadata.name,
        attempt=config.metadata.attempt,
        state=str(record.phase),
        pod_id=record.pod_id,
        pod_name=meta.name,
        pod_namespace=meta.namespace,
        pod_uid=meta.uid,
        image=record.image_name,
        image_id=record.image_id,
        pid=record.pid if record.phase is Phase.RUNNING else 0,
        created_at_ns=record.created_at_ns,
        started_at_ns=record.started_at_ns,
        finished_at_ns=0 if record.exit is None else record.exit.finished_at_ns,
        exit_code=0 if record.exit is None else record.exit.exit_code,
        log_path=record.log_path,
        cgroup=record.cgroup,
        ip_addresses=pod.record.ips,
        labels=dict(config.labels),
        annotations=dict(config.annotations),
    )


def to_auth(auth: pb.AuthConfig) -> Auth:
    """CRI's credentials as they travel to the image worker."""
    return Auth(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        server_address=auth.server_address,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
    )


def fs_usage(info: FsInfo, used: int, inodes: int) -> pb.FilesystemUsage:
    """CRI's view of a file system's usage."""
    return pb.FilesystemUsage(
        timestamp=info.timestamp_ns,
        fs_id=pb.FilesystemIdentifier(mountpoint=info.mountpoint),
        used_bytes=pb.UInt64Value(value=used),
        inodes_used=pb.UInt64Value(value=inodes),
    )
