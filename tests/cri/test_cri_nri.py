"""Node resource plugins through the whole daemon, on real runtimes: what they are told, what they change, and
what it costs when they misbehave."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as cri
from ipc.nri import nri_pb2 as pb
from tests.support import machine
from tests.support.cri_client import Client
from tests.support.daemon import REPO, Node, wait_for
from tests.support.images import Served, served
from tests.support.nri_plugin import No, Plugin

HANDLERS = ["crun", "runc"]
MIB = 1 << 20
REQUEST_TIMEOUT = 0.5
CONFIG = f"""
[nri]
request_timeout = {REQUEST_TIMEOUT}
registration_timeout = 2.0
[timeouts]
idle_exit = 1.0
[containers]
cdi_spec_dirs = ["{{cdi}}"]
"""


@pytest.fixture(scope="module")
def images() -> Iterator[Served]:
    machine.enter()
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def client(images: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    cdi = tmp_path_factory.mktemp("cdi")
    device = {"name": "one", "containerEdits": {"env": ["CDI=yes"]}}
    spec = {"cdiVersion": "0.5.0", "kind": "test.org/thing", "devices": [device]}
    (cdi / "thing.json").write_text(json.dumps(spec))
    config = CONFIG.format(cdi=cdi)
    with Node(registries=images.registries_conf, config=config, bridge="bhnri0") as node:
        found = Client(node, images)
        found.pull()
        yield found


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test leaves running goes, and nothing of it stays."""
    yield
    if "client" in request.fixturenames:
        node = request.getfixturevalue("client").node
        node.remove_everything()
        assert node._settled_leftovers() == []


def socket_of(client: Client) -> str:
    return str(client.node.run_root / "nri.sock")


def adjusting(**fields: Any) -> Any:
    """A handler that answers CreateContainer with an adjustment."""
    return lambda _request: pb.CreateContainerResponse(adjust=pb.ContainerAdjustment(**fields))


def env(**values: str) -> list[pb.KeyValue]:
    return [pb.KeyValue(key=key, value=value) for key, value in values.items()]


def memory(container_id: str, limit: int, **fields: Any) -> pb.ContainerUpdate:
    update = pb.ContainerUpdate(container_id=container_id, **fields)
    update.linux.resources.memory.limit.value = limit
    return update


def shown_memory(client: Client, container_id: str) -> int:
    limit: int = client.status(container_id).resources.linux.memory_limit_in_bytes
    return limit


