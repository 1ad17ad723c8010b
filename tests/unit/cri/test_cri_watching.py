"""Lists that are kept and lists in pieces, and events: what a kubelet relies on when it watches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from ipc.cri import api_pb2 as pb
from ipc.cri import rpc
from tests.support.cri_world import IMAGE_ID, Worker, World, eventually, world_and_worker
from workers.cri import events as events_module
from workers.cri import lists
from workers.cri.events import MOST, MOST_BYTES, MOST_CLIENTS, Client
from workers.cri.state import ContainerRecord, Phase, PodRecord

Scenario = Callable[[World, Worker], Awaitable[None]]
Type = pb.ContainerEventType


def play(scenario: Scenario, **settings: Any) -> None:
    async def run() -> None:
        async with world_and_worker(**settings) as (world, worker):
            await scenario(world, worker)

    asyncio.run(asyncio.wait_for(run(), 60))


def fill(worker: Worker, count: int) -> None:
    """A pod and `count` ended containers, put into the state as they are."""
    store = worker.node.store
    pod_id = "d" * 64
    meta = pb.PodSandboxMetadata(name="p", namespace="ns", uid="u")
    store.add_pod(
        PodRecord(id=pod_id, created_at_ns=1, handler="", phase=Phase.READY),
        pb.PodSandboxConfig(metadata=meta),
    )
    for number in range(count):
        record = ContainerRecord(
            id=f"{number:064x}", pod_id=pod_id, created_at_ns=number, phase=Phase.EXITED, image_id=IMAGE_ID
        )
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=f"c{number}"),
            labels={"io.kubernetes.container.name": "c" * 60},
            annotations={"io.kubernetes.container.hash": "x" * 300},
        )
        store.add_container(record, config)


# -- lists ------------------------------------------------------------------------------------------------


def test_ten_thousand_containers_come_in_pieces_each_once() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        fill(worker, 10_000)
        seen: list[str] = []
        sizes = []
        async for piece in worker.runtime.StreamContainers(pb.StreamContainersRequest()):
            sizes.append(piece.ByteSize())
            assert 1 <= len(piece.containers) <= lists.PIECE_ITEMS
            seen += [one.id for one in piece.containers]
        assert len(seen) == len(set(seen)) == 10_000
        assert max(sizes) < 2 * lists.PIECE_BYTES
        options = [("grpc.max_receive_message_length", 16 << 20)]  # as a kubelet has it
        async with grpc.aio.insecure_channel(f"unix:{worker.path}", options=options) as channel:
            whole = await rpc.async_runtime_client(channel).ListContainers(pb.ListContainersRequest())
        assert [one.id for one in whole.containers] == seen
        filtered = pb.ContainerFilter(id="0" * 62)
        few = [
            one.id
            async for piece in worker.runtime.StreamContainers(pb.StreamContainersRequest(filter=filtered))
            for one in piece.containers
        ]
        assert len(few) == 256
        pods = [piece async for piece in worker.runtime.StreamPodSandboxes(pb.StreamPodSandboxesRequest())]
        assert [len(piece.pod_sandboxes) for piece in pods] == [1]
        nothing = pb.PodSandboxFilter(id="e")
        assert [
            piece
            async for piece in worker.runtime.StreamPodSandboxes(pb.StreamPodSandboxesRequest(filter=nothing))
        ] == []

    play(scenario)


def test_a_list_that_is_kept_is_made_anew_with_every_change() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def states() -> list[Any]:
            answer = await worker.runtime.ListContainers(pb.ListContainersRequest())
            return [one.state for one in answer.containers]

        async def pods() -> list[Any]:
            return [
                one.state for one in (await worker.runtime.ListPodSandbox(pb.ListPodSandboxRequest())).items
            ]

        assert (await states(), await pods()) == ([], [])
        pod_id, container_id = await worker.running()
        assert await states() == [pb.ContainerState.CONTAINER_RUNNING]
        kept = worker.service.observing.lists.containers(pb.ListContainersRequest())
        assert worker.service.observing.lists.containers(pb.ListContainersRequest()) is kept
        world.monitors[container_id].end(0)
        await eventually(lambda: worker.node.store.containers[container_id].phase is Phase.EXITED)
        assert await states() == [pb.ContainerState.CONTAINER_EXITED]
        await worker.stop_pod(pod_id)
        assert await pods() == [pb.PodSandboxState.SANDBOX_NOTREADY]
        await worker.remove_pod(pod_id)
        assert (await states(), await pods()) == ([], [])

    play(scenario)


def test_images_are_streamed_too() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        pieces = [piece async for piece in worker.images.StreamImages(pb.StreamImagesRequest())]
        assert [one.id for piece in pieces for one in piece.images] == [IMAGE_ID]

    play(scenario)


def test_a_bug_in_a_stream_is_answered_and_the_front_serves_on() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        fill(worker, 1)
        worker.service.observing.lists._store = None  # type: ignore[assignment]  # the bug
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in worker.runtime.StreamContainers(pb.StreamContainersRequest()):
                pass
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert (await worker.runtime.Version(pb.VersionRequest())).runtime_name == "bulkhead"
        assert worker.front.in_flight() == []

    play(scenario)


# -- events -----------------------------------------------------------------------------------------------


class Listener:
    """A client of GetContainerEvents that holds each event against a list taken after it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.got: list[pb.ContainerEventResponse] = []
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for event in self._worker.runtime.GetContainerEvents(pb.GetEventsRequest()):
            await self._check(event)
            self.got.append(event)

    async def _check(self, event: pb.ContainerEventResponse) -> None:
        """What a list says afterwards is that, or something newer: states only go forward."""
        answer = await self._worker.runtime.ListContainers(pb.ListContainersRequest())
        now = {one.id: one.state for one in answer.containers}
        if event.container_event_type == Type.CONTAINER_DELETED_EVENT:
            assert event.container_id not in now
        for status in event.containers_statuses:
            assert now.get(status.id, status.state) >= status.state

    def types(self, id_: str) -> list[str]:
        words = [Type.Name(e.container_event_type) for e in self.got if e.container_id == id_]
        return [word.split("_")[1] for word in words]

    async def until(self, count: int) -> None:
        await eventually(lambda: len(self.got) >= count or self._task.done())
        if self._task.done():
            self._task.result()

    def close(self) -> None:
        self._task.cancel()


