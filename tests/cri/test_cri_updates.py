"""UpdateContainerResources and UpdatePodSandboxResources through the whole daemon, on real runtimes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.cri_client import SHELL, Client, code_of
from tests.support.daemon import Node, wait_for
from tests.support.images import served

HANDLERS = ["crun", "runc"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    machine.enter()
    with served() as images, Node(registries=images.registries_conf, bridge="bhupd0") as node:
        found = Client(node, images)
        found.pull()
        yield found


@pytest.fixture(autouse=True)
def clean(client: Client) -> Iterator[None]:
    """Whatever a test leaves running goes, and nothing of it stays."""
    yield
    client.node.remove_everything()
    assert client.node._settled_leftovers() == []


def update(client: Client, container_id: str, **fields: Any) -> None:
    resources = pb.LinuxContainerResources(**fields)
    request = pb.UpdateContainerResourcesRequest(container_id=container_id, linux=resources)
    client.node.runtime.UpdateContainerResources(request, timeout=30)


def limited(client: Client, handler: str, *command: str, **fields: Any) -> str:
    """A created container with limits."""
    sandbox = client.pod_config()
    pod_id = client.run(sandbox, handler)
    config = client.container_config(list(command) or ["sleep", "1000"])
    config.linux.resources.CopyFrom(pb.LinuxContainerResources(**fields))
    return client.create(pod_id, sandbox, config)


def running(client: Client, handler: str, *command: str, **fields: Any) -> str:
    container_id = limited(client, handler, *command, **fields)
    client.start(container_id)
    return container_id


def info(client: Client, container_id: str) -> Any:
    return json.loads(client.status(container_id, verbose=True).info["info"])


def group(client: Client, container_id: str, controller: str, name: str) -> str:
    """A file of the container's cgroup (v1)."""
    pid = info(client, container_id)["pid"]
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return (Path("/sys/fs/cgroup") / controllers / path.lstrip("/") / name).read_text().strip()
    raise AssertionError(f"no {controller} controller")


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("state", ["created", "running"])
def test_limits_change_and_what_is_not_named_stays(client: Client, handler: str, state: str) -> None:
    first: dict[str, Any] = {
        "cpu_shares": 512,
        "cpu_quota": 50_000,
        "cpu_period": 100_000,
        "oom_score_adj": 900,
    }
    make = running if state == "running" else limited
    container_id = make(client, handler, memory_limit_in_bytes=100 * MIB, **first)
    update(client, container_id, cpu_quota=20_000, memory_limit_in_bytes=64 * MIB, oom_score_adj=950)
    assert group(client, container_id, "cpu", "cpu.cfs_quota_us") == "20000"
    assert group(client, container_id, "cpu", "cpu.cfs_period_us") == "100000"
    assert group(client, container_id, "cpu", "cpu.shares") == "512"
    assert group(client, container_id, "memory", "memory.limit_in_bytes") == str(64 * MIB)
    pid = info(client, container_id)["pid"]
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "950\n"
    wanted = {**first, "cpu_quota": 20_000, "memory_limit_in_bytes": 64 * MIB, "oom_score_adj": 950}
    assert client.status(container_id).resources.linux == pb.LinuxContainerResources(**wanted)
    if state == "created":
        client.start(container_id)
        assert group(client, container_id, "cpu", "cpu.cfs_quota_us") == "20000"


@pytest.mark.parametrize("handler", HANDLERS)
def test_cpu_sets_change(client: Client, handler: str) -> None:
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.fail("this test needs two CPUs")
    container_id = running(client, handler, cpuset_cpus=f"{mine[0]},{mine[1]}")
    update(client, container_id, cpuset_cpus=str(mine[1]))
    assert group(client, container_id, "cpuset", "cpuset.cpus") == str(mine[1])
    assert client.status(container_id).resources.linux.cpuset_cpus == str(mine[1])


@pytest.mark.parametrize("handler", HANDLERS)
def test_no_limit_can_be_had_again(client: Client, handler: str) -> None:
    limits: dict[str, Any] = {"cpu_quota": 10_000, "cpu_period": 100_000, "memory_limit_in_bytes": 64 * MIB}
    container_id = running(client, handler, **limits)
    update(client, container_id, cpu_quota=-1, memory_limit_in_bytes=-1)
    assert group(client, container_id, "cpu", "cpu.cfs_quota_us") == "-1"
    assert int(group(client, container_id, "memory", "memory.limit_in_bytes")) > 2**62
    never = running(client, handler, cpu_quota=-1)
    assert group(client, never, "cpu", "cpu.cfs_quota_us") == "-1"