def real_memory(client: Client, container_id: str) -> int:
    """The limit that the kernel has (cgroup v1)."""
    info = json.loads(client.status(container_id, verbose=True).info["info"])
    lines = Path(f"/proc/{info['pid']}/cgroup").read_text().splitlines()
    (path,) = [line.split(":", 2)[2] for line in lines if "memory" in line.split(":", 2)[1].split(",")]
    return int(Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes").read_text())


def created(client: Client, handler: str = "") -> tuple[str, str]:
    """A pod with one created container."""
    sandbox = client.pod_config()
    pod_id = client.run(sandbox, handler)
    return pod_id, client.create(pod_id, sandbox, client.container_config(["sleep", "1000"]))


def refused(step: Any, *arguments: Any) -> str:
    """The words of a call that must end with FAILED_PRECONDITION."""
    with pytest.raises(grpc.RpcError) as caught:
        step(*arguments)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    return str(caught.value.details())


def workers(client: Client) -> list[int]:
    return client.node.pids("nri")


# -- life ---------------------------------------------------------------------------------------------------


def test_a_plugin_starts_the_worker_hears_everything_in_order_and_the_worker_ends_with_the_last_one(
    client: Client,
) -> None:
    wait_for(lambda: not workers(client), "there is no worker without plugins")
    old_pod, old = client.running()
    with Plugin(socket_of(client)) as plugin:
        assert [pod.id for pod in plugin.pods] == [old_pod]
        assert [(one.id, one.state) for one in plugin.containers] == [(old, pb.CONTAINER_RUNNING)]
        assert plugin.containers[0].args == ["sleep", "1000"]
        assert plugin.configuration is not None
        assert plugin.configuration.runtime_name == "bulkhead"
        pod_id, container_id = client.running("sh", "-c", "sleep 1000", annotations={"a": "b"})
        limits = cri.LinuxContainerResources(cpu_shares=512)
        update = cri.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
        client.node.runtime.UpdateContainerResources(update, timeout=20)
        sizes = cri.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod_id, resources=limits)
        client.node.runtime.UpdatePodSandboxResources(sizes, timeout=20)
        client.stop(container_id)
        client.remove(container_id)
        client.remove_pod(pod_id)
        assert plugin.events(pod_id) == [
            *("RunPodSandbox", "CreateContainer", "ValidateContainerAdjustment", "PostCreateContainer"),
            *("StartContainer", "PostStartContainer", "UpdateContainer", "PostUpdateContainer"),
            *("UpdatePodSandbox", "PostUpdatePodSandbox", "StopContainer", "RemoveContainer"),
            *("StopPodSandbox", "RemovePodSandbox"),
        ]
        pod = plugin.wait_for("RunPodSandbox", pod_id).pod
        assert (pod.namespace, dict(pod.annotations)) == ("tests", {"a": "b"})
        assert len(pod.ips) == 1
        assert {one.type for one in pod.linux.namespaces} >= {"network", "ipc", "uts"}
        create = plugin.wait_for("CreateContainer", container_id).container
        assert create.name.startswith("c-")
        assert list(create.args) == ["sh", "-c", "sleep 1000"]
        assert create.linux.seccomp_profile.profile_type == pb.SecurityProfile.RUNTIME_DEFAULT
        assert plugin.wait_for("UpdateContainer").linux_resources.cpu.shares.value == 512
        stopped = plugin.wait_for("StopContainer", container_id).container
        assert (stopped.state, stopped.exit_code) == (pb.CONTAINER_STOPPED, 137)
    wait_for(lambda: not workers(client), "the worker ends when nobody is left", 10)


