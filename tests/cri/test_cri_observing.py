"""Stats, metrics, events and conditions through the whole daemon, held against what the kernel says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.cri import api_pb2 as pb
from tests.support import dashboard, machine
from tests.support.cri_client import SHELL, Client
from tests.support.daemon import CGROUPS, Node, wait_for
from tests.support.images import served

#: Another one than other modules have, whose bridges may still stand.
BRIDGE, SUBNET = "bhobs0", "10.216.0.0/16"
SECOND = 1_000_000_000
PROMTOOL = Path(__file__).resolve().parents[2] / ".cache/promtool"
DASHBOARD = dashboard.load()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    machine.enter()
    with served() as images:
        node = Node(registries=images.registries_conf, bridge=BRIDGE)
        path = node.conf_dir / "10-test.conflist"
        path.write_text(path.read_text().replace("10.214.0.0/16", SUBNET))
        with node:
            found = Client(node, images)
            found.pull()
            yield found


@pytest.fixture(autouse=True)
def clean(client: Client) -> Iterator[None]:
    yield
    client.node.remove_everything()
    assert client.node._settled_leftovers() == []


def stats_of(client: Client, container_id: str) -> pb.ContainerStats:
    request = pb.ContainerStatsRequest(container_id=container_id)
    return client.node.runtime.ContainerStats(request, timeout=10).stats


def pod_stats(client: Client, pod_id: str) -> pb.LinuxPodSandboxStats:
    request = pb.PodSandboxStatsRequest(pod_sandbox_id=pod_id)
    return client.node.runtime.PodSandboxStats(request, timeout=10).stats.linux


def number(container_id: str, controller: str, file: str) -> int:
    (group,) = (CGROUPS / controller).glob(f"*/bulkhead-{container_id}")
    return int((group / file).read_text())


def test_stats_are_what_the_kernel_says(client: Client) -> None:
    pod_id, container_id = client.running(*SHELL, "while :; do :; done")
    first = stats_of(client, container_id)
    time.sleep(1.1)
    usage = number(container_id, "cpuacct", "cpuacct.usage")
    stats = stats_of(client, container_id)
    assert first.cpu.usage_core_nano_seconds.value < usage <= stats.cpu.usage_core_nano_seconds.value
    assert stats.cpu.usage_core_nano_seconds.value - usage < SECOND
    assert SECOND // 20 < stats.cpu.usage_nano_cores.value < SECOND * 1.2  # it spins, on a shared machine
    memory = number(container_id, "memory", "memory.usage_in_bytes")
    assert abs(stats.memory.usage_bytes.value - memory) < 4 << 20
    assert 0 < stats.memory.working_set_bytes.value <= stats.memory.usage_bytes.value

    gateway = f"http://{SUBNET.replace('0.0/16', '0.1')}/"
    client.execute(container_id, "wget", "-q", "-T1", "-O", "/dev/null", gateway)  # refused, over the wire
    linux = pod_stats(client, pod_id)
    shown = client.execute(container_id, "cat", "/proc/net/dev").stdout.decode()
    counters = next(line.split() for line in shown.splitlines() if "eth0:" in line)
    assert linux.network.default_interface.name == "eth0"
    assert 0 < linux.network.default_interface.rx_bytes.value <= int(counters[1])
    assert [one.attributes.id for one in linux.containers] == [container_id]
    assert linux.process.process_count.value == 1


def test_a_pod_without_a_process_of_its_own_has_no_network_figures(client: Client) -> None:
    sandbox = client.pod_config()
    sandbox.linux.security_context.namespace_options.pid = pb.NamespaceMode.POD  # an init, not in its network
    linux = pod_stats(client, client.run(sandbox))
    assert not linux.HasField("network")


def test_what_is_written_is_measured_beside_the_calls(client: Client) -> None:
    _, container_id = client.running()
    before = stats_of(client, container_id).writable_layer
    assert before.inodes_used.value <= 2
    assert 0 < before.timestamp <= time.time_ns()
    client.execute(
        container_id, *SHELL, "mkdir /w; for i in 1 2 3; do head -c 1000000 /dev/zero >/w/$i; done"
    )
    client.node.kill_worker("storage")  # the next one knows nothing yet, and measures at once

    def measured() -> pb.FilesystemUsage | None:
        layer = stats_of(client, container_id).writable_layer
        return layer if layer.timestamp != before.timestamp else None

    after = wait_for(measured, "the layer is measured")
    upper = client.node.state / "containers" / container_id / "upper"
    said = subprocess.run(["du", "-s", "-B1", upper], capture_output=True, text=True, check=True).stdout
    assert after.used_bytes.value == int(said.split()[0]) > 3_000_000
    assert after.fs_id.mountpoint == str(client.node.state)
    info = client.node.images.ImageFsInfo(pb.ImageFsInfoRequest(), timeout=10)
    assert info.container_filesystems[0].used_bytes.value == after.used_bytes.value
    layers = subprocess.run(
        ["du", "-s", "-B1", client.node.state / "layers"], capture_output=True, text=True, check=True
    ).stdout
    assert info.image_filesystems[0].used_bytes.value == pytest.approx(int(layers.split()[0]), rel=0.05)


def test_metrics_have_values_for_what_this_host_has(client: Client) -> None:
    sandbox = client.pod_config()
    pod_id = client.run(sandbox)
    config = client.container_config(["sleep", "1000"])
    resources = config.linux.resources
    resources.cpu_period, resources.cpu_quota, resources.memory_limit_in_bytes = 100000, 50000, 64 << 20
    container_id = client.create(pod_id, sandbox, config)
    client.start(container_id)
    client.output(container_id, "until grep -q sleep /proc/1/cmdline; do :; done")  # the runtime has let go
    runtime = client.node.runtime
    listed = runtime.ListMetricDescriptors(pb.ListMetricDescriptorsRequest(), timeout=10).descriptors
    answer = runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest(), timeout=10)
    (pod,) = answer.pod_metrics
    (container,) = pod.container_metrics
    values = {one.name: one.value.value for one in (*pod.metrics, *container.metrics)}
    host_lacks = {
        one.name
        for one in listed
        if any(word in one.name for word in ("pressure", "hugetlb", "blkio", "_fs_reads", "_fs_writes"))
    }
    assert {one.name for one in listed} - values.keys() <= host_lacks
    assert values["container_spec_cpu_quota"] == 50000
    assert values["container_spec_memory_limit_bytes"] == 64 << 20
    assert (values["container_processes"], values["container_threads"]) == (1, 1)
    assert values["container_file_descriptors"] == 3
    assert values["container_fs_limit_bytes"] > values["container_fs_usage_bytes"] > 0
    assert abs(values["container_last_seen"] - time.time()) < 30


def test_promtool_finds_no_fault_in_a_scrape_nor_in_what_the_dashboard_asks(
    client: Client, tmp_path: Path
) -> None:
    client.running(*SHELL, "sleep 100")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(client.node.run_root / "ops.sock"))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, scrape = answer.partition(b"\r\n\r\n")
    assert b" 200 OK" in head
    assert b"bulkhead_rpc_duration_seconds_bucket" in scrape
    assert promtool("check", "metrics", text=scrape.decode()) == ""
    rules = [
        {"record": "x:y", "expr": dashboard.filled(query)} for _, query, _ in dashboard.queries(DASHBOARD)
    ]
    file = tmp_path / "rules.yml"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "--lint=none", str(file))


def promtool(*arguments: str, text: str = "") -> str:
    """What Prometheus's own checker says, all of it. Raises AssertionError if it finds a fault."""
    assert PROMTOOL.exists(), "make .cache/promtool"
    done = subprocess.run([PROMTOOL, *arguments], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_events_come_in_order(client: Client) -> None:
    stream = client.node.runtime.GetContainerEvents(pb.GetEventsRequest())
    seen: list[tuple[str, str]] = []

    def listen() -> None:
        for event in stream:
            kind = pb.ContainerEventType.Name(event.container_event_type).split("_")[1]
            seen.append((event.container_id, kind))
            if kind == "DELETED" and len(seen) >= 8:
                return

    listener = threading.Thread(target=listen)
    listener.start()
    time.sleep(0.3)  # the stream is open when the first event is made
    pod_id, container_id = client.running(*SHELL, "exit 3")
    assert client.ended(container_id).exit_code == 3
    client.node.remove_everything()
    listener.join(20)
    assert not listener.is_alive()
    kinds = ["CREATED", "STARTED", "STOPPED", "DELETED"]
    assert [kind for id_, kind in seen if id_ == container_id] == kinds
    assert [kind for id_, kind in seen if id_ == pod_id] == kinds


def test_conditions_say_within_a_second_what_the_trouble_is(client: Client) -> None:
    node = client.node
    config = node.conf_dir / "10-test.conflist"
    config.rename(node.root / "aside")
    try:
        (network,) = wait_for(lambda: troubles(node), "the network's trouble is told", 1.0)
    finally:
        (node.root / "aside").rename(config)
    assert (network.type, network.reason) == ("NetworkReady", "NetworkPluginNotReady")
    assert str(node.conf_dir) in network.message
    wait_for(lambda: not troubles(node), "it is over", 1.0)
    worker = wait_for(lambda: failing(node, "storage"), "a worker that keeps dying is named", 10.0)
    assert worker.message.startswith("worker storage is in state backoff (last death: signal 9")
    wait_for(lambda: not troubles(node), "it is over", 10.0)
    for kind, condition in (("storage", "RuntimeReady"), ("network", "NetworkReady")):
        (pid,) = node.pids(kind)
        os.kill(pid, signal.SIGSTOP)
        try:
            (hung,) = troubles(node)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (hung.type, hung.reason) == (condition, f"{kind.capitalize()}WorkerUnavailable")
        assert hung.message.startswith(f"the {kind} worker does not answer")
        wait_for(lambda: not troubles(node), "it is over", 10.0)


def troubles(node: Node) -> list[pb.RuntimeCondition]:
    """The conditions that do not hold; the question takes no second itself."""
    conditions = node.runtime.Status(pb.StatusRequest(), timeout=1.0).status.conditions
    return [condition for condition in conditions if not condition.status]


def failing(node: Node, kind: str) -> pb.RuntimeCondition | None:
    """Kill the worker, if it is there, and say what conditions say right away of one that keeps dying."""
    for pid in node.pids(kind):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return next((one for one in troubles(node) if one.reason == "WorkerFailed"), None)
