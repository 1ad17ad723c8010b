"""A cri whose state is lost: what stands beside it makes it again, and nothing that runs is touched."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ipc.cri import api_pb2 as pb
from ipc.messages import monitor, network, storage
from tests.support.cri_world import MonitorModel, Worker, World, eventually, hang
from tests.unit.cri.test_cri_recovery import in_the_middle, play
from workers.cri.rebuild import is_alive

Harm = Callable[[World], None]


def lose(world: World) -> None:
    for path in (world.root / "cri").glob("state.db*"):
        path.unlink()


def scribble(world: World) -> None:
    for path in (world.root / "cri").glob("state.db*"):
        path.write_bytes(b"no database at all" * 1000)


def lose_all(world: World) -> None:
    """Pods must come from their containers' monitors."""
    lose(world)
    for path in (world.root / "cri" / "pods").iterdir():
        path.unlink()


def keep(_world: World) -> None:
    """Nothing is lost."""


async def after(world: World, worker: Worker, harm: Harm = lose, **options: Any) -> Worker:
    """Kill cri, do the harm, start the next one."""
    await worker.crash()
    harm(world)
    return await Worker(world, **options).start()


async def everything(worker: Worker, container_id: str) -> list[Any]:
    """What clients see of a node with one container."""
    pods = (await worker.runtime.ListPodSandbox(pb.ListPodSandboxRequest())).items
    containers = (await worker.runtime.ListContainers(pb.ListContainersRequest())).containers
    statuses = [
        (await worker.runtime.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id))).status
        for pod in pods
    ]
    return [pods, containers, statuses, await worker.status_of(container_id, verbose=True)]


@pytest.mark.parametrize("harm", [lose, scribble, lose_all, keep])
def test_what_runs_is_known_again_as_it_was(harm: Harm) -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, container_id = await worker.running()
        before = await everything(worker, container_id)
        worker = await after(world, worker, harm)
        assert await everything(worker, container_id) == before
        assert await worker.run_pod("pod-of-c") == pod_id
        assert await worker.create(pod_id) == container_id
        await asyncio.sleep(0.1)  # the reconciliation has run
        assert world.monitors[container_id].alive
        assert (world.networks, world.rootfs, world.pod_files) == ({pod_id}, {container_id}, {pod_id})
        world.monitors[container_id].end(0)
        await eventually(lambda: worker.node.store.containers[container_id].phase == "exited")
        await worker.remove_pod(pod_id)
        assert world.left() == {}
        return await after(world, worker)

    play(scenario)


def test_each_container_has_the_state_it_is_in() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, running = await worker.running()
        created, exited = await worker.create(pod_id, "created"), await worker.create(pod_id, "exited")
        await worker.start_container(exited)
        await worker.crash()
        world.monitors[exited].end(7)
        await asyncio.sleep(0.05)
        lose(world)
        worker = await Worker(world).start()
        phases = {id_: str(one.phase) for id_, one in worker.node.store.containers.items()}
        assert phases == {running: "running", created: "created", exited: "exited"}
        assert (await worker.status_of(exited)).status.exit_code == 7
        await worker.start_container(created)
        return worker

    play(scenario)


def test_pods_without_containers_are_known_again_in_each_state() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        ready, stopped = await worker.run_pod("ready", shared_pid=True), await worker.run_pod("stopped")
        await worker.stop_pod(stopped)
        await in_the_middle(world, network.PodSetup, worker.run_pod("begun"))
        [begun] = set(worker.node.store.pods) - {ready, stopped}
        worker = await after(world, worker)
        assert await worker.run_pod("ready", shared_pid=True) == ready
        assert await worker.run_pod("begun") == begun
        pods = (await worker.runtime.ListPodSandbox(pb.ListPodSandboxRequest())).items
        states = {pod.metadata.name: pb.PodSandboxState.Name(pod.state) for pod in pods}
        assert states == {
            "ready": "SANDBOX_READY",
            "stopped": "SANDBOX_NOTREADY",
            "begun": "SANDBOX_READY",
        }
        assert world.inits == {ready}
        return worker

    play(scenario)


def test_a_pod_that_was_being_stopped_is_stopped() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, _ = await worker.running()
        await in_the_middle(world, network.PodTeardown, worker.stop_pod(pod_id))
        worker = await after(world, worker)
        await eventually(lambda: not world.networks)
        await eventually(lambda: worker.node.store.pods[pod_id].record.released)
        return worker

    play(scenario)


