"""Runs in: the tests.

Everybody that `cri` talks to, played by small models that speak real ipc on real sockets: storage, network,
image, the supervisor and one monitor per container. They remember what they were asked, keep what they made
(so that a test can see that nothing is left) and fail or hang where a test wants it. `Worker` is the real
service behind a real gRPC socket; it can be crashed and started again on the same state.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import msgspec

from ipc import aio
from ipc.cri import api_pb2 as pb
from ipc.cri import api_pb2_grpc, rpc
from ipc.errors import Code, RemoteError, not_found, precondition
from ipc.messages import Body, Empty, Request, image, monitor, network, storage, supervisor
from ipc.settings import CriSettings, Runtime
from ipc.table import Handler, table
from tests.support import spec_inputs
from workers.cri import database, main, state
from workers.cri.kept import PodFiles
from workers.cri.node import Node
from workers.cri.peers import Peers
from workers.cri.recovery import Recovery
from workers.cri.server import Front
from workers.cri.service import Service

T = TypeVar("T")
IMAGE_CONFIG = b'{"config":{"Cmd":["/bin/sh"],"User":"nobody:users","StopSignal":"SIGUSR1"}}'
IMAGE_ID = "sha256:" + "ab" * 32
IMAGE = "docker.io/library/busybox:latest"
LAYERS = [
    image.Layer(
        digest=f"sha256:{n:064x}",
        size=1000 * (n + 1),
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        diff_id=f"sha256:{n + 100:064x}",
        chain_id=f"sha256:{n + 200:064x}",
    )
    for n in range(3)
]
RESOLVED = image.Resolved(
    name="quay.io/test/app:1",
    repo_digest="quay.io/test/app@sha256:" + "cd" * 32,
    manifest=b"{}",
    manifest_media_type="application/vnd.oci.image.manifest.v1+json",
    manifest_digest="sha256:" + "cd" * 32,
    config=IMAGE_CONFIG,
    config_digest="sha256:" + "ef" * 32,
    layers=LAYERS,
    source="the-endpoint",
)

PID = 4242
#: Requests that are answered with descriptors or with progress.
WANT_CALL = (storage.LayerBegin, image.BlobFetch, monitor.ExecOpen, monitor.AttachOpen, network.PortConnect)

Fault = RemoteError | Callable[[Any], Awaitable[Any]]


class MonitorModel:
    """The monitor of one container."""

    def __init__(self, world: World, container_id: str) -> None:
        self.world = world
        world.models.append(self)
        self.container_id = container_id
        self.status = "new"
        self.started_at_ns = 0
        self.exit: monitor.ExitRecord | None = None
        self.stops: list[monitor.Stop] = []
        self.updates: list[monitor.Update] = []
        self.spec = b""
        self.starting = False
        self.log_bytes_dropped = 0
        self.process = subprocess.Popen(["sleep", "1000"])  # whose end is the monitor's
        self._ended = asyncio.Event()
        self._grace: asyncio.Task[None] | None = None
        self.directory = world.root / "monitors" / container_id
        self.directory.mkdir(parents=True, exist_ok=True)
        rows: dict[type[Request[Any]], Callable[..., Any]] = {
            monitor.Create: self.create,
            monitor.Start: self.start,
            monitor.Stop: self.stop,
            monitor.Wait: self.wait,
            monitor.Delete: self.delete,
            monitor.StateGet: self.state,
            monitor.Update: self.update,
            monitor.LogReopen: self.reopen,
            monitor.ExecSync: self.exec_sync,
            monitor.ExecOpen: self.exec_open,
            monitor.AttachOpen: self.attach_open,
        }
        self.server = world.serve(str(self.directory / "ctl.sock"), rows)

    async def create(self, body: monitor.Create) -> monitor.Created:
        self.spec, self.status = body.spec, "created"
        (self.directory / "bundle").mkdir(exist_ok=True)
        (self.directory / "bundle" / "config.json").write_bytes(body.spec)
        (self.directory / "cri.json").write_bytes(body.keep)
        return monitor.Created(pid=PID)

    async def start(self, _body: monitor.Start) -> monitor.Started:
        if self.status == "created":
            self.status, self.started_at_ns = "running", time.time_ns()
        return monitor.Started(started_at_ns=self.started_at_ns)

    async def update(self, body: monitor.Update) -> Empty:
        self.updates.append(body)
        (self.directory / "cri.json").write_bytes(body.keep)
        return Empty()

    async def stop(self, body: monitor.Stop) -> monitor.Stopped:
        self.stops.append(body)
        if self.world.stubborn and body.grace_ms:
            self._grace = self._grace or asyncio.create_task(self._kill_after(body.grace_ms / 1000))
            await self._ended.wait()
        else:
            self.end(137 if body.signal == "SIGKILL" else 0)
        assert self.exit is not None
        return monitor.Stopped(exit=self.exit)

    async def _kill_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.end(137)

    async def wait(self, _body: monitor.Wait) -> monitor.Stopped:
        await self._ended.wait()
        assert self.exit is not None
        return monitor.Stopped(exit=self.exit)

    async def delete(self, _body: monitor.Delete) -> Empty:
        self.end(137)
        return Empty()

    async def state(self, _body: monitor.StateGet) -> monitor.State:
        return monitor.State(
            container_id=self.container_id,
            status=self.status,
            started_at_ns=self.started_at_ns,
            pid=0 if self.status == "new" else PID,
            starting=self.starting,
            log_bytes_dropped=self.log_bytes_dropped,
        )

    async def reopen(self, _body: monitor.LogReopen) -> Empty:
        return Empty()

    async def exec_sync(self, body: monitor.ExecSync) -> monitor.ExecDone:
        process = msgspec.json.decode(body.process)
        if process["args"][0] == "sleep":
            return monitor.ExecDone(exit_code=-1, timed_out=True)
        return monitor.ExecDone(exit_code=3, stdout=" ".join(process["args"]).encode(), stderr=b"e")

    async def exec_open(self, call: aio.Call, body: monitor.ExecOpen) -> monitor.SessionOpened:
        return _piped(call, " ".join(msgspec.json.decode(body.process)["args"]))

    async def attach_open(self, call: aio.Call, _body: monitor.AttachOpen) -> monitor.SessionOpened:
        return _piped(call, "attached")

    def end(self, code: int, *, oom: bool = False) -> None:
        """The container ends: the record is written, then everybody is told, then the monitor exits."""
        if self.exit is None:
            self.status = "stopped"
            self.exit = monitor.ExitRecord(
                container_id=self.container_id,
                exit_code=code,
                oom_killed=oom,
                started_at_ns=self.started_at_ns,
                finished_at_ns=time.time_ns(),
            )
            (self.directory / "exit.json").write_bytes(msgspec.json.encode(self.exit))
            self._ended.set()
            asyncio.get_running_loop().call_later(0.02, self.vanish)

    def vanish(self) -> None:
        """The monitor process is gone."""
        self.server.shut()
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(FileNotFoundError):
            (self.directory / "ctl.sock").unlink()

    @property
    def alive(self) -> bool:
        return not self.server.is_shut


def _piped(call: aio.Call, text: str) -> monitor.SessionOpened:
    """A session with one output, which says what it was made for."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, text.encode())
    os.close(write_fd)
    call.reply_fds.append(read_fd)
    return monitor.SessionOpened(fds=["stdout"])