@pytest.mark.parametrize("handler", HANDLERS)
def test_adjustments_are_what_the_container_gets(client: Client, handler: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the plugin\n")
    adjust = pb.ContainerAdjustment(
        annotations={"plugin.org/note": "yes"},
        env=[*env(ADDED="1", CHANGED="plugin"), pb.KeyValue(key="-GONE")],
        args=["sh", "-c", "sleep 999"],
        mounts=[
            pb.Mount(destination="/mnt/plugin", source=str(tmp_path), type="bind", options=["rbind", "ro"])
        ],
        rlimits=[pb.POSIXRlimit(type="RLIMIT_NOFILE", soft=321, hard=654)],
        CDI_devices=[pb.CDIDevice(name="test.org/thing=one")],
    )
    adjust.linux.devices.add(path="/dev/plugin", type="c", major=1, minor=3).file_mode.value = 0o666
    adjust.linux.resources.memory.limit.value = 64 * MIB
    adjust.linux.sysctl["kernel.shm_rmid_forced"] = "1"
    response = pb.CreateContainerResponse(adjust=adjust)
    with Plugin(socket_of(client), CreateContainer=lambda _request: response):
        sandbox = client.pod_config()
        pod_id = client.run(sandbox, handler)
        variables = [cri.KeyValue(key="CHANGED", value=b"pod"), cri.KeyValue(key="GONE", value=b"1")]
        config = client.container_config(["sleep", "1000"], envs=variables)
        container_id = client.create(pod_id, sandbox, config)
        client.start(container_id)
    seen = client.output(container_id, "tr '\\0' '\\n' </proc/1/environ; tr '\\0' ' ' </proc/1/cmdline")
    assert {"ADDED=1", "CHANGED=plugin", "CDI=yes"} <= set(seen.splitlines())
    assert "GONE" not in seen
    assert "sleep 999" in seen
    assert client.output(container_id, "cat /mnt/plugin/file") == "of the plugin\n"
    limits = client.output(
        container_id, "grep files /proc/1/limits"
    )  # an exec of runc may have raised its own
    assert limits.split()[3:5] == ["321", "654"]
    assert client.output(container_id, "echo x >/dev/plugin && stat -c %t,%T /dev/plugin") == "1,3\n"
    assert client.output(container_id, "cat /proc/sys/kernel/shm_rmid_forced") == "1\n"
    assert real_memory(client, container_id) == 64 * MIB
    spec = json.loads(client.status(container_id, verbose=True).info["info"])["runtimeSpec"]
    assert spec["annotations"]["plugin.org/note"] == "yes"


def test_a_field_belongs_to_the_plugin_that_set_it_unless_another_one_removes_it_first(
    client: Client,
) -> None:
    path = socket_of(client)
    with Plugin(path, "first", "10", CreateContainer=adjusting(env=env(WHOSE="first"))) as first:
        with Plugin(path, "second", "20", CreateContainer=adjusting(env=env(WHOSE="second"))) as second:
            text = refused(created, client)
            assert "'10-first'" in text
            assert "'20-second'" in text
            (container_id,) = {one.container.id for event, one in second.seen if event == "CreateContainer"}
            first.wait_for("RemoveContainer", container_id)
            assert "StartContainer" not in first.events()
        taking = [pb.KeyValue(key="-WHOSE"), *env(WHOSE="third")]
        with (
            Plugin(path, "third", "05"),
            Plugin(path, "fourth", "30", CreateContainer=adjusting(env=taking)) as fourth,
        ):
            _, container_id = created(client)
            client.start(container_id)
            assert client.output(container_id, "echo $WHOSE") == "third\n"
            assert "WHOSE=first" in fourth.wait_for("CreateContainer", container_id).container.env
            (check,) = [one for event, one in fourth.seen if event == "ValidateContainerAdjustment"][-1:]
            owners = check.owners.owners[container_id].compound[pb.Env].owners
            assert dict(owners) == {"WHOSE": "30-fourth"}
            assert [one.name for one in check.plugins] == ["third", "first", "fourth"]


# -- updates and evictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", HANDLERS)
def test_updates_out_of_turn_with_events_and_of_events_are_in_force(client: Client, handler: str) -> None:
    _, first = client.running(handler=handler)
    wanted: list[pb.ContainerUpdate] = []

    def create(_request: Any) -> pb.CreateContainerResponse:
        return pb.CreateContainerResponse(update=wanted)

    def update(request: pb.UpdateContainerRequest) -> pb.UpdateContainerResponse:
        assert request.linux_resources.memory.limit.value == 80 * MIB
        return pb.UpdateContainerResponse(update=[memory(request.container.id, 96 * MIB)])

    with Plugin(socket_of(client), CreateContainer=create, UpdateContainer=update) as plugin:
        assert plugin.update([memory(first, 48 * MIB), memory("no-such", MIB)]) == ["no-such"]
        assert shown_memory(client, first) == real_memory(client, first) == 48 * MIB
        wanted.append(memory(first, 56 * MIB))
        created(client, handler)
        assert shown_memory(client, first) == real_memory(client, first) == 56 * MIB
        wanted[:] = [memory("no-such", MIB, ignore_failure=True)]
        created(client, handler)
        wanted[:] = [memory("no-such", MIB)]
        with pytest.raises(grpc.RpcError, match="no container has the id"):
            created(client, handler)
        request = cri.UpdateContainerResourcesRequest(container_id=first)
        request.linux.memory_limit_in_bytes = 80 * MIB
        client.node.runtime.UpdateContainerResources(request, timeout=20)
        assert shown_memory(client, first) == real_memory(client, first) == 96 * MIB


def test_an_evicted_container_is_stopped_and_everybody_hears_of_it(client: Client) -> None:
    _, container_id = client.running("sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done")
    with Plugin(socket_of(client)) as plugin:
        assert plugin.update(evict=[pb.ContainerEviction(container_id=container_id, reason="too loud")]) == []
        assert client.ended(container_id).exit_code == 3
        assert plugin.wait_for("StopContainer", container_id).container.exit_code == 3
    assert "too loud" in client.node.log_tail(400)


def test_a_plugin_may_update_a_container_in_the_middle_of_its_own_event(client: Client) -> None:
    """Nobody holds what the other waits for."""
    _, container_id = client.running()
    failed: list[list[str]] = []

    def update(request: pb.UpdateContainerRequest) -> None:
        failed.append(plugin.update([memory(request.container.id, 40 * MIB)]))

    with Plugin(socket_of(client), UpdateContainer=update) as plugin:
        request = cri.UpdateContainerResourcesRequest(container_id=container_id)
        request.linux.cpu_shares = 300
        client.node.runtime.UpdateContainerResources(request, timeout=20)
        assert failed == [[]]
        assert not plugin.closed.is_set()
    assert client.status(container_id).resources.linux.cpu_shares == 300
    assert real_memory(client, container_id) == 40 * MIB


# -- trouble ------------------------------------------------------------------------------------------------


def test_a_plugin_that_hangs_dies_or_lies_costs_its_timeout_and_is_disconnected(client: Client) -> None:
    let_go = threading.Event()
    path = socket_of(client)

    def hang(_request: Any) -> None:
        let_go.wait(20)

    def die(_request: Any) -> None:
        dying._sock.close()

    def lie(_request: Any) -> None:
        lying.send(b"\0\0\0\1\xff\xff\xff\xff")

    def senseless(_request: Any) -> pb.CreateContainerResponse:
        answer = pb.CreateContainerResponse()
        answer.adjust.linux.scheduler.policy = 99  # type: ignore[assignment]  # what no enumeration has
        return answer

    hanging = Plugin(path, "hangs", "10", CreateContainer=hang).join()
    dying = Plugin(path, "dies", "20", StartContainer=die).join()
    lying = Plugin(path, "lies", "30", StopContainer=lie).join()
    with Plugin(path, "good", "40") as good:
        began = time.monotonic()
        _, container_id = created(client)
        assert REQUEST_TIMEOUT <= time.monotonic() - began < REQUEST_TIMEOUT + 5
        assert hanging.closed.wait(5)
        client.start(container_id)
        client.stop(container_id)
        assert lying.closed.wait(5)
        assert good.wait_for("StopContainer", container_id)
        assert set(good.events(container_id)) >= {"CreateContainer", "StartContainer", "StopContainer"}
        let_go.set()
        with Plugin(path, "senseless", "50", CreateContainer=senseless):
            assert "makes no sense" in refused(created, client)
        created(client)
        assert not good.closed.is_set()
    log = client.node.log_tail(400)
    for name in ("10-hangs", "20-dies", "30-lies"):
        assert f'msg="plugin disconnected" plugin={name}' in log


def test_who_does_not_register_or_says_no_or_lies_at_the_door(client: Client) -> None:
    path = socket_of(client)
    silent = Plugin(path)
    with pytest.raises(No, match="two digits"):
        Plugin(path, index="x1").register()
    with pytest.raises(No, match="letters, digits"):
        Plugin(path, name="a/b").register()
    strange = Plugin(path, "strange", Configure=lambda _request: pb.ConfigureResponse(events=1 << 20))
    strange.register()
    assert strange.closed.wait(5)
    assert silent.closed.wait(5), "it had two seconds to register"

    def no(request: Any) -> None:
        if "refuse" in dict(request.pod.labels):
            raise No("not today")

    with Plugin(path, RunPodSandbox=no, StopPodSandbox=no, RemovePodSandbox=no) as plugin:
        text = refused(client.run, client.pod_config(labels={"refuse": "1"}))
        assert "plugin 10-test refused RunPodSandbox: not today" in text
        assert plugin.events() == ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"]
        pod_id = client.run(client.pod_config())
        client.remove_pod(pod_id)


def test_no_container_is_lost_or_told_twice_while_a_plugin_joins(client: Client) -> None:
    """Creations before, while and after it is synchronized; some began before there was any plugin."""
    sandbox = client.pod_config()
    pod_id = client.run(sandbox)
    go_on = threading.Event()

    def create(_number: int) -> str:
        return client.create(pod_id, sandbox, client.container_config(["sleep", "1000"]))

    def wait(_request: Any) -> None:
        go_on.wait(10)

    late = Plugin(socket_of(client), "late", "20", Synchronize=wait)
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(create, range(2)))
        futures = [pool.submit(create, number) for number in range(4)]
        late.register()
        futures += [pool.submit(create, number) for number in range(4)]
        time.sleep(0.7)  # longer than an event may take, shorter than a synchronization
        go_on.set()
        ids += [future.result() for future in futures]
    ids.append(create(0))
    assert late.synchronized.wait(5)
    synchronized = {one.id for one in late.containers}
    events = [request.container.id for event, request in late.seen if event == "CreateContainer"]
    assert synchronized | set(events) == set(ids)
    assert not synchronized & set(events)
    assert len(events) == len(set(events))
    assert {*ids[:2]} <= synchronized
    assert ids[-1] in events
    late.close()


