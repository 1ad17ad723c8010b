"""A cri that is killed at any moment: the next one finishes or undoes what was begun, and lists are exact."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ipc.cri import api_pb2 as pb
from ipc.errors import invalid, unavailable
from ipc.messages import monitor, network, storage, supervisor
from tests.support.cri_world import MonitorModel, Worker, World, eventually, hang
from workers.cri.recovery import strongest
from workers.cri.state import Intent, Phase

Scenario = Callable[[World, Worker], Coroutine[Any, Any, Worker]]


def play(scenario: Scenario) -> None:
    """Run one scenario; it returns the worker that lived last."""

    async def run() -> None:
        world = World()
        first = await Worker(world).start()
        last = first
        try:
            last = await scenario(world, first)
        finally:
            await last.close()
            world.close()

    asyncio.run(asyncio.wait_for(run(), 30))


async def successor(world: World, worker: Worker, **options: Any) -> Worker:
    """Kill cri, start the next one."""
    await worker.crash()
    return await Worker(world, **options).start()


async def in_the_middle(world: World, kind: type[Any], step: Coroutine[Any, Any, Any]) -> None:
    """Begin something and return while `kind` is being served; its client is forgotten."""
    world.fail(kind, hang)
    task = asyncio.ensure_future(step)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    before = len(world.asked(kind))
    await eventually(lambda: len(world.asked(kind)) > before)


def test_everything_is_as_it_was_after_a_crash() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, container_id = await worker.running()
        before = (await worker.status_of(container_id, verbose=True)).status
        worker = await successor(world, worker)
        after = (await worker.status_of(container_id, verbose=True)).status
        assert after == before
        pods = await worker.runtime.ListPodSandbox(pb.ListPodSandboxRequest())
        assert [(item.id, item.state) for item in pods.items] == [(pod_id, pb.PodSandboxState.SANDBOX_READY)]
        assert await worker.run_pod("pod-of-c") == pod_id
        assert await worker.create(pod_id) == container_id
        world.monitors[container_id].end(0)
        await eventually(lambda: worker.node.store.containers[container_id].phase == "exited")
        return worker

    play(scenario)


def test_an_end_that_nobody_saw_is_known_before_the_first_answer() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        _, container_id = await worker.running()
        await worker.crash()
        world.monitors[container_id].end(7)
        await asyncio.sleep(0.05)
        worker = await Worker(world).start()
        status = (await worker.status_of(container_id)).status
        assert (status.state, status.exit_code) == (pb.ContainerState.CONTAINER_EXITED, 7)
        return worker

    play(scenario)


@pytest.mark.parametrize("step", [storage.PodSetup, network.PodSetup, supervisor.InitStart])
def test_a_pod_that_was_being_made_is_finished_and_its_repetition_gets_it(step: Any) -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        await in_the_middle(world, step, worker.run_pod(shared_pid=True))
        [pod_id] = worker.node.store.pods
        worker = await successor(world, worker)
        assert await worker.run_pod(shared_pid=True) == pod_id
        assert worker.node.store.intents() == []
        await worker.remove_pod(pod_id)
        assert world.left() == {}
        return worker

    play(scenario)


def test_a_pod_that_cannot_be_finished_is_undone() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        await in_the_middle(world, network.PodSetup, worker.run_pod())
        world.fail(network.PodSetup, invalid("still broken"))
        worker = await successor(world, worker)
        await eventually(lambda: not worker.node.store.pods)
        assert world.left() == {}
        return worker

    play(scenario)


@pytest.mark.parametrize("step", [storage.ContainerCreate, supervisor.MonitorStart, monitor.Create])
def test_a_container_that_was_being_made_is_finished_and_its_repetition_gets_it(step: Any) -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id = await worker.run_pod()
        await in_the_middle(world, step, worker.create(pod_id))
        [container_id] = worker.node.store.containers
        worker = await successor(world, worker)
        assert await worker.create(pod_id) == container_id
        await worker.start_container(container_id)
        assert worker.node.store.intents() == []
        return worker

    play(scenario)


def test_a_start_that_was_going_on_is_finished_and_its_repetition_succeeds() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        container_id = await worker.create(await worker.run_pod())
        await in_the_middle(world, monitor.Start, worker.start_container(container_id))
        worker = await successor(world, worker)
        await worker.start_container(container_id)
        assert world.monitors[container_id].status == "running"
        status = (await worker.status_of(container_id)).status
        assert status.state == pb.ContainerState.CONTAINER_RUNNING
        return worker

    play(scenario)


def test_a_start_that_had_come_to_pass_shows_before_the_first_answer() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        container_id = await worker.create(await worker.run_pod())

        async def start_then_hang(_call: Any) -> None:
            await world.monitors[container_id].start(monitor.Start())
            await asyncio.Event().wait()

        world.fail(monitor.Start, start_then_hang)
        task = asyncio.ensure_future(worker.start_container(container_id))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await eventually(lambda: world.monitors[container_id].status == "running")
        worker = await successor(world, worker)
        status = (await worker.status_of(container_id)).status
        assert status.state == pb.ContainerState.CONTAINER_RUNNING
        return worker

    play(scenario)


def test_a_stop_that_was_going_on_is_finished() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        _, container_id = await worker.running()
        await in_the_middle(world, monitor.Stop, worker.stop_container(container_id, 5))
        worker = await successor(world, worker)
        await eventually(lambda: worker.node.store.containers[container_id].phase == "exited")
        assert world.monitors[container_id].stops[0].grace_ms == 5000
        await eventually(lambda: not worker.node.store.intents())
        return worker

    play(scenario)


@pytest.mark.parametrize("step", [network.PodTeardown, storage.PodTeardown, storage.ContainerRemove])
def test_a_removal_that_was_going_on_is_finished(step: Any) -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, _ = await worker.running()
        await in_the_middle(world, step, worker.remove_pod(pod_id))
        worker = await successor(world, worker)
        await eventually(lambda: not worker.node.store.pods)
        assert world.left() == {}
        assert worker.node.store.intents() == []
        return worker

    play(scenario)


def test_a_stopped_pod_stays_stopped() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, _ = await worker.running()
        await in_the_middle(world, network.PodTeardown, worker.stop_pod(pod_id))
        worker = await successor(world, worker)
        pods = await worker.runtime.ListPodSandbox(pb.ListPodSandboxRequest())
        assert [item.state for item in pods.items] == [pb.PodSandboxState.SANDBOX_NOTREADY]
        await eventually(lambda: not world.networks)
        return worker

    play(scenario)


@pytest.mark.parametrize("noticed_by", ["this worker", "the next"])
def test_a_pod_whose_init_ended_is_not_ready_and_makes_room(noticed_by: str) -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        process = subprocess.Popen(["sleep", "100"])
        world.init_pid = process.pid
        try:
            pod_id = await worker.run_pod(shared_pid=True)
            world.fail(supervisor.InitList, unavailable("asked again"))
            if noticed_by == "the next":
                await worker.crash()
            await asyncio.sleep(0.1)
            world.inits.clear()
            process.kill()
            process.wait()
            if noticed_by == "the next":
                worker = await Worker(world).start()
            await eventually(lambda: worker.node.store.pods[pod_id].phase is Phase.STOPPED)
        finally:
            process.kill()
        assert await worker.run_pod(shared_pid=True) != pod_id
        return worker

    play(scenario)


def test_what_nobody_knows_is_removed() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        pod_id, container_id = await worker.running()
        await worker.crash()
        world.networks.add("f" * 64)
        world.pod_files.add("e" * 64)
        world.rootfs.add("d" * 64)
        world.inits.add("c" * 64)
        world.parents["c" * 64] = "/gone"
        world.monitors["b" * 64] = MonitorModel(world, "b" * 64)
        world.fail(storage.InventoryList, unavailable("still starting"))
        worker = await Worker(world).start()
        await eventually(lambda: world.rootfs == {container_id} and world.networks == {pod_id})
        await eventually(lambda: world.pod_files == {pod_id} and not world.inits)
        await eventually(lambda: not world.parents)
        await eventually(lambda: list(world.monitors) == [container_id])
        return worker

    play(scenario)


def test_after_another_boot_nothing_is_known_and_everything_is_cleaned() -> None:
    async def scenario(world: World, worker: Worker) -> Worker:
        await worker.running()
        worker = await successor(world, worker, boot_id="the next boot")
        listed = await worker.runtime.ListContainers(pb.ListContainersRequest())
        assert not listed.containers
        await eventually(lambda: world.left() == {})
        return worker

    play(scenario)


def test_the_strongest_intent_counts() -> None:
    intents = [
        Intent(subject="c", kind=f"container.{verb}") for verb in ("create", "start", "stop", "remove")
    ]
    assert strongest(intents)["c"].kind == "container.remove"
    assert strongest(intents[:3])["c"].kind == "container.stop"
    assert strongest([Intent(subject="p", kind="pod.run")])["p"].kind == "pod.run"
