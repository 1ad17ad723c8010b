"""Runs in: cri. The life of a container: create, start, stop, remove.

A container is a root file system (storage), a monitor (forked by the supervisor) and what the monitor makes
of the OCI spec. Each step can be repeated and taken back by the container's id; what could not be made is
removed, for as long as that takes, while its name is free at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from itertools import count

from ipc import log
from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError, precondition
from ipc.messages import monitor, storage, supervisor
from ipc.messages.monitor import ExitRecord
from ipc.messages.storage import ContainerRootfs, ImageRecord
from workers.cri.images import Images
from workers.cri.names import new_id, sandbox_id
from workers.cri.node import Node
from workers.cri.operations import CLEAN, uncancelled
from workers.cri.peers import SHORT, settle_all, together, within
from workers.cri.spec import Built, SpecInputs, build, userns, validate
from workers.cri.spec import pod as podspec
from workers.cri.spec import request as spec_request
from workers.cri.state import HIDDEN, Container, ContainerRecord, Phase, Pod, container_name
from workers.cri.watch import POLL, Watcher

REAP_BACKOFF = (1.0, 60.0)
LEAVING, LONGEST_LEAVING = 0.001, 0.02  # seconds between looks whether a monitor that ends has ended
START_FAILED = 128  # exit code of a container whose process could not be executed
MAX_GRACE = 10 * 365 * 24 * 3600  # seconds; a larger StopContainer timeout means: do not kill


class Containers:
    """Containers of all pods."""

    def __init__(self, node: Node, images: Images, watcher: Watcher) -> None:
        self._node = node
        self._store = node.store
        self._images = images
        self._watcher = watcher
        self._stops = count()
        #: Started containers whose client went away before it was told: its retry is answered with success.
        self._untold_starts: set[str] = set()

    # -- create ---------------------------------------------------------------------------------------

    async def create(self, pod: Pod, config: pb.ContainerConfig) -> str:
        """Make a container and return its id; the same metadata again joins the first call or its result."""
        validate.container(config, pod.config)
        self._node.runtime(config.image.runtime_handler)
        key = ("container.create", *container_name(pod.id, config))
        return await self._node.operations.run(key, lambda: self._create(pod, config))

    async def _create(self, pod: Pod, config: pb.ContainerConfig) -> str:
        twin = self._store.container_named(container_name(pod.id, config))
        if twin is not None and twin.phase in {Phase.CREATED, Phase.RUNNING}:
            return twin.id
        if twin is not None:  # it has ended: it makes room
            await self._remove_joined(twin)
        record = ContainerRecord(id=new_id(), pod_id=pod.id, created_at_ns=time.time_ns())
        return await self._build(pod, self._store.add_container(record, config))

    def why_unreachable(self, container: Container, error: RemoteError) -> RemoteError:
        """A monitor that has gone because its container ended is no fault of the runtime's."""
        if error.code is Code.UNAVAILABLE and self._watcher.read_record(container.id) is not None:
            return precondition(f"container {container.id} has ended")
        return error

    async def resume(self, pod: Pod, container: Container) -> str:
        """Finish a container that the last worker began; every step may be repeated."""
        key = ("container.create", *container.name)
        return await self._node.operations.run(key, lambda: self._build(pod, container))

    async def run_sandbox(self, pod: Pod, config: pb.ContainerConfig) -> Container:
        """Create and start a pod's sandbox container, as part of the pod's own operation."""
        container = self.find_sandbox(pod)
        if container is None:
            id_, now = sandbox_id(pod.id), time.time_ns()
            record = ContainerRecord(id=id_, pod_id=pod.id, created_at_ns=now, sandbox=True)
            container = self._store.add_container(record, config)
        if container.phase is Phase.CREATING:
            await self._build(pod, container)
        if container.phase is Phase.CREATED:
            await self._start(container)
        return container

    def find_sandbox(self, pod: Pod) -> Container | None:
        """The pod's sandbox container, if it has one."""
        return self._store.containers.get(sandbox_id(pod.id))

    async def _build(self, pod: Pod, container: Container) -> str:
        timeout = self._node.settings.container_create_timeout
        try:
            await within(timeout, "creating the container", self._set_up(pod, container, timeout))
        except (RemoteError, asyncio.CancelledError):
            await uncancelled(self._discard(container))
            raise
        container.record.phase = Phase.CREATED
        self._store.save_container(container, done="container.create")
        self._watcher.watch(container)
        name = container.config.metadata.name
        log.get().info("container created", container=container.id, name=name, pod=pod.id)
        await self._node.plugins.created(container)
        return container.id

    async def _set_up(self, pod: Pod, container: Container, timeout: float) -> None:
        found: list[tuple[ImageRecord, ContainerRootfs]] = []

        async def make_rootfs() -> None:
            found.append(await self._make_rootfs(pod, container, timeout))

        await together(make_rootfs(), self._start_monitor(pod, container))
        built = await self._spec(pod, container, *found[0])
        built = await self._node.plugins.create(pod, container, built)
        self._store.save_spec(container.id, built.spec)
        await self._create_by_monitor(pod, container, built, timeout)

    async def _make_rootfs(
        self, pod: Pod, container: Container, timeout: float
    ) -> tuple[ImageRecord, ContainerRootfs]:
        image = await self._images.need(container.config.image)
        container.record.mount_images = await self._mount_images(container.config)
        container.record.image_id = image.id
        container.record.image_name = shown_image(container.config.image, image)
        request = spec_request.container_create(
            container_id=container.id,
            pod_id=pod.id,
            image_id=image.id,
            config=container.config,
            sandbox=pod.config,
            image_config=image.config,
            mount_images=container.record.mount_images,
            apparmor_default=self._node.settings.apparmor_profile,
            selinux=(await self._node.host()).selinux,
        )
        return image, await self._node.peers.storage.call(request, timeout=timeout)

    async def _mount_images(self, config: pb.ContainerConfig) -> list[str]:
        """The image's id of each mount, "" of those that are no image volume."""
        return [
            (await self._volume_image(mount)).id if mount.HasField("image") else "" for mount in config.mounts
        ]

    async def _volume_image(self, mount: pb.Mount) -> ImageRecord:
        try:
            return await self._images.need(mount.image)
        except RemoteError as error:
            raise RemoteError(error.code, error.text, reason="ImageVolumeMountFailed") from error

    async def _start_monitor(self, pod: Pod, container: Container) -> None:
        parent = pod.config.linux.cgroup_parent or self._node.settings.default_cgroup_parent
        request = supervisor.MonitorStart(container_id=container.id, pod_id=pod.id, cgroup_parent=parent)
        await self._node.peers.supervisor.call(request, timeout=SHORT)
        with contextlib.suppress(RemoteError):  # which the request to it would tell
            await self._node.peers.monitor(container.id).connect()  # it gets ready while the rootfs is made

    async def _spec(
        self, pod: Pod, container: Container, image: ImageRecord, rootfs: ContainerRootfs
    ) -> Built:
        assert pod.record.files is not None, "a ready pod has its files"
        inputs = SpecInputs(
            container_id=container.id,
            pod_id=pod.id,
            config=container.config,
            sandbox=pod.config,
            image_config=image.config,
            image_id=image.id,
            rootfs=rootfs,
            pod_files=pod.record.files,
            hostname=pod.record.hostname,
            namespaces=pod.record.namespaces,
            target_pid_namespace=self._target_namespace(pod, container),
            host=await self._node.host(),
            runtime=await self._node.runtime_info(pod.record.runtime or pod.record.handler),
            sandbox_id=sandbox_id(pod.id) if pod.record.pause_image else pod.id,
            is_sandbox=container.record.sandbox,
            settings=self._node.settings,
            apparmor_default=self._node.settings.apparmor_profile,
        )
        built = build(inputs)
        for sentence in built.degraded:
            log.get().warning("degraded", container=container.id, what=sentence)
        record = container.record
        record.uid, record.gid, record.groups = rootfs.uid, rootfs.gid, list(rootfs.additional_gids)
        record.stop_signal = built.stop_signal
        record.cgroup = built.cgroup_path
        record.log_path = podspec.container_log_path(container.config, pod.config)
        return built

    def _target_namespace(self, pod: Pod, container: Container) -> str:
        """The PID namespace of the container that namespace_options names (ephemeral debug containers)."""
        options = container.config.linux.security_context.namespace_options
        if options.pid != pb.NamespaceMode.TARGET:
            return ""
        target = self._store.need_container(options.target_id)
        if target.record.pod_id != pod.id or target.phase is not Phase.RUNNING:
            raise precondition(f"the target container {target.id} does not run in this pod")
        return f"/proc/{target.record.pid}/ns/pid"

    async def _create_by_monitor(self, pod: Pod, container: Container, built: Built, timeout: float) -> None:
        runtime = self._node.runtime(pod.record.runtime or pod.record.handler)
        config = container.config
        owner = userns.stdio_owner(pod.config, container.record.uid, container.record.gid)
        request = monitor.Create(
            spec=built.spec,
            runtime_name=runtime.name,
            runtime_path=runtime.path,
            runtime_root=runtime.root,
            runtime_args=runtime.args,
            stdio_uid=owner[0],
            stdio_gid=owner[1],
            log_path=container.record.log_path,
            terminal=config.tty,
            stdin=config.stdin,
            stdin_once=config.stdin_once,
            systemd_cgroup=built.systemd_cgroup,
            cgroup_path=built.cgroup_path,
            cgroup_version=(await self._node.host()).cgroup_version,
            timeout_ms=int(timeout * 1000),
            keep=self._store.keep_container(pod, container),
        )
        answer = await self._node.peers.monitor(container.id).call(request, timeout=timeout)
        container.record.pid = answer.pid

    async def _discard(self, container: Container) -> None:
        """What could not be made is taken back; its name is free from now on, whatever that takes."""
        container.record.phase = Phase.GONE
        self._store.save_container(container, done="container.create")
        await self._node.plugins.undo(container)
        try:
            await self._cleaned(container)
        except RemoteError as error:
            text = error.text
            log.get().error("undoing a container failed", container=container.id, code=error.code, text=text)
            self._node.operations.background(f"reap container {container.id}", self.reap(container))

    async def reap(self, container: Container) -> None:
        """Remove what is left of a container that nobody sees any more; tries until it is done."""
        delay, longest = REAP_BACKOFF
        while True:
            try:
                return await self._cleaned(container)
            except RemoteError as error:
                text = error.text
                log.get().warning(
                    "removing a container goes on", container=container.id, text=text, again_in=delay
                )
            await asyncio.sleep(delay)
            delay = min(delay * 2, longest)

    # -- start ----------------------------------------------------------------------------------------

    async def start(self, text: str, client_waits: Callable[[], bool] = lambda: True) -> None:
        """Start a created container. Raises RemoteError NOT_FOUND, FAILED_PRECONDITION.

        The repetition of a start whose client went away before the answer, or may not have had the time to
        get it (`client_waits`), joins it, or gets its success.
        """
        container = self.need(text)
        key = ("container.start", container.id)
        if self._node.operations.find(key) is None and self._told_late(container):
            return
        try:
            await self._node.operations.run(key, lambda: self._start(container))
        except asyncio.CancelledError:
            self._untold_starts.add(container.id)
            raise
        if client_waits():
            self._untold_starts.discard(container.id)
        else:
            self._untold_starts.add(container.id)

    def _told_late(self, container: Container) -> bool:
        if container.phase is Phase.CREATED:
            return False
        if container.id in self._untold_starts and container.record.started_at_ns:
            self._untold_starts.discard(container.id)
            return True
        raise precondition(f"container {container.id} is not in created state: {container.phase}")

    async def resume_start(self, container: Container) -> None:
        """Finish a start that the last worker began; its client was never told."""
        self._untold_starts.add(container.id)
        key = ("container.start", container.id)
        await self._node.operations.run(key, lambda: self._start(container))

    async def _start(self, container: Container) -> None:
        pod = self._store.pods.get(container.record.pod_id)
        if pod is None or (pod.phase is not Phase.READY and not container.record.sandbox):
            raise precondition(f"the pod of container {container.id} is not ready")
        await self._node.plugins.start(container)
        self._store.begin(container.id, "container.start")
        timeout = self._node.settings.container_create_timeout
        request = monitor.Start(timeout_ms=int(timeout * 1000))
        try:
            answer = await self._node.peers.monitor(container.id).call(request, timeout=timeout)
        except RemoteError as error:
            await self._start_failed(container, error)
            raise
        container.record.started_at_ns = answer.started_at_ns
        if container.phase is Phase.CREATED:  # else its end was known first
            container.record.phase = Phase.RUNNING
        self._store.save_container(container, done="container.start")
        if (exit_ := self._watcher.read_record(container.id)) is not None:  # a life that short
            self._watcher.record(container, exit_)
        log.get().info("container started", container=container.id, pod=container.record.pod_id)
        await self._node.plugins.started(container)

    async def _start_failed(self, container: Container, error: RemoteError) -> None:
        """The runtime could not start it: it has ended. A monitor that is only lost decides by itself."""
        if error.code not in {Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED}:
            exit_ = self._watcher.read_record(container.id)  # its code tells why, as a shell's would
            self._watcher.record(container, exit_ or start_failure(container, error))
            self._node.operations.background(f"end monitor {container.id}", self._end_monitor(container))
        self._store.end(container.id, "container.start")

    # -- stop -----------------------------------------------------------------------------------------

    async def stop(self, text: str, grace: float) -> None:
        """Send the stop signal, SIGKILL after `grace` seconds; returns when it has ended.

        Unknown or ended is success. A later call with a shorter grace shortens the wait of an earlier one.
        """
        container = self._store.find_container(text)
        if container is not None and container.phase not in HIDDEN:
            await self._stop_detached(container, min(max(grace, 0.0), MAX_GRACE))

    async def kill(self, container_id: str) -> None:
        """Kill a container now (its pod is stopped); returns when it has ended."""
        container = self._store.containers.get(container_id)
        if container is not None and container.phase not in HIDDEN:
            await self._stop_detached(container, 0)

    async def _stop_detached(self, container: Container, grace: float) -> None:
        # not joined: each call brings a grace of its own to the monitor
        key = ("container.stop", container.id, next(self._stops))
        await self._node.operations.run(key, lambda: self._stop(container, grace))

    async def _stop(self, container: Container, grace: float) -> None:
        detail = {"grace": str(grace)}
        self._store.begin_ending(container.id, "container.stop", detail)
        signal = container.record.stop_signal if grace else "SIGKILL"
        request = monitor.Stop(signal=signal, grace_ms=int(grace * 1000))
        end = time.monotonic() + grace + self._node.settings.stop_timeout
        while container.phase in {Phase.CREATED, Phase.RUNNING}:
            left = end - time.monotonic()
            try:
                answer = await self._node.peers.monitor(container.id).call(request, timeout=max(left, 0.001))
                self._watcher.record(container, answer.exit)
            except RemoteError as error:
                if error.code is not Code.UNAVAILABLE or left <= 0:
                    raise
                await self._watcher.ended(container, POLL)  # a successor may come, or its record
        self._store.end(container.id, "container.stop")
        await self._node.plugins.settled(container)

    async def resume_stop(self, container: Container, grace: float) -> None:
        """Finish a stop that the last worker began; the monitor remembers when the grace began."""
        await self._stop_detached(container, grace)

    # -- remove ---------------------------------------------------------------------------------------

    async def remove(self, text: str) -> None:
        """Remove a container, killing it if need be. Unknown is success.

        It has ended and nobody sees it any more when this returns; its mount and its files go meanwhile.
        """
        container = self._store.find_container(text)
        if container is not None:
            await self._remove_any(container)

    async def remove_whole(self, container_id: str) -> None:
        """As `remove`, by the whole id, sandbox containers too; nothing is left when this returns."""
        container = self._store.containers.get(container_id)
        if container is not None:
            await self._remove_any(container)
            await self._cleaned(container)

    async def _remove_any(self, container: Container) -> None:
        if container.phase is Phase.CREATING:
            key = ("container.create", *container.name)
            await self._node.operations.end(lambda running: running == key)
        await self._remove_joined(container)

    async def _remove_joined(self, container: Container) -> None:
        key = ("container.remove", container.id)
        await self._node.operations.run(key, lambda: self._remove(container))

    async def _remove(self, container: Container) -> None:
        if container.id not in self._store.containers or container.phase is Phase.GONE:
            return
        self._store.begin_ending(container.id, "container.remove")
        await self._stop(container, 0)
        await self._node.plugins.remove(container)
        container.record.phase = Phase.GONE
        self._store.save_container(container, done="container.remove")
        log.get().info("container removed", container=container.id, pod=container.record.pod_id)
        self._node.operations.background(f"reap container {container.id}", self.reap(container))

    async def _cleaned(self, container: Container) -> None:
        """Nothing is left of a container when this returns; done once, whoever asks for it."""
        await self._node.operations.run((CLEAN, container.id), lambda: self._clean(container))

    async def _clean(self, container: Container) -> None:
        """Take everything back that a container may have, in whatever state it is."""
        if container.id not in self._store.containers:
            return
        if container.record.exit is not None:  # nothing uses its root file system: no need to wait for either
            await settle_all(self._remove_monitor(container), self._remove_rootfs(container))
        else:
            await self._remove_monitor(container)
            await self._remove_rootfs(container)
        self._untold_starts.discard(container.id)
        self._store.drop_container(container)

    async def _remove_rootfs(self, container: Container) -> None:
        request = storage.ContainerRemove(container_id=container.id)
        timeout = self._node.settings.container_create_timeout
        await self._node.peers.storage.call(request, timeout=timeout)

    async def _remove_monitor(self, container: Container) -> None:
        """Remove the monitor's directory; a monitor that still lives is ended first."""
        request = supervisor.MonitorRemove(container_id=container.id)
        end = time.monotonic() + self._node.settings.stop_timeout
        delay = LEAVING
        while True:
            try:
                await self._node.peers.supervisor.call(request, timeout=SHORT)
                return await self._node.peers.forget_monitor(container.id)
            except RemoteError as error:
                if error.code is not Code.FAILED_PRECONDITION or time.monotonic() > end:
                    raise
            await self._end_monitor(container)  # its last words come a moment before its end
            await self._watcher.outlive(container.id, end - time.monotonic())
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_LEAVING)

    async def _end_monitor(self, container: Container) -> None:
        timeout = self._node.settings.stop_timeout
        try:
            await self._node.peers.monitor(container.id).call(monitor.Delete(), timeout=timeout)
        except RemoteError as error:
            if error.code is not Code.UNAVAILABLE:  # else it is gone, as was wanted
                raise

    # -- small ones -----------------------------------------------------------------------------------

    def need(self, text: str) -> Container:
        """A container that clients may see. Raises RemoteError(NOT_FOUND)."""
        container = self._store.need_container(text)
        if container.phase in HIDDEN:
            raise RemoteError(Code.NOT_FOUND, f"container {container.id} is being made or removed")
        return container

    def need_running(self, text: str) -> Container:
        """A running container. Raises RemoteError NOT_FOUND, FAILED_PRECONDITION."""
        container = self.need(text)
        if container.phase is not Phase.RUNNING:
            raise precondition(f"container {container.id} is not running: {container.phase}")
        return container

    async def reopen_log(self, text: str, timeout: float) -> None:
        """Let the monitor reopen the log file after a rotation."""
        container = self.need_running(text)
        await self._node.peers.monitor(container.id).call(monitor.LogReopen(), timeout=timeout)


def start_failure(container: Container, error: RemoteError) -> ExitRecord:
    """The record of a container that could not be started and whose monitor left none."""
    return ExitRecord(
        container_id=container.id,
        exit_code=START_FAILED,
        finished_at_ns=time.time_ns(),
        reason="StartError",
        message=error.text,
    )


def shown_image(asked: pb.ImageSpec, image: ImageRecord) -> str:
    """What people call the image of a container: as they wrote it, or its first name, or its id."""
    text = asked.user_specified_image or asked.image
    is_id = image.id.startswith(f"sha256:{text.removeprefix('sha256:')}")
    return (image.names or image.digests or [text])[0] if is_id else text
