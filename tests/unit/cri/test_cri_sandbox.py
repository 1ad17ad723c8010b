"""Pods with a sandbox container: hidden, first to start, last to stop, and the pod falls with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from ipc.errors import invalid
from ipc.messages import image, monitor, storage, supervisor
from tests.support.cri_world import IMAGE, PID, Worker, World, eventually, world_and_worker
from tests.unit.cri.test_cri_recovery import in_the_middle
from workers.cri.names import sandbox_id

Scenario = Callable[[World, Worker], Coroutine[Any, Any, Any]]
ABSENT = "quay.io/test/app:1"


def play(scenario: Scenario, pause_image: str = IMAGE) -> None:
    async def run() -> None:
        async with world_and_worker(pause_image=pause_image) as (world, worker):
            await scenario(world, worker)

    asyncio.run(asyncio.wait_for(run(), 30))


async def next_worker(world: World, worker: Worker, *, lose_state: bool = False) -> Worker:
    await worker.crash()
    if lose_state:
        for path in (world.root / "cri").glob("state.db*"):
            path.unlink()
    return await Worker(world, pause_image=IMAGE).start()


async def pod_state(worker: Worker, pod_id: str) -> Any:
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
    return (await worker.runtime.PodSandboxStatus(request, timeout=10)).status.state


def test_no_client_sees_it() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod()
        hidden = sandbox_id(pod_id)
        assert list(world.monitors) == [hidden]
        assert world.monitors[hidden].status == "running"
        assert not (await worker.runtime.ListContainers(pb.ListContainersRequest())).containers
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.status_of(hidden)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await worker.stop_container(hidden)
        await worker.remove_container(hidden[:20])
        assert world.monitors[hidden].status == "running"
        assert await worker.create(pod_id, "sandbox") != hidden  # its name is nobody's

    play(scenario)


def test_it_is_the_init_of_a_pod_that_shares_its_pid_namespace() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        shared = await worker.run_pod("shared", shared_pid=True)
        assert not world.inits
        assert worker.node.store.pods[shared].record.namespaces["pid"] == f"/proc/{PID}/ns/pid"
        own = json.loads(world.monitors[sandbox_id(shared)].spec)
        assert {"type": "pid"} in own["linux"]["namespaces"]
        assert own["annotations"]["io.kubernetes.cri.container-type"] == "sandbox"
        container = await worker.create(shared)
        spec = json.loads(world.monitors[container].spec)
        assert spec["annotations"]["io.kubernetes.cri.sandbox-id"] == sandbox_id(shared)
        await worker.run_pod("apart")
        assert not world.asked(supervisor.InitStart)

    play(scenario)


def test_it_has_the_pods_security_settings_and_no_privilege() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        context = pb.LinuxSandboxSecurityContext(
            privileged=True, run_as_user=pb.Int64Value(value=65535), supplemental_groups=[7]
        )
        pod_id = await worker.run_pod(linux=pb.LinuxPodSandboxConfig(security_context=context))
        spec = json.loads(world.monitors[sandbox_id(pod_id)].spec)
        assert spec["process"]["noNewPrivileges"]
        assert not any(spec["process"]["capabilities"].values())
        assert spec["root"]["readonly"]
        [asked] = world.asked(storage.ContainerCreate)
        assert (asked.user.uid, asked.user.supplemental) == (65535, [7])

    play(scenario)


def test_it_is_stopped_last_and_goes_with_the_pod() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod()
        hidden = sandbox_id(pod_id)
        container = await worker.create(pod_id)
        await worker.start_container(container)
        order: list[str] = []
        for id_, model in world.monitors.items():

            def end(code: int, id_: str = id_, end: Any = model.end, **options: Any) -> None:
                order.append(id_)
                end(code, **options)

            model.end = end  # type: ignore[method-assign]  # the test listens
        await worker.stop_pod(pod_id)
        assert list(dict.fromkeys(order)) == [container, hidden]
        await worker.remove_pod(pod_id)
        assert world.left() == {}

    play(scenario)


def test_a_pod_whose_sandbox_container_dies_is_not_ready() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod()
        world.monitors[sandbox_id(pod_id)].end(1)
        await eventually(lambda: worker.node.store.pods[pod_id].phase == "stopped")
        assert await pod_state(worker, pod_id) == pb.PodSandboxState.SANDBOX_NOTREADY
        with pytest.raises(grpc.aio.AioRpcError):
            await worker.create(pod_id)
        assert await worker.run_pod() != pod_id  # a new attempt gets a new pod
        assert pod_id not in worker.node.store.pods

    play(scenario)


def test_the_image_is_pulled_once_and_pinned() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        await worker.run_pod("a")
        await worker.run_pod("b")
        assert len(world.asked(image.ManifestResolve)) == 1
        images = (await worker.images.ListImages(pb.ListImagesRequest())).images
        assert {name: one.pinned for one in images for name in one.repo_tags} == {IMAGE: False, ABSENT: True}

    async def short(world: World, worker: Worker) -> None:
        await worker.run_pod()
        assert not world.asked(image.ManifestResolve)
        [one] = (await worker.images.ListImages(pb.ListImagesRequest())).images
        assert one.pinned

    play(scenario, ABSENT)
    play(short, "busybox")


@pytest.mark.parametrize(
    "step", [image.ManifestResolve, storage.ContainerCreate, monitor.Create, monitor.Start]
)
def test_a_pod_whose_sandbox_container_cannot_be_is_undone(step: Any) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.fail(step, invalid("broken"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.run_pod()
        assert "broken" in str(caught.value.details())
        await eventually(lambda: not worker.node.store.pods and not worker.node.store.containers)
        assert world.left() == {}

    play(scenario, ABSENT)


def test_a_sandbox_container_that_ends_at_once_is_told() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def end(_call: Any) -> None:
            [model] = world.monitors.values()
            model.started_at_ns = 1
            model.end(127)
            await asyncio.sleep(0.01)  # the end is known before the answer

        world.fail(monitor.Start, end)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.run_pod()
        assert "ended at once with code 127" in str(caught.value.details())
        assert world.left() == {}

    play(scenario)


@pytest.mark.parametrize("step", [storage.ContainerCreate, monitor.Create, monitor.Start])
@pytest.mark.parametrize("lose_state", [False, True])
def test_one_that_was_being_made_is_finished_with_its_pod(step: Any, lose_state: bool) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        await in_the_middle(world, step, worker.run_pod(shared_pid=True))
        [pod_id] = worker.node.store.pods
        worker = await next_worker(world, worker, lose_state=lose_state)
        try:
            assert await worker.run_pod(shared_pid=True) == pod_id
            assert world.monitors[sandbox_id(pod_id)].status == "running"
            assert worker.node.store.intents() == []
            await worker.remove_pod(pod_id)
            assert world.left() == {}
        finally:
            await worker.close()

    play(scenario)


@pytest.mark.parametrize("lose_state", [False, True])
def test_it_is_followed_by_the_next_cri(lose_state: bool) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod(shared_pid=True)
        before = worker.node.store.pods[pod_id].record
        worker = await next_worker(world, worker, lose_state=lose_state)
        try:
            assert worker.node.store.pods[pod_id].record == before
            assert not (await worker.runtime.ListContainers(pb.ListContainersRequest())).containers
            world.monitors[sandbox_id(pod_id)].end(0)
            await eventually(lambda: worker.node.store.pods[pod_id].phase == "stopped")
        finally:
            await worker.close()

    play(scenario)


def test_an_end_that_nobody_saw_is_known_before_the_first_answer() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod()
        await worker.crash()
        world.monitors[sandbox_id(pod_id)].end(0)
        worker = await Worker(world, pause_image=IMAGE).start()
        try:
            assert await pod_state(worker, pod_id) == pb.PodSandboxState.SANDBOX_NOTREADY
        finally:
            await worker.close()

    play(scenario)