def test_plugins_stay_when_cri_dies_and_come_back_when_nri_does(client: Client) -> None:
    with Plugin(socket_of(client)) as plugin:
        pod_id, container_id = client.running()
        plugin.synchronized.clear()
        plugin.containers.clear()
        client.node.kill_worker("cri")
        assert plugin.synchronized.wait(20), "a new cri synchronizes whoever is there"
        assert [one.id for one in plugin.containers] == [container_id]
        client.node.wait_ready()
        client.stop(container_id)
        assert plugin.wait_for("StopContainer", container_id)
        client.node.kill_worker("nri")
        assert plugin.closed.wait(10)
    client.remove_pod(pod_id)
    with Plugin(socket_of(client)) as again:
        pod_id, container_id = client.running()
        assert again.wait_for("PostStartContainer", container_id)


# -- installed plugins, and the default validator -----------------------------------------------------------


@pytest.fixture
def installed(images: Served, tmp_path: Path) -> Iterator[Client]:
    tmp_path.chmod(0o755)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "conf").mkdir()
    plugin = tmp_path / "plugins" / "05-marker"
    plugin.write_text(
        f"#!/bin/sh\ncd {REPO} && exec {sys.executable} -m tests.support.nri_plugin\n", encoding="utf-8"
    )
    plugin.chmod(0o755)
    (tmp_path / "conf" / "marker.conf").write_text("of the drop-in\n")
    (tmp_path / "plugins" / "not-one").write_text("#!/bin/sh\n")
    (tmp_path / "plugins" / "not-one").chmod(0o755)
    config = f"""
[nri]
plugin_dir = "{tmp_path}/plugins"
plugin_config_dir = "{tmp_path}/conf"
[nri.default_validator]
enable = true
required_plugins = ["marker"]
reject_oci_hook_adjustment = true
tolerate_missing_annotation = "tests.org/alone"
"""
    with Node(registries=images.registries_conf, config=config, bridge="bhnri1") as node:
        client = Client(node, images)
        client.pull()
        yield client
        node.remove_everything()


