"""Runs in: cri. The worker's entrance and its whole API.

`runtime_service` and `image_service` are the RPCs of the CRI that are answered (the others say
UNIMPLEMENTED), `runtime_streams` and `image_streams` those whose answer is a stream, `handlers` the
messages of other processes. The gRPC socket is bound in a directory of cri's own and the supervisor renames
it into its public place. Runs without privileges, capabilities and network; writes only below
`<run_root>/cri`.
"""

from __future__ import annotations

import asyncio
import glob
import importlib
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from ipc import aio
from ipc.messages import control
from ipc.messages.cri import ContainerGet, InfoGet, SessionOpen, StateCheck, TokenRedeem
from ipc.release import version
from ipc.settings import CriSettings
from ipc.table import Handler, Handlers, table
from workers import boot, boot_aio
from workers.cri.node import Node
from workers.cri.peers import Peers
from workers.cri.recovery import Recovery
from workers.cri.server import Front, StreamHandler
from workers.cri.server import Handler as RpcHandler
from workers.cri.service import Service
from workers.cri.state import Store

BOOT_ID = "/proc/sys/kernel/random/boot_id"
STOP_GRACE = 5.0
#: It binds its socket before its turn comes, so it waits for that by itself (workers/boot.py).
STANDS_BY = True


def runtime_service(service: Service) -> dict[str, RpcHandler]:
    """RuntimeService: the RPCs that are answered."""
    return {
        "Version": service.version,
        "Status": service.status,
        "RuntimeConfig": service.runtime_config,
        "UpdateRuntimeConfig": service.update_runtime_config,
        "RunPodSandbox": service.run_pod_sandbox,
        "StopPodSandbox": service.stop_pod_sandbox,
        "RemovePodSandbox": service.remove_pod_sandbox,
        "PodSandboxStatus": service.pod_sandbox_status,
        "ListPodSandbox": service.observing.list_pods,
        "CreateContainer": service.create_container,
        "StartContainer": service.start_container,
        "StopContainer": service.stop_container,
        "RemoveContainer": service.remove_container,
        "ListContainers": service.observing.list_containers,
        "ContainerStatus": service.container_status,
        "ReopenContainerLog": service.reopen_container_log,
        "UpdateContainerResources": service.update_container_resources,
        "UpdatePodSandboxResources": service.update_pod_sandbox_resources,
        "ExecSync": service.exec_sync,
        "Exec": service.exec,
        "Attach": service.attach,
        "PortForward": service.port_forward,
        "ContainerStats": service.observing.container_stats,
        "ListContainerStats": service.observing.list_container_stats,
        "PodSandboxStats": service.observing.pod_stats,
        "ListPodSandboxStats": service.observing.list_pod_stats,
        "ListMetricDescriptors": service.observing.metric_descriptors,
        "ListPodSandboxMetrics": service.observing.list_pod_metrics,
    }


def runtime_streams(service: Service) -> dict[str, StreamHandler]:
    """RuntimeService: the server streams."""
    return {
        "StreamPodSandboxes": service.observing.stream_pods,
        "StreamContainers": service.observing.stream_containers,
        "StreamContainerStats": service.observing.stream_container_stats,
        "StreamPodSandboxStats": service.observing.stream_pod_stats,
        "StreamPodSandboxMetrics": service.observing.stream_pod_metrics,
        "GetContainerEvents": service.observing.container_events,
    }


def image_service(service: Service) -> dict[str, RpcHandler]:
    """ImageService: the RPCs that are answered."""
    return {
        "PullImage": service.pull_image,
        "ListImages": service.list_images,
        "ImageStatus": service.image_status,
        "RemoveImage": service.remove_image,
        "ImageFsInfo": service.image_fs_info,
    }


def image_streams(service: Service) -> dict[str, StreamHandler]:
    """ImageService: the server streams."""
    return {"StreamImages": service.observing.stream_images}


def handlers(service: Service) -> Handlers:
    """Messages of other processes."""
    return table(
        Handler(InfoGet, service.info, callers={"ops", "root"}),
        Handler(ContainerGet, service.container_facts, callers={"ops", "root"}),
        Handler(StateCheck, service.check_state, callers={"root"}),
        Handler(TokenRedeem, service.streaming.redeem, callers={"stream"}),
        Handler(SessionOpen, service.streaming.open, callers={"stream"}),
    )


#: A stream beside the CRI, for bulkheadctl's progress bar.
OPERATOR_SERVICE, WATCH_PULLS = "bulkhead.v1.Operator", "WatchPulls"


