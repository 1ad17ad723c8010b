"""The whole daemon through its socket, as a kubelet uses it: real registry, real CNI, real runtimes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.cri_client import SHELL, Client, code_of
from tests.support.daemon import Node, wait_for
from tests.support.images import served


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    machine.enter()
    with served(larger_files=20) as images, Node(registries=images.registries_conf, bridge="bhcri0") as node:
        found = Client(node, images)
        found.pull()
        yield found


@pytest.fixture(autouse=True)
def clean(client: Client) -> Iterator[None]:
    """Whatever a test leaves running goes, and nothing of it stays."""
    yield
    client.node.remove_everything()
    left = client.node._settled_leftovers()
    assert left == []


@pytest.mark.parametrize("handler", ["", "crun", "runc"])
def test_a_container_runs_logs_and_ends_with_its_code(client: Client, handler: str) -> None:
    _, container_id = client.running(*SHELL, "echo out; echo err >&2; exit 3", handler=handler)
    status = client.ended(container_id)
    assert (status.exit_code, status.reason) == (3, "Error")
    assert sorted(client.log(container_id)) == ["err", "out"]
    assert status.created_at <= status.started_at <= status.finished_at


def test_image_ids_are_the_same_everywhere(client: Client) -> None:
    _, container_id = client.running()
    request = pb.PullImageRequest(image=pb.ImageSpec(image=client.images.busybox))
    pulled = client.node.images.PullImage(request, timeout=60).image_ref
    status_request = pb.ImageStatusRequest(image=pb.ImageSpec(image=client.images.busybox))
    image = client.node.images.ImageStatus(status_request, timeout=10).image
    listed = client.node.runtime.ListContainers(pb.ListContainersRequest(), timeout=10).containers[0]
    status = client.status(container_id)
    assert {pulled, image.id, listed.image_id, status.image_id} == {pulled}
    assert status.image.image == client.images.busybox


def test_the_containers_of_a_pod_share_network_and_host_name(client: Client) -> None:
    sandbox = client.pod_config(hostname="shared-name")
    pod_id = client.run(sandbox)
    ids = [client.create(pod_id, sandbox, client.container_config(["sleep", "1000"])) for _ in range(2)]
    for container_id in ids:
        client.start(container_id)
    status = client.node.runtime.PodSandboxStatus(
        pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id), timeout=10
    ).status
    addresses = [client.execute(id_, "ip", "-4", "-o", "addr", "show", "eth0").stdout for id_ in ids]
    assert addresses[0] == addresses[1]
    assert status.network.ip.encode() in addresses[0]
    assert {client.execute(id_, "hostname").stdout for id_ in ids} == {b"shared-name\n"}


def test_a_pod_with_a_shared_pid_namespace_has_the_built_in_init(client: Client) -> None:
    sandbox = client.pod_config(shared_pid=True)
    pod_id = client.run(sandbox)
    ids = [client.create(pod_id, sandbox, client.container_config(["sleep", "1000"])) for _ in range(2)]
    for container_id in ids:
        client.start(container_id)
    processes = client.execute(ids[0], "ps", "-o", "pid,args").stdout.decode()
    assert processes.count("sleep 1000") == 2
    own = client.execute(ids[0], *SHELL, "kill -9 1; readlink /proc/1/exe; echo $?").stdout
    assert own.endswith(b"\n")
    assert client.status(ids[1]).state == pb.ContainerState.CONTAINER_RUNNING


def test_a_pod_whose_init_is_killed_is_not_ready_and_makes_room(client: Client) -> None:
    pod_id, container_id = client.running(shared_pid=True)
    sandbox = client.pod_config(shared_pid=True)
    sandbox.metadata.CopyFrom(client.pod_status(pod_id).metadata)
    pid = next(w.pid for w in client.node.workers() if w.name == f"init {pod_id}")
    os.kill(pid, signal.SIGKILL)
    not_ready = pb.PodSandboxState.SANDBOX_NOTREADY
    wait_for(lambda: client.pod_status(pod_id).state == not_ready, "the pod is not ready")
    assert client.ended(container_id).exit_code == 137  # the kernel ends the namespace with its init
    again = client.container_config(["true"])
    assert code_of(client.create, pod_id, sandbox, again) == grpc.StatusCode.FAILED_PRECONDITION
    assert client.run(sandbox) != pod_id


def test_dns_config_and_shm_reach_the_container(client: Client) -> None:
    dns = pb.DNSConfig(servers=["10.0.0.10"], searches=["a.local", "b.local"], options=["ndots:5"])
    _, container_id = client.running("sleep", "1000", dns_config=dns)
    text = client.execute(container_id, "cat", "/etc/resolv.conf").stdout.decode()
    assert text == "search a.local b.local\nnameserver 10.0.0.10\noptions ndots:5\n"
    assert b"/dev/shm" in client.execute(container_id, "mount").stdout


def test_env_cwd_user_and_mounts_are_as_asked_for(client: Client, tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("from the host")
    tmp_path.chmod(0o755)
    sandbox = client.pod_config()
    pod_id = client.run(sandbox)
    config = client.container_config(
        SHELL,
        args=["id -u; id -g; pwd; echo $GREETING; cat /mnt/hello; touch /mnt/x || echo read-only"],
        envs=[pb.KeyValue(key="GREETING", value=b"hi")],
        working_dir="/tmp",
        mounts=[pb.Mount(container_path="/mnt", host_path=str(tmp_path), readonly=True)],
    )
    config.linux.security_context.run_as_user.value = 1234
    config.linux.security_context.run_as_group.value = 4321
    container_id = client.create(pod_id, sandbox, config)
    client.start(container_id)
    client.ended(container_id)
    lines = client.log(container_id)
    for expected in ("1234", "4321", "/tmp", "hi", "from the host", "read-only"):
        assert expected in " ".join(lines)
    status = client.status(container_id)
    assert (status.user.linux.uid, status.user.linux.gid) == (1234, 4321)
    assert status.mounts[0].container_path == "/mnt"


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_stdin_and_terminals_are_as_asked_for(client: Client, handler: str) -> None:
    """A container that wants stdin finds it open and empty, whoever dies; one that does not finds its end."""
    sandbox = client.pod_config()
    pod_id = client.run(sandbox, handler)
    script = "cat; echo end; tty; echo $TERM"

    def started(**fields: Any) -> str:
        container_id = client.create(pod_id, sandbox, client.container_config([*SHELL, script], **fields))
        client.start(container_id)
        return container_id

    waiting = [started(stdin=True), started(stdin=True, stdin_once=True), started(stdin=True, tty=True)]
    for fields in ({}, {"stdin_once": True}):
        closed = started(**fields)
        assert client.ended(closed).exit_code == 0
        assert client.log(closed) == ["end", "not a tty", ""]
    client.node.kill_worker("cri")
    wait_for(client.node.answers, "cri answers again")
    assert {client.status(one).state for one in waiting} == {pb.ContainerState.CONTAINER_RUNNING}
    assert all(client.log(one) == [] for one in waiting)
    script = "tty; echo $TERM; test -t 0; echo $?"
    shown = started(tty=True)
    assert client.ended(shown).exit_code == 0
    assert client.log(shown) == ["/dev/pts/0", "xterm", "0"]


def test_exec_gives_output_code_and_times_out(client: Client) -> None:
    _, container_id = client.running()
    answer = client.execute(container_id, *SHELL, "echo out; echo err >&2; exit 7")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 7)
    since = time.monotonic()
    assert code_of(client.execute, container_id, "sleep", "100", timeout=1) == (
        grpc.StatusCode.DEADLINE_EXCEEDED
    )
    assert time.monotonic() - since < 10
    many = client.execute(container_id, *SHELL, "yes | head -c 20000000")
    assert len(many.stdout) == 16 * 1024 * 1024


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_a_command_may_be_as_large_as_the_kernel_takes(client: Client, handler: str) -> None:
    _, container_id = client.running(handler=handler)
    largest = "x" * 131071
    assert client.execute(container_id, "true", largest).exit_code == 0
    assert client.execute(container_id, "true", *[largest] * 15, "x" * 120000).exit_code == 0
    for refused in ([largest + "x"], [largest] * 16):
        with pytest.raises(grpc.RpcError) as caught:
            client.execute(container_id, "true", *refused)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the kernel takes at most" in (caught.value.details() or "")


def test_a_stop_signal_is_heeded_and_a_deaf_container_is_killed(client: Client) -> None:
    _, polite = client.running(*SHELL, "trap 'exit 5' TERM; while true; do sleep 0.05; done")
    time.sleep(0.3)
    client.stop(polite, 20)
    assert client.status(polite).exit_code == 5
    _, deaf = client.running(*SHELL, "trap '' TERM; while true; do sleep 0.05; done")
    time.sleep(0.3)
    since = time.monotonic()
    client.stop(deaf, 1)
    assert 0.9 < time.monotonic() - since < 10
    assert client.status(deaf).exit_code == 137


def test_a_command_that_does_not_exist_is_a_clear_error_and_leaves_nothing(client: Client) -> None:
    sandbox = client.pod_config()
    pod_id = client.run(sandbox)
    config = client.container_config(["/no/such/program"])
    with pytest.raises(grpc.RpcError) as caught:
        client.start(client.create(pod_id, sandbox, config))
    assert isinstance(caught.value, grpc.Call)
    assert "/no/such/program" in (caught.value.details() or "")


def test_logs_are_rotated_without_losing_a_line(client: Client) -> None:
    _, container_id = client.running(*SHELL, "i=0; while true; do echo $i; i=$((i+1)); sleep 0.01; done")
    path = Path(client.status(container_id).log_path)
    wait_for(lambda: path.stat().st_size > 200, "it logs")
    rotated = path.with_suffix(".1")
    path.rename(rotated)
    request = pb.ReopenContainerLogRequest(container_id=container_id)
    client.node.runtime.ReopenContainerLog(request, timeout=10)
    wait_for(lambda: path.exists() and path.stat().st_size > 200, "it logs on")
    client.stop(container_id)
    lines = [line.split(" ", 3)[3] for p in (rotated, path) for line in p.read_text().splitlines()]
    assert lines == [str(n) for n in range(len(lines))]


def test_the_verbose_status_tells_pid_and_spec(client: Client) -> None:
    _, container_id = client.running()
    info = json.loads(client.status(container_id, verbose=True).info["info"])
    assert Path(f"/proc/{info['pid']}").exists()
    assert info["runtimeSpec"]["process"]["args"] == ["sleep", "1000"]


def test_a_repeated_create_is_the_same_container(client: Client) -> None:
    sandbox = client.pod_config()
    pod_id = client.run(sandbox)
    assert client.run(sandbox) == pod_id
    config = client.container_config(["sleep", "1000"])
    container_id = client.create(pod_id, sandbox, config)
    assert client.create(pod_id, sandbox, config) == container_id
    client.start(container_id)
    request = pb.StartContainerRequest(container_id=container_id)
    assert code_of(client.node.runtime.StartContainer, request) == grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("handler", ["crun", "runc"])
@pytest.mark.parametrize("patience", [0.001, 0.008, 0.02, 0.12])
def test_a_client_that_gives_up_at_every_step_only_has_to_ask_again(
    client: Client, handler: str, patience: float
) -> None:
    runtime = client.node.runtime
    given_up = []

    def insist(call: Any, request: Any) -> Any:
        """Ask with hardly any time, then again with enough."""
        try:
            return call(request, timeout=patience)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            given_up.append(type(request).__name__)
            return call(request, timeout=60)

    sandbox = client.pod_config(shared_pid=True)
    run = pb.RunPodSandboxRequest(config=sandbox, runtime_handler=handler)
    pod_id = insist(runtime.RunPodSandbox, run).pod_sandbox_id
    config = client.container_config(["sleep", "1000"])
    config.linux.security_context.CopyFrom(
        pb.LinuxContainerSecurityContext(namespace_options=sandbox.linux.security_context.namespace_options)
    )
    create = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=sandbox)
    container_id = insist(runtime.CreateContainer, create).container_id
    insist(runtime.StartContainer, pb.StartContainerRequest(container_id=container_id))
    limits = pb.LinuxContainerResources(cpu_shares=512)
    update = pb.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
    insist(runtime.UpdateContainerResources, update)
    status = client.status(container_id)
    assert (status.state, status.resources.linux.cpu_shares) == (pb.ContainerState.CONTAINER_RUNNING, 512)
    assert len(runtime.ListContainers(pb.ListContainersRequest(), timeout=20).containers) == 1
    assert len(runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=20).items) == 1
    insist(runtime.StopContainer, pb.StopContainerRequest(container_id=container_id, timeout=0))
    insist(runtime.RemoveContainer, pb.RemoveContainerRequest(container_id=container_id))
    insist(runtime.StopPodSandbox, pb.StopPodSandboxRequest(pod_sandbox_id=pod_id))
    insist(runtime.RemovePodSandbox, pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id))
    assert not runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=20).items
    assert given_up or patience > 0.01


@pytest.mark.parametrize("patience", [0.02, 0.15])
def test_a_client_that_gives_up_and_never_comes_back_leaves_what_can_be_removed(
    client: Client, patience: float
) -> None:
    sandbox = client.pod_config(shared_pid=True)
    run = pb.RunPodSandboxRequest(config=sandbox)
    for _ in range(3):
        with contextlib.suppress(grpc.RpcError):
            client.node.runtime.RunPodSandbox(run, timeout=patience)
    wait_for(lambda: client.node.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items, "the pod is made")
    pod_id = client.run(sandbox)
    create = pb.CreateContainerRequest(
        pod_sandbox_id=pod_id, config=client.container_config(["sleep", "9"]), sandbox_config=sandbox
    )
    with contextlib.suppress(grpc.RpcError):
        client.node.runtime.CreateContainer(create, timeout=patience)
    client.remove_pod(pod_id)  # whether the container was made by now or not


def test_a_hung_client_does_not_keep_a_pod_from_being_made(client: Client) -> None:
    sandbox = client.pod_config()
    request = pb.RunPodSandboxRequest(config=sandbox)
    assert code_of(client.node.runtime.RunPodSandbox, request, timeout=0.005) == (
        grpc.StatusCode.DEADLINE_EXCEEDED
    )
    pod_id = client.run(sandbox)
    listed = client.node.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=10).items
    assert [item.id for item in listed] == [pod_id]


def test_an_out_of_memory_kill_is_told_as_such(client: Client) -> None:
    sandbox = client.pod_config()
    pod_id = client.run(sandbox)
    config = client.container_config(SHELL, args=["x=a; while true; do x=$x$x; done"])
    config.linux.resources.memory_limit_in_bytes = 32 * 1024 * 1024
    container_id = client.create(pod_id, sandbox, config)
    client.start(container_id)
    status = client.ended(container_id, 60)
    assert (status.reason, status.exit_code) == ("OOMKilled", 137)


def test_a_pod_on_the_hosts_network_has_the_hosts_name_and_no_address(client: Client) -> None:
    sandbox = client.pod_config()
    sandbox.linux.security_context.namespace_options.network = pb.NamespaceMode.NODE
    pod_id = client.run(sandbox)
    container_id = client.create(pod_id, sandbox, client.container_config(["sleep", "1000"]))
    client.start(container_id)
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
    assert client.node.runtime.PodSandboxStatus(request, timeout=10).status.network.ip == ""
    links = client.execute(container_id, "ip", "link").stdout
    assert b"bhcri0" in links


def test_images_are_pulled_listed_and_removed(client: Client) -> None:
    spec = pb.ImageSpec(image=client.images.larger)
    watch: Any = client.node.channel.unary_stream("/bulkhead.v1.Operator/WatchPulls")
    stream = watch(b"", timeout=60)
    assert msgspec.json.decode(next(stream)) == []
    pulled = client.node.images.PullImage(pb.PullImageRequest(image=spec), timeout=60).image_ref
    assert any(msgspec.json.decode(data) for data in (next(stream), next(stream)))
    stream.cancel()
    found = client.node.images.ImageStatus(pb.ImageStatusRequest(image=spec, verbose=True), timeout=10)
    assert found.image.id == pulled
    assert found.image.size > 1_000_000
    usage = client.node.images.ImageFsInfo(pb.ImageFsInfoRequest(), timeout=10).image_filesystems[0]
    assert usage.used_bytes.value >= found.image.size
    client.node.images.RemoveImage(pb.RemoveImageRequest(image=spec), timeout=30)
    answer = client.node.images.ImageStatus(pb.ImageStatusRequest(image=spec), timeout=10)
    assert not answer.HasField("image")


def test_an_image_in_use_is_not_removed(client: Client) -> None:
    client.running()
    request = pb.RemoveImageRequest(image=pb.ImageSpec(image=client.images.busybox))
    assert code_of(client.node.images.RemoveImage, request) == grpc.StatusCode.FAILED_PRECONDITION


def test_absent_images_and_registries_are_told_apart(client: Client) -> None:
    address = client.images.address
    absent = pb.PullImageRequest(image=pb.ImageSpec(image=f"{address}/test/absent:1"))
    assert code_of(client.node.images.PullImage, absent, timeout=60) == grpc.StatusCode.NOT_FOUND
    bad = pb.PullImageRequest(image=pb.ImageSpec(image="Not A Name"))
    assert code_of(client.node.images.PullImage, bad, timeout=60) == grpc.StatusCode.INVALID_ARGUMENT


def test_stopping_and_removing_can_be_repeated(client: Client) -> None:
    pod_id, container_id = client.running()
    for _ in range(2):
        client.stop(container_id)
    for _ in range(2):
        client.remove(container_id)
    for _ in range(2):
        client.remove_pod(pod_id)


def test_many_pods_at_once(client: Client) -> None:
    futures = []
    for _ in range(8):
        request = pb.RunPodSandboxRequest(config=client.pod_config())
        futures.append(client.node.runtime.RunPodSandbox.future(request, timeout=60))
    ids = {future.result().pod_sandbox_id for future in futures}
    listed = client.node.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=10).items
    assert {item.id for item in listed} == ids
    addresses = {
        client.node.runtime.PodSandboxStatus(
            pb.PodSandboxStatusRequest(pod_sandbox_id=id_), timeout=10
        ).status.network.ip
        for id_ in ids
    }
    assert len(addresses) == 8