@pytest.mark.parametrize("handler", HANDLERS)
def test_an_update_that_fails_changes_nothing_that_is_told(client: Client, handler: str) -> None:
    container_id = running(client, handler, cpu_shares=512)
    code = code_of(update, client, container_id, cpuset_cpus="4000")
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert client.status(container_id).resources.linux == pb.LinuxContainerResources(cpu_shares=512)


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_container_that_its_runtime_refuses_leaves_no_group(client: Client, handler: str) -> None:
    assert code_of(limited, client, handler, cpuset_cpus="4000") == grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_memory_limit_below_what_is_in_use_changes_nothing(client: Client, handler: str) -> None:
    script = "x=$(head -c 30000000 /dev/zero | tr '\\0' a); echo ready; sleep 1000; true"
    container_id = running(client, handler, *SHELL, script, memory_limit_in_bytes=200 * MIB)
    wait_for(lambda: client.log(container_id) == ["ready"], "it has its memory")
    with pytest.raises(grpc.RpcError) as caught:
        update(client, container_id, memory_limit_in_bytes=8 * MIB, cpu_shares=77)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "in use" in (caught.value.details() or "")
    assert group(client, container_id, "memory", "memory.limit_in_bytes") == str(200 * MIB)
    found = client.status(container_id)
    assert found.state == pb.ContainerState.CONTAINER_RUNNING
    assert found.resources.linux == pb.LinuxContainerResources(memory_limit_in_bytes=200 * MIB)


def test_what_was_updated_outlives_every_worker_and_the_supervisor(client: Client) -> None:
    container_id = running(client, "", cpu_shares=512)
    update(client, container_id, cpu_shares=300)
    client.node.kill()
    client.node.start()
    assert client.status(container_id).resources.linux.cpu_shares == 300
    assert info(client, container_id)["runtimeSpec"]["linux"]["resources"]["cpu"]["shares"] == 300
    bundle = client.node.run_root / "monitors" / container_id / "bundle/config.json"
    assert json.loads(bundle.read_text())["linux"]["resources"]["cpu"]["shares"] == 300
    update(client, container_id, cpu_shares=200)
    assert group(client, container_id, "cpu", "cpu.shares") == "200"


def test_a_lost_state_knows_the_update_too(client: Client) -> None:
    container_id = running(client, "", cpu_shares=512)
    update(client, container_id, cpu_shares=300)
    client.node.stop()
    for path in (client.node.run_root / "cri").glob("state.db*"):
        path.unlink()
    client.node.start()
    wait_for(lambda: client.status(container_id).resources.linux.cpu_shares == 300, "it is known again")


def test_many_updates_at_once_all_count(client: Client) -> None:
    container_id = running(client, "")
    parts: list[dict[str, Any]] = [
        {"cpu_shares": 300},
        {"memory_limit_in_bytes": 64 * MIB},
        {"cpu_quota": 30_000, "cpu_period": 100_000},
        {"oom_score_adj": 970},
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda part: update(client, container_id, **part), parts))
    every: dict[str, Any] = {key: value for part in parts for key, value in part.items()}
    wanted = pb.LinuxContainerResources(**every)
    assert client.status(container_id).resources.linux == wanted
    assert group(client, container_id, "cpu", "cpu.shares") == "300"
    assert group(client, container_id, "memory", "memory.limit_in_bytes") == str(64 * MIB)


def test_what_cannot_be_updated_is_told_apart(client: Client) -> None:
    container_id = running(client, "", cpu_shares=512)
    assert code_of(update, client, "f" * 64, cpu_shares=3) == grpc.StatusCode.NOT_FOUND
    assert code_of(update, client, container_id, cpu_shares=-3) == grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(update, client, container_id, cpuset_cpus="x") == grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(update, client, container_id, oom_score_adj=5000) == grpc.StatusCode.INVALID_ARGUMENT
    unified = {"memory.high": "1000000"}
    assert code_of(update, client, container_id, unified=unified) == grpc.StatusCode.FAILED_PRECONDITION
    bare = pb.UpdateContainerResourcesRequest(container_id=container_id)
    call = client.node.runtime.UpdateContainerResources
    assert code_of(call, bare, timeout=10) == grpc.StatusCode.INVALID_ARGUMENT
    assert client.status(container_id).resources.linux.cpu_shares == 512
    client.stop(container_id)
    assert code_of(update, client, container_id, cpu_shares=3) == grpc.StatusCode.FAILED_PRECONDITION


def test_a_pods_resources_are_kept_and_shown(client: Client) -> None:
    sandbox = client.pod_config()
    sandbox.linux.overhead.cpu_shares = 11
    pod_id = client.run(sandbox)
    call = client.node.runtime.UpdatePodSandboxResources
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
    call(pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod_id, resources=resources), timeout=10)
    client.node.kill_worker("cri")
    wait_for(client.node.answers, "cri is back")
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id, verbose=True)
    told = json.loads(client.node.runtime.PodSandboxStatus(request, timeout=10).info["info"])
    assert told["overhead"] == {"cpu_shares": "11"}
    assert told["resources"] == {"memory_limit_in_bytes": str(64 * MIB)}
    absent = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id="f" * 64, resources=resources)
    assert code_of(call, absent, timeout=10) == grpc.StatusCode.NOT_FOUND
    bad = pb.LinuxContainerResources(memory_limit_in_bytes=-5)
    wrong = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod_id, resources=bad)
    assert code_of(call, wrong, timeout=10) == grpc.StatusCode.INVALID_ARGUMENT
    stop = pb.StopPodSandboxRequest(pod_sandbox_id=pod_id)
    client.node.runtime.StopPodSandbox(stop, timeout=30)
    again = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod_id, resources=resources)
    assert code_of(call, again, timeout=10) == grpc.StatusCode.FAILED_PRECONDITION