def test_every_change_is_told_to_everybody_and_is_what_a_list_says_afterwards() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        listeners = [Listener(worker), Listener(worker)]
        await eventually(lambda: len(worker.service.observing.events.clients) == 2)
        pod_id, container_id = await worker.running()
        world.monitors[container_id].end(3)
        await eventually(lambda: worker.node.store.containers[container_id].phase is Phase.EXITED)
        await worker.remove_container(container_id)
        await worker.stop_pod(pod_id)
        await worker.remove_pod(pod_id)
        for listener in listeners:
            await listener.until(8)
            assert listener.types(container_id) == ["CREATED", "STARTED", "STOPPED", "DELETED"]
            assert listener.types(pod_id) == ["CREATED", "STARTED", "STOPPED", "DELETED"]
            stopped = listener.got[4]
            assert stopped.pod_sandbox_status.metadata.name == "pod-of-c"
            assert [one.exit_code for one in stopped.containers_statuses] == [3]
            listener.close()
        await eventually(lambda: not worker.service.observing.events.clients)

    play(scenario)


def test_what_failed_to_be_made_was_never_there() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        listener = Listener(worker)
        await eventually(lambda: worker.service.observing.events.clients)
        pod_id = await worker.run_pod()
        with pytest.raises(grpc.aio.AioRpcError):
            await worker.create(pod_id, image_="absent")
        await worker.remove_pod(pod_id)
        await listener.until(4)
        assert {event.container_id for event in listener.got} == {pod_id}
        listener.close()

    play(scenario)


def test_who_does_not_read_loses_the_oldest_events_and_they_are_counted() -> None:
    client = Client.__new__(Client)

    async def scenario() -> None:
        client.__init__()  # type: ignore[misc]  # an Event needs a loop
        lost = sum(client.put(b"%d" % number) for number in range(MOST + 5))
        assert (lost, client.dropped, len(client)) == (5, 5, MOST)
        assert client.take() == b"5"
        assert client.put(b"x" * MOST_BYTES) == MOST - 1  # one event may be as large as it is
        assert (client.take(), client.take()) == (b"x" * MOST_BYTES, None)

    asyncio.run(scenario())


def test_clients_of_events_are_bounded_and_do_not_use_up_the_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events_module, "MOST_CLIENTS", 3)
    assert MOST_CLIENTS > 3

    async def scenario(_world: World, worker: Worker) -> None:
        listeners = [Listener(worker) for _ in range(3)]
        await eventually(lambda: len(worker.service.observing.events.clients) == 3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in worker.runtime.GetContainerEvents(pb.GetEventsRequest()):
                pass
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert worker.front.in_flight() == []
        assert "GetContainerEvents" not in {one.name for one in worker.service.stats.counts()}
        await worker.front.stop(5)  # endless streams get no grace
        for listener in listeners:
            listener.close()

    play(scenario)