class Listening:
    """One socket with a table of plain functions behind it."""

    def __init__(self, world: World, path: str, rows: dict[type[Request[Any]], Callable[..., Any]]) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(64)
        self.is_shut = False
        handlers = [Handler(kind, world.wrap(function), {"root"}) for kind, function in rows.items()]
        self.server = aio.Server(table(*handlers), {})
        self.server.start(self._listener)

    def drop_connections(self) -> None:
        """As if the process had died and another one accepted on the same socket."""
        for connection in list(self.server.connections):
            connection.close()

    def shut(self) -> None:
        if not self.is_shut:
            self.is_shut = True
            self.server.stop_accepting()
            self._listener.close()
            self.drop_connections()


class World:
    """All of them."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="bh-cri-", dir="/tmp"))
        for name in ("ipc", "monitors", "cri", "bind"):
            (self.root / name).mkdir()
        self.over = asyncio.Event()
        self.calls: list[Request[Any]] = []
        self.faults: dict[type[Request[Any]], list[Fault]] = {}
        self.stubborn = False  # containers ignore their stop signal
        self.monitors: dict[str, MonitorModel] = {}
        self.models: list[MonitorModel] = []
        self.inits: set[str] = set()
        self.init_pid = 77  # of every init
        self.parents: dict[str, str] = {}  # cgroup parents that were noted, by their pods
        self.networks: set[str] = set()
        self.pod_files: set[str] = set()
        self.rootfs: set[str] = set()
        self.images: dict[str, storage.ImageRecord] = {}
        self.layers: dict[str, int] = {}
        self.begun: dict[str, int] = {}  # chain id -> read end of its pipe
        self.blobs: list[str] = []
        self.network_ready = True
        self._listening: list[Listening] = []
        self.servers = {
            "storage": self.serve(self._path("storage"), self._storage()),
            "network": self.serve(self._path("network"), self._network()),
            "image": self.serve(self._path("image"), self._image()),
            "supervisor": self.serve(self._path("supervisor"), self._supervisor()),
        }
        self.add_image(IMAGE_ID, [IMAGE])

    # -- plumbing -------------------------------------------------------------------------------------

    def _path(self, kind: str) -> str:
        return str(self.root / "ipc" / f"{kind}.sock")

    def serve(self, path: str, rows: dict[type[Request[Any]], Callable[..., Any]]) -> Listening:
        listening = Listening(self, path, rows)
        self._listening.append(listening)
        return listening

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Around each handler: remember the request, play the next fault, if there is one."""

        async def handle(call: aio.Call, body: Request[Any]) -> Body:
            self.calls.append(body)
            faults = self.faults.get(type(body), [])
            if faults:
                fault = faults.pop(0)
                if isinstance(fault, RemoteError):
                    raise fault
                await fault(call)
            wants_call = isinstance(body, WANT_CALL)
            answer: Body = await (function(call, body) if wants_call else function(body))
            return answer

        return handle

    def fail(self, kind: type[Request[Any]], *faults: Fault) -> None:
        """The next requests of a kind meet these faults: an error to answer, or a coroutine to run first."""
        self.faults.setdefault(kind, []).extend(faults)

    def asked(self, kind: type[T]) -> list[T]:
        """What was asked, of one kind."""
        return [call for call in self.calls if isinstance(call, kind)]

    def left(self) -> dict[str, Any]:
        """What the models still hold; empty when all pods are gone."""
        held = {
            "monitors": list(self.monitors),
            "inits": self.inits,
            "parents": self.parents,
            "networks": self.networks,
            "pod files": self.pod_files,
            "rootfs": self.rootfs,
        }
        return {name: value for name, value in held.items() if value}

    def add_image(self, id_: str, names: list[str]) -> None:
        self.images[id_] = storage.ImageRecord(id=id_, config=IMAGE_CONFIG, names=names, size=7)

    # -- models ---------------------------------------------------------------------------------------

    def _storage(self) -> dict[type[Request[Any]], Callable[..., Any]]:
        async def pod_setup(body: storage.PodSetup) -> storage.PodFiles:
            self.pod_files.add(body.pod_id)
            return spec_inputs.pod_files()

        async def pod_teardown(body: storage.PodTeardown) -> Empty:
            self.pod_files.discard(body.pod_id)
            return Empty()

        async def create(body: storage.ContainerCreate) -> storage.ContainerRootfs:
            self.rootfs.add(body.container_id)
            return spec_inputs.rootfs(uid=7, gid=8, additional_gids=[9])

        async def remove(body: storage.ContainerRemove) -> Empty:
            self.rootfs.discard(body.container_id)
            return Empty()

        async def unmount(_body: storage.ContainerUnmount) -> Empty:
            return Empty()

        async def inventory(_body: storage.InventoryList) -> storage.Inventory:
            return storage.Inventory(containers=sorted(self.rootfs), pods=sorted(self.pod_files))

        async def fs_info(_body: storage.FsInfoGet) -> storage.FsInfo:
            return storage.FsInfo(
                mountpoint="/var/lib/bulkhead",
                used_bytes=11,
                used_inodes=12,
                layers_bytes=13,
                layers_inodes=14,
            )

        async def usages(_body: storage.UsageList) -> storage.UsagesListed:
            return storage.UsagesListed(
                usages=[
                    storage.LayerUsage(container_id=id_, used_bytes=4096, used_inodes=2, timestamp_ns=5)
                    for id_ in sorted(self.rootfs)
                ]
            )

        return {
            storage.PodSetup: pod_setup,
            storage.PodTeardown: pod_teardown,
            storage.ContainerCreate: create,
            storage.ContainerRemove: remove,
            storage.ContainerUnmount: unmount,
            storage.InventoryList: inventory,
            storage.FsInfoGet: fs_info,
            storage.UsageList: usages,
            storage.ImageGet: self._image_get,
            storage.ImageList: self._image_list,
            storage.ImagePut: self._image_put,
            storage.ImageRemove: self._image_remove,
            storage.LayerBegin: self._layer_begin,
            storage.LayerCommit: self._layer_commit,
            storage.LayerAbort: self._layer_abort,
        }

    async def _image_get(self, body: storage.ImageGet) -> storage.ImageFound:
        for record in self.images.values():
            known = {record.id, *record.names, *record.digests}
            bare = body.reference.removeprefix("sha256:")
            if body.reference in known or record.id.removeprefix("sha256:").startswith(bare):
                return storage.ImageFound(image=record)
        return storage.ImageFound(image=None)

    async def _image_list(self, _body: storage.ImageList) -> storage.ImagesListed:
        return storage.ImagesListed(images=list(self.images.values()))

    async def _image_put(self, body: storage.ImagePut) -> storage.ImageStored:
        missing = [chain for chain in body.image.layers if chain not in self.layers]
        if missing:
            raise precondition(f"layers are missing: {missing}")
        self.images[body.image.id] = body.image
        return storage.ImageStored(image=body.image)

    async def _image_remove(self, body: storage.ImageRemove) -> Empty:
        for record in list(self.images.values()):
            if body.reference in record.names:
                record.names.remove(body.reference)
            if body.reference == record.id or not record.names:
                del self.images[record.id]
        return Empty()

    async def _layer_begin(self, call: aio.Call, body: storage.LayerBegin) -> storage.LayerBegun:
        if body.chain_id in self.layers:
            return storage.LayerBegun(present=True, size=self.layers[body.chain_id])
        await self._layer_abort(storage.LayerAbort(chain_id=body.chain_id))
        read_fd, write_fd = os.pipe()
        self.begun[body.chain_id] = read_fd
        call.reply_fds.append(write_fd)
        return storage.LayerBegun(present=False)

    async def _layer_commit(self, body: storage.LayerCommit) -> storage.LayerCommitted:
        if body.chain_id not in self.layers:
            if body.chain_id not in self.begun:
                raise not_found("nothing was begun")
            read_fd = self.begun.pop(body.chain_id)
            data = await read_pipe(read_fd)
            if data != b"blob":
                raise RemoteError(Code.DATA_LOSS, "the blob is cut short")
            self.layers[body.chain_id] = 5
        return storage.LayerCommitted(size=5, entries=1)

    async def _layer_abort(self, body: storage.LayerAbort) -> Empty:
        read_fd = self.begun.pop(body.chain_id, None)
        if read_fd is not None:
            os.close(read_fd)
        return Empty()

    def _network(self) -> dict[type[Request[Any]], Callable[..., Any]]:
        async def setup(body: network.PodSetup) -> network.PodNetwork:
            self.networks.add(body.pod_id)
            pinned = {name: f"/run/bulkhead/ns/{body.pod_id}/{name}" for name in body.namespaces}
            ips = ["10.1.2.3", "fd00::3"] if "net" in body.namespaces else []
            return network.PodNetwork(ips=ips, namespaces=pinned, cni_result=b'{"cniVersion":"1.0.0"}')

        async def teardown(body: network.PodTeardown) -> Empty:
            self.networks.discard(body.pod_id)
            return Empty()

        async def pods(_body: network.PodList) -> network.PodsListed:
            return network.PodsListed(pods=sorted(self.networks))

        async def status(_body: network.StatusGet) -> network.NetworkState:
            if self.network_ready:
                return network.NetworkState(ready=True)
            return network.NetworkState(ready=False, reason="NetworkPluginNotReady", message="no conf list")

        async def connect(call: aio.Call, body: network.PortConnect) -> Empty:
            _piped(call, f"{body.pod_id}:{body.port}")
            return Empty()

        return {
            network.PortConnect: connect,
            network.PodSetup: setup,
            network.PodTeardown: teardown,
            network.PodList: pods,
            network.StatusGet: status,
        }

    def _image(self) -> dict[type[Request[Any]], Callable[..., Any]]:
        async def resolve(_body: image.ManifestResolve) -> image.Resolved:
            return RESOLVED

        async def normalise(body: image.ReferenceNormalise) -> image.Normalised:
            full = f"quay.io/short/{body.reference.partition(':')[0]}:latest"
            return image.Normalised(reference=full, repository=full, candidates=[full])

        async def fetch(call: aio.Call, body: image.BlobFetch) -> image.Fetched:
            self.blobs.append(body.digest)
            call.update(image.Progress(bytes=body.size // 2))
            await asyncio.sleep(0.01)
            try:
                os.write(call.fds.get(), b"blob")
            except BrokenPipeError:
                raise RemoteError(Code.UNAVAILABLE, "the pipe's reader is gone") from None
            return image.Fetched(bytes=body.size)

        return {
            image.ManifestResolve: resolve,
            image.ReferenceNormalise: normalise,
            image.BlobFetch: fetch,
        }

    def _supervisor(self) -> dict[type[Request[Any]], Callable[..., Any]]:
        async def start(body: supervisor.MonitorStart) -> supervisor.MonitorStarted:
            found = self.monitors.get(body.container_id)
            if found is not None and found.exit is not None:
                raise precondition("an exit record stands there")
            if found is None:
                self.monitors[body.container_id] = MonitorModel(self, body.container_id)
            return supervisor.MonitorStarted(pid=1)

        async def remove(body: supervisor.MonitorRemove) -> Empty:
            found = self.monitors.get(body.container_id)
            if found is not None and found.alive:
                raise precondition("the monitor lives")
            if self.monitors.pop(body.container_id, None) is not None:
                shutil.rmtree(self.root / "monitors" / body.container_id)
            return Empty()

        async def listed(body: supervisor.MonitorList) -> supervisor.MonitorsListed:
            states = [
                supervisor.MonitorState(container_id=id_, alive=model.alive, pid=model.process.pid)
                for id_, model in self.monitors.items()
                if body.container_id in ("", id_)
            ]
            return supervisor.MonitorsListed(monitors=states)

        async def init_start(body: supervisor.InitStart) -> supervisor.InitStarted:
            self.inits.add(body.pod_id)
            return supervisor.InitStarted(
                pid=self.init_pid, pid_namespace=f"/run/bulkhead/ns/{body.pod_id}/pid"
            )

        async def init_stop(body: supervisor.InitStop) -> Empty:
            self.inits.discard(body.pod_id)
            return Empty()

        async def inits(_body: supervisor.InitList) -> supervisor.InitsListed:
            return supervisor.InitsListed(
                inits=[supervisor.InitState(pod_id=pod, alive=True) for pod in sorted(self.inits)]
            )

        async def note(body: supervisor.ParentNote) -> Empty:
            self.parents[body.pod_id] = body.cgroup_parent
            return Empty()

        async def release(body: supervisor.ParentRelease) -> Empty:
            self.parents.pop(body.pod_id, None)
            return Empty()

        async def parents(_body: supervisor.ParentList) -> supervisor.ParentsListed:
            return supervisor.ParentsListed(pods=sorted(self.parents))

        async def host(_body: supervisor.HostInfoGet) -> supervisor.HostInfo:
            return spec_inputs.host(runtimes=[spec_inputs.runtime(recursive_read_only=True)])

        async def workers(_body: supervisor.WorkerList) -> supervisor.WorkersListed:
            return supervisor.WorkersListed(workers=[])

        return {
            supervisor.MonitorStart: start,
            supervisor.MonitorRemove: remove,
            supervisor.MonitorList: listed,
            supervisor.InitStart: init_start,
            supervisor.InitStop: init_stop,
            supervisor.InitList: inits,
            supervisor.ParentNote: note,
            supervisor.ParentRelease: release,
            supervisor.ParentList: parents,
            supervisor.HostInfoGet: host,
            supervisor.WorkerList: workers,
        }

    def close(self) -> None:
        self.over.set()
        for model in self.models:
            model.process.kill()
            model.process.wait()
        for listening in self._listening:
            listening.shut()
        for read_fd in self.begun.values():
            os.close(read_fd)
        shutil.rmtree(self.root)

    def settings(self) -> CriSettings:
        return CriSettings(
            root=str(self.root / "state"),
            run_root=str(self.root),
            runtimes=[Runtime(name="crun", path="/usr/bin/crun", root="/run/crun")],
            default_runtime="crun",
            stop_timeout=3.0,
            pull_idle_timeout=0.5,
            pinned_images=["quay.io/test/*"],
            bind_directory=str(self.root / "bind"),
        )


class Worker:
    """The real service behind a real gRPC socket."""

    starts = 0

    def __init__(self, world: World, *, boot_id: str = "boot", **settings: Any) -> None:
        Worker.starts += 1
        self.world = world
        store = state.Store(str(world.root / "cri" / "state.db"), boot_id)
        config = msgspec.structs.replace(world.settings(), **settings)
        self.node = Node(config, store, Peers(config), "the-node")
        self.service = Service(self.node, "1.2.3")
        self.front = Front(
            self.service.stats, max_requests=config.max_requests, max_message_bytes=config.max_message_bytes
        )
        runtime, images = main.runtime_service(self.service), main.image_service(self.service)
        self.front.add_service("RuntimeService", runtime, main.runtime_streams(self.service))
        self.front.add_service("ImageService", images, main.image_streams(self.service))
        self.front.add_stream(main.OPERATOR_SERVICE, main.WATCH_PULLS, self.service.watch_pulls)
        self.path = str(world.root / "bind" / f"{Worker.starts}")
        self.channel = grpc.aio.insecure_channel(f"unix:{self.path}")
        self.runtime: api_pb2_grpc.RuntimeServiceAsyncStub = rpc.async_runtime_client(self.channel)
        self.images: api_pb2_grpc.ImageServiceAsyncStub = rpc.async_image_client(self.channel)
        self.recovery = Recovery(self.node, self.service.pods, self.service.containers, self.service.watcher)

    async def start(self) -> Worker:
        await self.front.start(self.path)
        await self.recovery.load()
        self.service.observing.begin()
        self.front.open()
        self.service.streaming.open_sessions()
        self.recovery.run()
        return self

    async def crash(self) -> None:
        """As SIGKILL would: from here on it writes nothing and asks nobody, whatever still goes on."""
        store = self.node.store
        store.close()
        # what goes on in its tasks speaks to a state of its own and to nobody
        store._db = sqlite3.connect(":memory:", isolation_level=None)
        store._db.executescript(database.TABLES)
        store.kept = SilentFiles()
        peers, self.node.peers = self.node.peers, SilentPeers(self.world.over)
        clients: list[Any] = [peers.storage, peers.network, peers.supervisor, peers.image]
        for client in [*clients, *peers._monitors.values()]:
            client._path = "/nonexistent"  # a dead process sends nothing again
        await peers.close()
        await self.close()

    async def close(self) -> None:
        await self.front.stop(0)
        await self.channel.close()
        current = asyncio.current_task()
        mine = [*self.node.operations._background, *self.node.operations._running.values()]
        for task in mine:
            if task is not current:
                task.cancel()
        await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0)), *mine], timeout=0.2)

    # -- short ways -----------------------------------------------------------------------------------

    async def run_pod(self, name: str = "pod", **fields: Any) -> str:
        request = pb.RunPodSandboxRequest(config=pod_config(name, **fields))
        return (await self.runtime.RunPodSandbox(request, timeout=10)).pod_sandbox_id

    async def create(self, pod_id: str, name: str = "c", attempt: int = 0, image_: str = "busybox") -> str:
        config = container_config(name, attempt, image_)
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config)
        return (await self.runtime.CreateContainer(request, timeout=10)).container_id

    async def start_container(self, container_id: str) -> None:
        await self.runtime.StartContainer(pb.StartContainerRequest(container_id=container_id), timeout=10)

    async def stop_container(self, container_id: str, grace: int = 0) -> None:
        request = pb.StopContainerRequest(container_id=container_id, timeout=grace)
        await self.runtime.StopContainer(request, timeout=20)

    async def remove_container(self, container_id: str) -> None:
        await self.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container_id), timeout=10)

    async def stop_pod(self, pod_id: str) -> None:
        await self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id), timeout=10)

    async def remove_pod(self, pod_id: str) -> None:
        await self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id), timeout=10)

    async def status_of(self, container_id: str, *, verbose: bool = False) -> pb.ContainerStatusResponse:
        request = pb.ContainerStatusRequest(container_id=container_id, verbose=verbose)
        return await self.runtime.ContainerStatus(request, timeout=10)

    async def running(self, name: str = "c") -> tuple[str, str]:
        """A pod with a running container; returns both ids."""
        pod_id = await self.run_pod(name=f"pod-of-{name}")
        container_id = await self.create(pod_id, name)
        await self.start_container(container_id)
        return pod_id, container_id