def test_a_pod_whose_network_is_gone_is_not_ready() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, _ = await worker.running()
        await worker.stop_pod(pod_id)
        worker = await after(world, worker, lose_all)
        pods = (await worker.runtime.ListPodSandbox(pb.ListPodSandboxRequest())).items
        assert [(pod.id, pod.state) for pod in pods] == [(pod_id, pb.PodSandboxState.SANDBOX_NOTREADY)]
        return worker

    play(scenario)


def test_a_creation_and_a_start_that_were_going_on_are_finished() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id = await worker.run_pod()
        started = await worker.create(pod_id, "started")
        await in_the_middle(world, monitor.Start, worker.start_container(started))
        world.monitors[started].starting = True

        async def written_then_hang(_call: Any) -> None:
            [made] = set(world.monitors) - {started}
            body = world.asked(monitor.Create)[-1]
            (world.monitors[made].directory / "cri.json").write_bytes(body.keep)
            await asyncio.Event().wait()

        world.fail(monitor.Create, written_then_hang)
        task = asyncio.ensure_future(worker.create(pod_id, "made"))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await eventually(lambda: len(world.asked(monitor.Create)) == 2)
        [made] = set(world.monitors) - {started}
        worker = await after(world, worker)
        assert await worker.create(pod_id, "made") == made
        await eventually(lambda: worker.node.store.containers[started].phase == "running")
        await eventually(lambda: worker.node.store.intents() == [])
        return worker

    play(scenario)


def test_a_container_that_came_to_nothing_is_removed() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id = await worker.run_pod()
        container_id = await worker.create(pod_id)
        model = world.monitors[container_id]
        await worker.crash()
        lose(world)
        model.status = "new"
        model.vanish()
        worker = await Worker(world).start()
        await eventually(lambda: not world.monitors and not world.rootfs)
        assert list(worker.node.store.pods) == [pod_id]
        return worker

    play(scenario)


def test_a_container_that_runs_and_cannot_be_known_is_left_alone_with_its_pod() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, container_id = await worker.running()
        directory = world.monitors[container_id].directory
        start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        state = {"pod_id": pod_id, "status": "running", "pid": os.getpid(), "pid_start": start}
        (directory / "state.json").write_bytes(msgspec.json.encode(state))
        (directory / "cri.json").write_bytes(b"{")
        await worker.crash()
        lose_all(world)
        world.rootfs.add("d" * 64)
        world.monitors["b" * 64] = MonitorModel(world, "b" * 64)
        worker = await Worker(world).start()
        await eventually(lambda: "d" * 64 not in world.rootfs and "b" * 64 not in world.monitors)
        await eventually(lambda: len(world.asked(storage.InventoryList)) >= 2)
        await asyncio.sleep(0.05)
        assert world.monitors[container_id].alive
        assert (world.networks, world.rootfs, world.pod_files) == ({pod_id}, {container_id}, {pod_id})
        (directory / "state.json").unlink()
        return worker

    play(scenario)


def test_what_another_boot_left_beside_the_state_is_not_taken_in() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        await worker.running()
        worker = await after(world, worker, lose, boot_id="the next boot")
        assert not worker.node.store.pods
        assert not worker.node.store.containers
        assert worker.node.store.kept.ids() == []
        await eventually(lambda: world.left() == {})
        return worker

    play(scenario)


def test_damaged_records_beside_the_state_count_as_absent() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id = await worker.run_pod()
        await worker.crash()
        lose(world)
        (world.root / "cri" / "pods" / f"{pod_id}.json").write_bytes(b"{")
        worker = await Worker(world).start()
        await eventually(lambda: world.left() == {})
        assert not worker.node.store.pods
        return worker

    play(scenario)


def test_a_network_that_does_not_answer_leaves_a_pod_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.cri.rebuild.NETWORK_TIMEOUT", 0.05)

    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, container_id = await worker.running()
        world.fail(network.PodList, hang)
        worker = await after(world, worker)
        assert str(worker.node.store.pods[pod_id].phase) == "ready"
        assert str(worker.node.store.containers[container_id].phase) == "running"
        return worker

    play(scenario)


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    assert is_alive(os.getpid(), start)
    assert not is_alive(os.getpid(), start + 1)
    assert not is_alive(2**22 + 1, start)
