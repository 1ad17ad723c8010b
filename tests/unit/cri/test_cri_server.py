"""The gRPC front: statuses, bounds, counts; and what Version, Status and the rest tell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from ipc.cri import api_pb2 as pb
from ipc.errors import GRPC_STATUS, Code, RemoteError, unavailable
from ipc.messages import network, storage, supervisor
from ipc.release import version
from tests.support.cri_world import Worker, World, eventually, hang, world_and_worker
from workers.cri.main import image_service, image_streams, runtime_service, runtime_streams
from workers.cri.metrics import RpcStats
from workers.cri.server import status_of, subject_of

Scenario = Callable[[World, Worker], Coroutine[Any, Any, None]]
NOT_YET = {"CheckpointContainer", "CheckpointPod", "RestorePod"}


def play(scenario: Scenario, **settings: Any) -> None:
    async def run() -> None:
        async with world_and_worker(**settings) as (world, worker):
            await scenario(world, worker)

    asyncio.run(asyncio.wait_for(run(), 30))


async def failure(step: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await step
    return caught.value.code(), caught.value.details() or ""


def test_every_rpc_of_the_cri_is_answered_or_said_to_be_unimplemented() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        answered = runtime_service(worker.service).keys() | image_service(worker.service).keys()
        answered |= runtime_streams(worker.service).keys() | image_streams(worker.service).keys()
        for name in ("RuntimeService", "ImageService"):
            service = pb.DESCRIPTOR.services_by_name[name]
            for method in service.methods:
                if method.name in answered:
                    continue
                assert method.name in NOT_YET
                path = f"/{service.full_name}/{method.name}"
                code, text = await failure(cast(Any, worker.channel.unary_unary(path))(b""))
                assert (code, text) == (grpc.StatusCode.UNIMPLEMENTED, f"{method.name} is not implemented")

    play(scenario)


def test_every_code_has_its_status_and_none_is_unknown() -> None:
    for code in Code:
        status = status_of(RemoteError(code, "x"))
        assert status.value[0] == GRPC_STATUS[code]
        assert status not in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.OK}


def test_a_bug_is_answered_internal_and_serving_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        store = worker.node.store
        worker.node.store.match_pods = None  # type: ignore[method-assign, assignment]
        code, _ = await failure(worker.runtime.ListPodSandbox(pb.ListPodSandboxRequest()))
        assert code == grpc.StatusCode.INTERNAL
        del store.match_pods
        await worker.runtime.ListPodSandbox(pb.ListPodSandboxRequest())

    play(scenario)
    assert "Traceback" in capfd.readouterr().err


def test_too_many_requests_in_flight_are_refused() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.fail(network.PodSetup, hang, hang)
        tasks = [asyncio.ensure_future(worker.run_pod(f"p{n}")) for n in range(2)]
        await eventually(lambda: len(worker.front.in_flight()) == 2)
        assert {entry.type for entry in worker.front.in_flight()} == {"RunPodSandbox"}
        code, _ = await failure(worker.runtime.Version(pb.VersionRequest()))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        for task in tasks:
            task.cancel()
        await eventually(lambda: not worker.front.in_flight())
        await worker.runtime.Version(pb.VersionRequest())

    play(scenario, max_requests=2)


def test_rpcs_are_counted_for_ops() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        await worker.running()
        await failure(worker.start_container("abc"))
        info = await worker.service.info(None, None)  # type: ignore[arg-type]  # neither is looked at
        counts = {count.name: count for count in info.rpcs}
        assert (counts["StartContainer"].total, counts["StartContainer"].errors) == (2, 1)
        assert counts["RunPodSandbox"].buckets[-1] == 1
        assert info.pods == {"ready": 1}
        assert info.containers == {"running": 1}
        assert world.root.exists()

    play(scenario)


def test_histograms_are_cumulative() -> None:
    stats = RpcStats()
    for seconds in (0.0005, 0.03, 100.0):
        stats.observe("X", seconds, failed=seconds > 1)
    [count] = stats.counts()
    assert (count.total, count.errors) == (3, 1)
    assert count.buckets[0] == 1
    assert count.buckets[-1] == 2
    assert count.buckets == sorted(count.buckets)


def test_version_and_runtime_config() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        answer = await worker.runtime.Version(pb.VersionRequest())
        assert (answer.version, answer.runtime_name) == ("0.1.0", "bulkhead")
        assert (answer.runtime_version, answer.runtime_api_version) == ("1.2.3", "v1")
        config = await worker.runtime.RuntimeConfig(pb.RuntimeConfigRequest())
        assert config.linux.cgroup_driver == pb.CgroupDriver.SYSTEMD
        await worker.runtime.UpdateRuntimeConfig(pb.UpdateRuntimeConfigRequest())

    play(scenario, cgroup_driver="systemd")
    assert version()[0].isdigit()


def test_status_tells_handlers_and_features() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        answer = await worker.runtime.Status(pb.StatusRequest(verbose=True))
        assert all(condition.status for condition in answer.status.conditions)
        assert [handler.name for handler in answer.runtime_handlers] == ["", "crun"]
        assert all(h.features.recursive_read_only_mounts for h in answer.runtime_handlers)
        assert answer.features.supplemental_groups_policy
        assert set(answer.info) == {"config", "host"}

    play(scenario)


def test_status_tells_what_is_wrong_and_who_is_to_blame() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def conditions() -> dict[str, tuple[bool, str]]:
            answer = await worker.runtime.Status(pb.StatusRequest())
            return {c.type: (c.status, c.reason) for c in answer.status.conditions}

        world.network_ready = False
        assert (await conditions())["NetworkReady"] == (False, "NetworkPluginNotReady")
        world.fail(network.StatusGet, unavailable("dead"))
        assert (await conditions())["NetworkReady"] == (False, "NetworkWorkerUnavailable")
        world.fail(supervisor.WorkerList, unavailable("dead"))
        assert (await conditions())["RuntimeReady"] == (False, "SupervisorUnavailable")
        worker.node.peers.supervisor = Sick()
        assert (await conditions())["RuntimeReady"] == (False, "WorkerFailed")

    play(scenario)


class Sick:
    """A supervisor whose storage worker has failed."""

    async def call(self, request: Any, **_options: Any) -> Any:
        assert isinstance(request, supervisor.WorkerList)
        failed = supervisor.WorkerState(kind="storage", name="storage", state="failed")
        return supervisor.WorkersListed(workers=[failed])

    async def call_fds(self, request: Any, **_options: Any) -> Any:
        raise AssertionError(request)

    async def connect(self) -> None:
        return

    async def close(self) -> None:
        return

    def park(self, *, abandon: bool) -> None:
        raise AssertionError(abandon)


def test_a_thousand_containers_are_listed_quickly() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        from tests.support.cri_world import container_config
        from workers.cri.names import new_id
        from workers.cri.state import ContainerRecord, Phase

        pod_id = await worker.run_pod()
        store = worker.node.store
        for number in range(1000):
            record = ContainerRecord(id=new_id(), pod_id=pod_id, created_at_ns=number)
            container = store.add_container(record, container_config(f"c{number}"))
            container.record.phase = Phase.EXITED
        loop = asyncio.get_running_loop()
        await worker.runtime.ListContainers(pb.ListContainersRequest())
        since = loop.time()
        answer = await worker.runtime.ListContainers(pb.ListContainersRequest())
        assert len(answer.containers) == 1000
        assert loop.time() - since < 0.25

    play(scenario)


def test_a_deadline_of_a_look_up_travels() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.fail(storage.ImageList, hang)
        code, _ = await failure(worker.images.ListImages(pb.ListImagesRequest(), timeout=0.1))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED

    play(scenario)


def test_log_lines_name_what_a_request_is_about_and_no_secret() -> None:
    pull = pb.PullImageRequest(image=pb.ImageSpec(image="q.io/x:1"), auth=pb.AuthConfig(password="hush"))
    assert subject_of(pull) == {"image": "q.io/x:1"}
    create = pb.CreateContainerRequest(
        pod_sandbox_id="ab", config=pb.ContainerConfig(metadata=pb.ContainerMetadata(name="c"))
    )
    assert subject_of(create) == {"pod": "ab", "name": "c"}
    assert subject_of(pb.StartContainerRequest(container_id="cd")) == {"container": "cd"}
    assert subject_of(pb.VersionRequest()) == {}
