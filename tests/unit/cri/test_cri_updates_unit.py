"""Updates of limits by the real service: what the monitor is told, what is recorded and when."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from ipc.errors import precondition
from ipc.messages import monitor
from tests.support.cri_world import Worker, world_and_worker


async def update(worker: Worker, container_id: str, **fields: Any) -> None:
    linux = pb.LinuxContainerResources(**fields)
    request = pb.UpdateContainerResourcesRequest(container_id=container_id, linux=linux)
    await worker.runtime.UpdateContainerResources(request, timeout=10)


async def resources(worker: Worker, container_id: str) -> Any:
    return (await worker.status_of(container_id)).status.resources.linux


def run(test: Any) -> None:
    asyncio.run(test())


def test_an_update_is_recorded_when_the_monitor_has_done_it() -> None:
    async def test() -> None:
        async with world_and_worker() as (world, worker):
            _, container_id = await worker.running()
            await update(worker, container_id, cpu_shares=77)
            assert (await resources(worker, container_id)).cpu_shares == 77
            model = world.monitors[container_id]
            assert [b"77" in told.resources for told in model.updates] == [True]
            await update(worker, container_id, cpu_shares=77)  # nothing to do
            assert len(model.updates) == 1
            await worker.crash()
            after = await Worker(world).start()
            assert (await resources(after, container_id)).cpu_shares == 77
            await after.close()

    run(test)


def test_an_update_that_the_monitor_refuses_is_not_recorded() -> None:
    async def test() -> None:
        async with world_and_worker() as (world, worker):
            _, container_id = await worker.running()
            world.fail(monitor.Update, precondition("update: below what is in use"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await update(worker, container_id, memory_limit_in_bytes=1 << 20)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert (await resources(worker, container_id)).memory_limit_in_bytes == 0

    run(test)


def test_updates_of_one_container_do_not_forget_each_other() -> None:
    async def test() -> None:
        async with world_and_worker() as (_world, worker):
            _, container_id = await worker.running()
            parts: list[dict[str, Any]] = [{"cpu_shares": 9}, {"cpu_quota": 8}, {"cpuset_cpus": "0"}]
            await asyncio.gather(*(update(worker, container_id, **part) for part in parts))
            wanted = pb.LinuxContainerResources(cpu_shares=9, cpu_quota=8, cpuset_cpus="0")
            assert await resources(worker, container_id) == wanted

    run(test)