def test_installed_plugins_are_there_before_anything_is_made_and_again_after_the_worker_died(
    installed: Client,
) -> None:
    _, container_id = installed.running()
    assert installed.output(container_id, "echo $INSTALLED") == "of the drop-in\n"
    log = installed.node.log_tail(300)
    assert "plugin 05-marker runs as uid 0" in log
    assert "a plugin's file is named NN-name" in log
    (before,) = installed.node.pids("nri")
    children = Path(f"/proc/{before}/task/{before}/children").read_text().split()
    installed.node.kill_worker("nri")
    wait_for(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "plugins end with the worker"
    )
    _, container_id = installed.running()
    assert installed.output(container_id, "echo $INSTALLED") == "of the drop-in\n"
    (after,) = installed.node.pids("nri")
    assert after != before

    hook = pb.ContainerAdjustment()
    hook.hooks.prestart.add(path="/bin/true")
    response = pb.CreateContainerResponse(adjust=hook)
    with Plugin(socket_of(installed), "hooks", "50", CreateContainer=lambda _request: response):
        assert "plugins must not add OCI hooks: 50-hooks" in refused(created, installed)

    (child,) = Path(f"/proc/{after}/task/{after}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    wait_for(lambda: "plugin=05-marker" in installed.node.log_tail(20), "its death is noticed")
    assert "required plugins are not there: marker" in refused(created, installed)
    sandbox = installed.pod_config(annotations={"tests.org/alone": "true"})
    pod_id = installed.run(sandbox)
    installed.create(pod_id, sandbox, installed.container_config(["sleep", "1"]))