@dataclass(frozen=True)
class Prepared:
    """What is read while files can still be read."""

    boot_id: str
    node_name: str
    version: str


def prepare(context: boot.Context[CriSettings]) -> Prepared:
    """As root, before the sandbox: the facts that cannot be read inside it. gRPC was imported above."""
    if context.settings.nri:
        importlib.import_module("workers.cri.nri.relay")
    with open(BOOT_ID, encoding="ascii") as file:
        boot_id = file.read().strip()
    return Prepared(boot_id=boot_id, node_name=platform.node(), version=version())


def run(context: boot.Context[CriSettings], prepared: Prepared) -> None:
    """Inside the sandbox: serve until told to stop."""
    # Not asyncio.run: it would cancel what still goes on, and a cancelled operation undoes itself. What the
    # grace was too short for keeps its intent and is finished by the next worker.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(Worker(context, prepared).run())


class CriService(boot_aio.AioService):
    """Health answers name the RPCs in flight too."""

    front: Front
    running: Callable[[], Mapping[str, int]]  # for the service's status line
    flush: Callable[[], object]  # writes what the disk did not take when it was due

    async def _ping(self, call: aio.Call, body: control.Ping) -> control.Health:
        health = await super()._ping(call, body)
        self.flush()
        health.requests = [*health.requests, *self.front.in_flight()]
        health.counters |= self.running()
        return health


class Worker:
    """All of it, put together."""

    def __init__(self, context: boot.Context[CriSettings], prepared: Prepared) -> None:
        self._context = context
        self._prepared = prepared

    async def run(self) -> None:
        """Serve; returns after a clean stop, raises the first bug of a background task."""
        settings, prepared = self._context.settings, self._prepared
        path = f"{settings.run_root}/cri/state.db"
        store = Store(path, prepared.boot_id, wait=self._context.standby)
        node = Node(settings, store, Peers(settings), prepared.node_name)
        service = Service(node, prepared.version)
        front = self._front(service)
        control_ = self._control(service, front)
        await self._open(service, front, control_)
        await control_.wait()

    def _front(self, service: Service) -> Front:
        settings = self._context.settings
        front = Front(
            service.stats,
            max_requests=settings.max_requests,
            max_message_bytes=settings.max_message_bytes,
            max_connection_age=settings.max_connection_age,
        )
        front.add_service("RuntimeService", runtime_service(service), runtime_streams(service))
        front.add_service("ImageService", image_service(service), image_streams(service))
        front.add_stream(OPERATOR_SERVICE, WATCH_PULLS, service.watch_pulls)
        return front

    def _control(self, service: Service, front: Front) -> CriService:
        node = service.node

        async def stop() -> None:
            await front.stop(STOP_GRACE)
            await node.operations.close(STOP_GRACE)

        async def hand_over(relay: str) -> None:
            front.pass_on(relay)
            await front.settled(lambda: bool(len(node.operations)))
            front.move()
            node.let_go()
            service.streaming.let_go()
            node.operations.background("drain", drained())

        async def drained() -> None:
            await front.drained()
            control_.stop()

        def reload(settings: bytes) -> None:
            node.reload(msgspec.msgpack.decode(settings, type=CriSettings))

        control_ = CriService(
            self._context, handlers(service), on_stop=stop, on_reload=reload, on_hand_over=hand_over
        )
        control_.front = front
        control_.running = service.running
        control_.flush = node.store.flush
        node.operations.on_bug = control_._bug
        return control_

    async def _open(self, service: Service, front: Front, control_: CriService) -> None:
        """Bind first, so that clients wait in the socket's queue and not before a closed door."""
        await control_.start()
        path = self._bind_path()
        await front.start(path)
        await control_.tell(control.SocketBound(path=path))
        if self._context.standby:
            await control_.turn()
            service.node.store.open()
        service.streaming.take_over()
        recovery = Recovery(service.node, service.pods, service.containers, service.watcher)
        await recovery.load()
        service.node.open_to_plugins()
        service.observing.begin()
        front.open()
        service.streaming.open_sessions()
        recovery.run()

    def _bind_path(self) -> str:
        """A fresh path; sockets that dead workers bound and nobody renamed are removed."""
        directory = self._context.settings.bind_directory
        for stale in glob.glob(f"{glob.escape(directory)}/cri.sock.*"):
            os.unlink(stale)
        return f"{directory}/cri.sock.{os.getpid()}"
