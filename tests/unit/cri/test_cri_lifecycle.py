"""Pods and containers through the gRPC socket, with everybody else played by models."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest

from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError, internal, invalid, unavailable
from ipc.messages import monitor, network, storage, supervisor
from ipc.messages.monitor import ExitRecord
from tests.support.cri_world import (
    IMAGE_ID,
    Worker,
    World,
    container_config,
    eventually,
    hang,
    pod_config,
    world_and_worker,
)

Scenario = Callable[[World, Worker], Coroutine[Any, Any, None]]


def play(scenario: Scenario, **settings: Any) -> None:
    """Run one scenario in a world of its own."""

    async def run() -> None:
        async with world_and_worker(**settings) as (world, worker):
            await scenario(world, worker)

    asyncio.run(asyncio.wait_for(run(), 30))


async def code_of(step: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await step
    return caught.value.code()


def test_a_pod_and_a_container_live_and_leave_nothing() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id, container_id = await worker.running()
        status = (await worker.status_of(container_id)).status
        assert status.state == pb.ContainerState.CONTAINER_RUNNING
        assert status.image_id == status.image_ref == IMAGE_ID
        assert status.image.image == "busybox"
        assert status.log_path == "/var/log/pods/pod-of-c/c/0.log"
        assert (status.user.linux.uid, status.user.linux.gid) == (7, 8)
        assert status.stop_signal == pb.Signal.SIGNAL_SIGUSR1
        await worker.stop_container(container_id, 5)
        assert world.monitors[container_id].stops[0].signal == "SIGUSR1"
        status = (await worker.status_of(container_id)).status
        assert (status.state, status.reason) == (pb.ContainerState.CONTAINER_EXITED, "Completed")
        await worker.remove_container(container_id)
        await eventually(lambda: world.left().keys() == {"networks", "pod files"})
        await worker.stop_pod(pod_id)
        await worker.remove_pod(pod_id)
        assert world.left() == {}
        assert worker.node.store.intents() == []

    play(scenario)


def test_pod_status_shows_addresses_while_it_is_ready() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod(labels={"a": "b"}, annotations={"x": "y"})
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id[:12], verbose=True)
        answer = await worker.runtime.PodSandboxStatus(request)
        assert answer.status.network.ip == "10.1.2.3"
        assert [ip.ip for ip in answer.status.network.additional_ips] == ["fd00::3"]
        assert answer.status.state == pb.PodSandboxState.SANDBOX_READY
        assert dict(answer.status.labels) == {"a": "b"}
        assert msgspec.json.decode(answer.info["info"])["cniResult"] == {"cniVersion": "1.0.0"}
        await worker.stop_pod(pod_id)
        answer = await worker.runtime.PodSandboxStatus(request)
        assert answer.status.state == pb.PodSandboxState.SANDBOX_NOTREADY
        assert answer.status.network.ip == ""

    play(scenario)


def test_a_pod_that_shares_its_pid_namespace_gets_an_init() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod(shared_pid=True)
        assert world.inits == {pod_id}
        container_id = await worker.create(pod_id)
        spec = msgspec.json.decode(world.monitors[container_id].spec)
        paths = {entry["type"]: entry.get("path") for entry in spec["linux"]["namespaces"]}
        assert paths["pid"] == f"/run/bulkhead/ns/{pod_id}/pid"
        await worker.remove_pod(pod_id)
        assert world.left() == {}

    play(scenario)


def test_a_repeated_run_joins_the_running_one() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def slowly(_call: Any) -> None:
            await asyncio.sleep(0.1)

        world.fail(network.PodSetup, slowly)
        ids = await asyncio.gather(*(worker.run_pod() for _ in range(4)))
        assert len(set(ids)) == 1
        assert await worker.run_pod() == ids[0]
        assert len(world.asked(network.PodSetup)) == 1

    play(scenario)


def test_a_run_whose_client_gave_up_goes_on_and_its_retry_gets_the_pod() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def slowly(_call: Any) -> None:
            await asyncio.sleep(0.3)

        world.fail(network.PodSetup, slowly)
        request = pb.RunPodSandboxRequest(config=pod_config())
        first = worker.runtime.RunPodSandbox(request, timeout=0.1)
        assert await code_of(first) == grpc.StatusCode.DEADLINE_EXCEEDED
        pod_id = await worker.run_pod()
        assert len(world.asked(network.PodSetup)) == 1
        assert len(world.networks) == 1
        listed = await worker.runtime.ListPodSandbox(pb.ListPodSandboxRequest())
        assert [item.id for item in listed.items] == [pod_id]

    play(scenario)


def test_a_create_whose_client_gave_up_is_joined() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def slowly(_call: Any) -> None:
            await asyncio.sleep(0.3)

        pod_id = await worker.run_pod()
        world.fail(monitor.Create, slowly)
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=container_config())
        assert await code_of(worker.runtime.CreateContainer(request, timeout=0.1)) == (
            grpc.StatusCode.DEADLINE_EXCEEDED
        )
        container_id = await worker.create(pod_id)
        assert list(world.monitors) == [container_id]
        assert await worker.create(pod_id) == container_id

    play(scenario)


@pytest.mark.parametrize("step", [storage.PodSetup, network.PodSetup, supervisor.InitStart])
def test_a_pod_that_cannot_be_made_leaves_nothing_and_frees_its_name(step: Any) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.fail(step, invalid("broken on purpose"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.run_pod(shared_pid=True)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "broken on purpose" in (caught.value.details() or "")
        assert world.left() == {}
        assert worker.node.store.intents() == []
        await worker.run_pod(shared_pid=True)

    play(scenario)


@pytest.mark.parametrize("step", [storage.ContainerCreate, supervisor.MonitorStart, monitor.Create])
def test_a_container_that_cannot_be_made_leaves_nothing_and_frees_its_name(step: Any) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod()
        world.fail(step, invalid("broken on purpose"))
        assert await code_of(worker.create(pod_id)) == grpc.StatusCode.INVALID_ARGUMENT
        assert world.left().keys() == {"networks", "pod files"}
        await worker.create(pod_id)

    play(scenario)


def test_what_cannot_be_undone_at_once_is_undone_later_while_the_name_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.cri.pods.REAP_BACKOFF", (0.02, 0.1))

    async def scenario(world: World, worker: Worker) -> None:
        world.fail(network.PodSetup, invalid("no"))
        world.fail(network.PodTeardown, *(internal("DEL fails") for _ in range(4)))
        world.networks.add("the half-made one")
        assert await code_of(worker.run_pod()) == grpc.StatusCode.INVALID_ARGUMENT
        pod_id = await worker.run_pod()
        await eventually(lambda: list(worker.node.store.pods) == [pod_id])
        assert len(world.asked(network.PodTeardown)) == 5
        assert world.pod_files == {pod_id}

    play(scenario)


def test_an_ended_twin_makes_room() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id, first = await worker.running()
        world.monitors[first].end(1)
        await eventually(lambda: worker.node.store.containers[first].phase == "exited")
        second = await worker.create(pod_id)
        assert second != first
        assert list(world.monitors) == [second]
        await worker.stop_pod(pod_id)
        again = await worker.run_pod("pod-of-c")
        assert again != pod_id

    play(scenario)


def test_a_removal_is_answered_before_storage_is_done_and_who_needs_that_waits() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id, container_id = await worker.running()
        await worker.stop_container(container_id)
        world.fail(storage.ContainerRemove, unavailable("not yet"))
        await worker.remove_container(container_id)
        assert await code_of(worker.status_of(container_id)) is grpc.StatusCode.NOT_FOUND
        again = await worker.create(pod_id)  # its name is free
        await worker.remove_container(container_id)
        assert "rootfs" in world.left()
        await worker.remove_container(again)
        await worker.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image="busybox")))
        await worker.stop_pod(pod_id)
        await worker.remove_pod(pod_id)
        assert world.left() == {}

    play(scenario)


def test_what_is_left_of_a_removed_container_is_the_next_workers_to_remove() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        _, container_id = await worker.running()
        await worker.stop_container(container_id)
        world.fail(storage.ContainerRemove, unavailable("not yet"), unavailable("not yet"))
        await worker.remove_container(container_id)
        await worker.crash()
        successor = Worker(world)
        await successor.start()
        await eventually(lambda: "rootfs" not in world.left())
        assert container_id not in successor.node.store.containers
        await successor.close()

    play(scenario)


def test_an_end_is_known_at_once_with_its_reason() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        _, container_id = await worker.running()
        world.monitors[container_id].end(137, oom=True)
        await eventually(lambda: worker.node.store.containers[container_id].phase == "exited", 1)
        status = (await worker.status_of(container_id)).status
        assert (status.reason, status.exit_code) == ("OOMKilled", 137)
        await eventually(lambda: bool(world.asked(storage.ContainerUnmount)))

    play(scenario)


def test_without_monitor_a_container_runs_for_as_long_as_its_process_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.cri.watch.ORPHAN_GRACE", 0.3)

    async def scenario(world: World, worker: Worker) -> None:
        _, container_id = await worker.running()
        gone = world.monitors[container_id]
        process = subprocess.Popen(["sleep", "100"])
        start = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        state = {"status": "running", "pid": process.pid, "pid_start": start}
        (gone.directory / "state.json").write_text(json.dumps(state))
        gone.vanish()
        await asyncio.sleep(1)
        assert worker.node.store.containers[container_id].phase == "running"
        process.kill()
        process.wait()
        await eventually(lambda: worker.node.store.containers[container_id].phase == "exited", 3)

    play(scenario)


def test_without_monitor_and_record_a_container_has_ended_with_an_unknown_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.cri.watch.ORPHAN_GRACE", 0.3)

    async def scenario(world: World, worker: Worker) -> None:
        _, container_id = await worker.running()
        world.monitors[container_id].vanish()
        await asyncio.sleep(0.1)
        status = (await worker.status_of(container_id)).status
        assert status.state == pb.ContainerState.CONTAINER_RUNNING  # a successor may come
        await eventually(lambda: worker.node.store.containers[container_id].phase == "exited")
        status = (await worker.status_of(container_id)).status
        assert (status.exit_code, status.reason) == (-1, "Error")
        await worker.remove_container(container_id)

    play(scenario)


def test_start_needs_a_created_container() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        _, container_id = await worker.running()
        assert await code_of(worker.start_container(container_id)) == grpc.StatusCode.FAILED_PRECONDITION
        assert await code_of(worker.start_container("abcdef")) == grpc.StatusCode.NOT_FOUND

    play(scenario)


def test_the_retry_of_a_start_whose_client_gave_up_succeeds_once() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def slowly(_call: Any) -> None:
            await asyncio.sleep(0.2)

        container_id = await worker.create(await worker.run_pod())
        world.fail(monitor.Start, slowly)
        request = pb.StartContainerRequest(container_id=container_id)
        assert await code_of(worker.runtime.StartContainer(request, timeout=0.05)) == (
            grpc.StatusCode.DEADLINE_EXCEEDED
        )
        await eventually(lambda: worker.node.store.containers[container_id].phase == "running")
        await worker.start_container(container_id)
        assert await code_of(worker.start_container(container_id)) == grpc.StatusCode.FAILED_PRECONDITION

    play(scenario)


def test_the_retry_of_a_start_that_was_answered_too_late_succeeds_once() -> None:
    """The client gave up while the answer was on its way: nobody can tell that from an answer in time."""

    async def scenario(_world: World, worker: Worker) -> None:
        container_id = await worker.create(await worker.run_pod())
        request = pb.StartContainerRequest(container_id=container_id)
        await worker.runtime.StartContainer(request, timeout=0.4)
        await worker.start_container(container_id)
        assert await code_of(worker.start_container(container_id)) == grpc.StatusCode.FAILED_PRECONDITION

    play(scenario)


def test_a_container_that_cannot_start_has_ended_and_says_why() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        container_id = await worker.create(await worker.run_pod())
        world.fail(monitor.Start, RemoteError(Code.FAILED_PRECONDITION, "exec: no such file"))
        assert await code_of(worker.start_container(container_id)) == grpc.StatusCode.FAILED_PRECONDITION
        status = (await worker.status_of(container_id)).status
        assert (status.exit_code, status.reason, status.message) == (128, "StartError", "exec: no such file")
        await eventually(lambda: not world.monitors[container_id].alive)

    play(scenario)


def test_of_a_failed_start_the_monitors_own_record_counts() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        container_id = await worker.create(await worker.run_pod())
        record = ExitRecord(
            container_id=container_id, exit_code=127, finished_at_ns=5, reason="StartError", message="gone"
        )

        async def recorded(_call: Any) -> None:
            path = f"{worker.node.settings.monitor_directory(container_id)}/exit.json"
            await asyncio.to_thread(Path(path).write_bytes, msgspec.json.encode(record))
            raise RemoteError(Code.INVALID_ARGUMENT, "start: not found")

        world.fail(monitor.Start, recorded)
        assert await code_of(worker.start_container(container_id)) == grpc.StatusCode.INVALID_ARGUMENT
        status = (await worker.status_of(container_id)).status
        assert (status.exit_code, status.reason, status.finished_at) == (127, "StartError", 5)

    play(scenario)


def test_a_later_stop_with_a_shorter_grace_shortens_the_wait() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.stubborn = True
        _, container_id = await worker.running()
        long = asyncio.create_task(worker.stop_container(container_id, 60))
        await eventually(lambda: bool(world.monitors[container_id].stops))
        await asyncio.wait_for(worker.stop_container(container_id, 0), 2)
        await asyncio.wait_for(long, 2)
        assert [stop.grace_ms for stop in world.monitors[container_id].stops] == [60_000, 0]

    play(scenario)


def test_stop_and_remove_of_what_is_unknown_succeed() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        await worker.stop_container("abc")
        await worker.remove_container("abc")
        await worker.stop_pod("abc")
        await worker.remove_pod("abc")
        assert await code_of(worker.status_of("abc")) == grpc.StatusCode.NOT_FOUND
        assert await code_of(worker.create("abc")) == grpc.StatusCode.NOT_FOUND

    play(scenario)


def test_stop_and_remove_can_be_repeated_and_overlap() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id, _container_id = await worker.running()
        await asyncio.gather(*(worker.stop_pod(pod_id) for _ in range(3)))
        await worker.stop_pod(pod_id)
        await asyncio.gather(*(worker.remove_pod(pod_id) for _ in range(3)))
        assert world.left() == {}

    play(scenario)


def test_stopping_a_pod_ends_what_is_being_made_in_it() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod()
        world.fail(monitor.Create, hang)
        creating = asyncio.create_task(worker.create(pod_id))
        await eventually(lambda: bool(world.asked(monitor.Create)))
        await worker.stop_pod(pod_id)
        assert await code_of(creating) == grpc.StatusCode.FAILED_PRECONDITION
        assert world.left().keys() == {"pod files"}
        assert await code_of(worker.create(pod_id)) == grpc.StatusCode.FAILED_PRECONDITION

    play(scenario)


def test_a_failed_network_teardown_is_told_and_repeated_by_the_next_stop() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod()
        world.fail(network.PodTeardown, internal("DEL fails"))
        assert await code_of(worker.stop_pod(pod_id)) == grpc.StatusCode.INTERNAL
        assert world.networks == {pod_id}
        await worker.stop_pod(pod_id)
        assert world.networks == set()

    play(scenario)


def test_a_leaf_that_dies_in_the_middle_is_not_noticed() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def die(_call: Any) -> None:
            world.servers["network"].drop_connections()
            await asyncio.Event().wait()

        world.fail(network.PodSetup, die)
        pod_id = await worker.run_pod()
        assert world.networks == {pod_id}
        assert len(world.asked(network.PodSetup)) == 2

    play(scenario)


def test_a_create_that_takes_too_long_is_undone() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod()
        world.fail(storage.ContainerCreate, hang)
        assert await code_of(worker.create(pod_id)) == grpc.StatusCode.DEADLINE_EXCEEDED
        assert world.left().keys() == {"networks", "pod files"}

    play(scenario, container_create_timeout=0.2)


def test_exec_answers_output_and_code_and_tells_timeouts() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        _, container_id = await worker.running()
        request = pb.ExecSyncRequest(container_id=container_id, cmd=["echo", "x"])
        answer = await worker.runtime.ExecSync(request)
        assert (answer.stdout, answer.stderr, answer.exit_code) == (b"echo x", b"e", 3)
        slow = pb.ExecSyncRequest(container_id=container_id, cmd=["sleep", "9"], timeout=1)
        assert await code_of(worker.runtime.ExecSync(slow)) == grpc.StatusCode.DEADLINE_EXCEEDED
        for odd in (-1, 2**63 - 1):
            patient = pb.ExecSyncRequest(container_id=container_id, cmd=["echo", "x"], timeout=odd)
            assert (await worker.runtime.ExecSync(patient)).exit_code == 3
        empty = pb.ExecSyncRequest(container_id=container_id)
        assert await code_of(worker.runtime.ExecSync(empty)) == grpc.StatusCode.INVALID_ARGUMENT
        await worker.stop_container(container_id)
        assert await code_of(worker.runtime.ExecSync(request)) == grpc.StatusCode.FAILED_PRECONDITION
        reopen = pb.ReopenContainerLogRequest(container_id=container_id)
        assert await code_of(worker.runtime.ReopenContainerLog(reopen)) == (
            grpc.StatusCode.FAILED_PRECONDITION
        )

    play(scenario)


def test_lists_are_filtered_by_prefix_state_pod_and_labels() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        pod_a, one = await worker.running("one")
        pod_b, two = await worker.running("two")
        three = await worker.create(pod_b, "three")

        async def ids(**wanted: Any) -> set[str]:
            request = pb.ListContainersRequest(filter=pb.ContainerFilter(**wanted))
            return {item.id for item in (await worker.runtime.ListContainers(request)).containers}

        created = pb.ContainerStateValue(state=pb.ContainerState.CONTAINER_CREATED)
        assert await ids() == {one, two, three}
        assert await ids(id=one[:20]) == {one}
        assert await ids(id="0" * 64) == set()
        assert await ids(pod_sandbox_id=pod_b[:20]) == {two, three}
        assert await ids(pod_sandbox_id="0" * 64) == set()
        assert await ids(state=created) == {three}
        assert await ids(label_selector={"app": "two"}) == {two}
        assert await ids(label_selector={"app": "two", "other": "x"}) == set()
        await worker.stop_pod(pod_a)
        ready = pb.PodSandboxStateValue(state=pb.PodSandboxState.SANDBOX_READY)
        request = pb.ListPodSandboxRequest(filter=pb.PodSandboxFilter(state=ready))
        assert [item.id for item in (await worker.runtime.ListPodSandbox(request)).items] == [pod_b]

    play(scenario)


def test_wrong_requests_are_refused_before_anything_is_made() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        run = worker.runtime.RunPodSandbox
        unknown = pb.RunPodSandboxRequest(config=pod_config(), runtime_handler="kata")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await run(unknown)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "kata" in (caught.value.details() or "")
        assert await code_of(run(pb.RunPodSandboxRequest())) == grpc.StatusCode.INVALID_ARGUMENT
        nameless = pb.RunPodSandboxRequest(config=pb.PodSandboxConfig())
        assert await code_of(run(nameless)) == grpc.StatusCode.INVALID_ARGUMENT
        hostile = pb.RunPodSandboxRequest(config=pod_config("../../etc"))
        assert await code_of(run(hostile)) == grpc.StatusCode.INVALID_ARGUMENT
        pod_id = await worker.run_pod()
        assert await code_of(worker.create(pod_id, image_="absent:1")) == grpc.StatusCode.NOT_FOUND
        assert len(world.pod_files) == 1
        assert not world.monitors

    play(scenario)


def test_an_ambiguous_prefix_is_refused() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        pods = [await worker.run_pod(f"p{n}") for n in range(17)]
        digits = [pod_id[0] for pod_id in pods]
        twice = next(digit for digit in digits if digits.count(digit) > 1)
        assert await code_of(worker.stop_pod(twice)) == grpc.StatusCode.INVALID_ARGUMENT

    play(scenario)


def test_unavailable_peers_are_told_as_such() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.fail(network.PodSetup, unavailable("no CNI configuration"))
        assert await code_of(worker.run_pod()) == grpc.StatusCode.UNAVAILABLE

    play(scenario)