class SilentPeers(Peers):
    """Nobody ever answers."""

    def __init__(self, over: asyncio.Event) -> None:
        self._over = over
        silence: Any = Silence(over)
        self.storage = self.network = self.supervisor = self.image = silence

    def monitor(self, _container_id: str) -> Any:
        return Silence(self._over)

    async def forget_monitor(self, _container_id: str) -> None:
        return

    async def close(self) -> None:
        return


class SilentFiles(PodFiles):
    """Files of pods that nobody writes any more."""

    def __init__(self) -> None:
        """There is no directory."""

    def write(self, _pod_id: str, _kept: Body) -> None:
        return

    def remove(self, _pod_id: str) -> None:
        return


class Silence:
    """A peer that does not answer, until the test is over and whatever still asks must come to an end."""

    def __init__(self, over: asyncio.Event) -> None:
        self._over = over

    async def call(self, _request: Any, *, fds: Sequence[int] = (), **_options: Any) -> Any:
        await self._over.wait()
        raise RemoteError(Code.UNAVAILABLE, "the test is over")

    call_fds = call

    async def close(self) -> None:
        return


def pod_config(name: str = "pod", *, attempt: int = 0, shared_pid: bool = False, **fields: Any) -> Any:
    """A pod as a kubelet would ask for it."""
    config = pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name=name, namespace="ns", uid=f"uid-{name}", attempt=attempt),
        log_directory=f"/var/log/pods/{name}",
        **fields,
    )
    options = config.linux.security_context.namespace_options
    options.pid = pb.NamespaceMode.POD if shared_pid else pb.NamespaceMode.CONTAINER
    return config


def container_config(name: str = "c", attempt: int = 0, image_: str = "busybox") -> Any:
    """A container as a kubelet would ask for it."""
    return pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=name, attempt=attempt),
        image=pb.ImageSpec(image=image_),
        command=["/bin/true"],
        log_path=f"{name}/{attempt}.log",
        labels={"app": name},
    )


@contextlib.asynccontextmanager
async def world_and_worker(**settings: Any) -> AsyncIterator[tuple[World, Worker]]:
    """A world with a worker in it."""
    world = World()
    worker = await Worker(world, **settings).start()
    try:
        yield world, worker
    finally:
        await worker.close()
        world.close()


async def read_pipe(read_fd: int) -> bytes:
    """Read to EOF as an unpack child would; closes the descriptor."""
    os.set_blocking(read_fd, False)
    data = b""
    try:
        while True:
            try:
                piece = os.read(read_fd, 65536)
            except BlockingIOError:
                await asyncio.sleep(0.002)
                continue
            if not piece:
                return data
            data += piece
    finally:
        os.close(read_fd)


async def eventually(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        await asyncio.sleep(0.005)


async def hang(_call: Any) -> None:
    """A fault: the request is never answered."""
    await asyncio.Event().wait()
