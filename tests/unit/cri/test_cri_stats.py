"""What is read of cgroups, v1 and v2, of /proc, and how it is put into CRI's stats and metrics."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError
from ipc.messages import monitor, storage
from ipc.messages.cri import InfoGet
from ipc.settings import POD_METRICS
from tests.support.cri_world import Worker, World, eventually, pod_config, world_and_worker
from workers.cri.stats import descriptors, procfs
from workers.cri.stats.cgroupfs import Cgroups, Io
from workers.cri.stats.collect import Stats
from workers.cri.stats.rates import Rates

Scenario = Callable[[World, Worker], Awaitable[None]]
SECOND = 1_000_000_000
PRESSURE = (
    "some avg10=1.50 avg60=2.00 avg300=3.00 total=4000000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n"
)
DEV = """Inter-|   Receive                    |  Transmit
 face |bytes    packets errs drop and so on|bytes    packets errs drop and so on
    lo:     500       5    0    0    0     0          0         0      500       5    0    0    0 0 0 0
net1:1:   7 6 5 4 0 0 0 0 3 2 1 9 0 0 0 0
  eth0: 1000 10 1 2 0 0 0 0 2000 20 3 4 0 0 0 0
"""


def play(scenario: Scenario, **settings: Any) -> None:
    async def run() -> None:
        async with world_and_worker(**settings) as (world, worker):
            await scenario(world, worker)

    asyncio.run(asyncio.wait_for(run(), 30))


def write(base: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def group_v2(mount: Path, group: str, usage_usec: int = 3_000_000) -> None:
    (mount / "cgroup.controllers").write_text("cpu memory pids io\n")
    stat = "anon 100\nfile 50\nkernel 30\nfile_mapped 20\ninactive_file 40\npgfault 7\npgmajfault 2\n"
    files = {
        "cpu.stat": f"usage_usec {usage_usec}\nuser_usec 2000000\nsystem_usec 1000000\n"
        "nr_periods 9\nnr_throttled 4\nthrottled_usec 5000000\n",
        "memory.current": "190\n",
        "memory.stat": stat,
        "memory.max": "1000\n",
        "memory.swap.current": "11\n",
        "memory.swap.max": "max\n",
        "memory.peak": "300\n",
        "memory.events": "low 0\nhigh 0\nmax 6\noom 1\noom_kill 1\n",
        "pids.current": "5\n",
        "pids.max": "max\n",
        "cgroup.procs": "1\n2\n",
        "io.stat": "8:0 rbytes=100 wbytes=200 rios=3 wios=4 dbytes=0 dios=0\n8:16 \n",
        "hugetlb.2MB.current": "2097152\n",
        "hugetlb.2MB.rsvd.current": "1\n",
        **{f"{name}.pressure": PRESSURE for name in ("cpu", "memory", "io")},
    }
    write(mount / group.strip("/"), files)


def group_v1(mount: Path, group: str) -> None:
    """As a distribution mounts them: cpu and cpuacct together, without symbolic links."""
    unlimited = f"{2**63 - 4096}\n"
    stat = "cache 1\ntotal_cache 50\ntotal_rss 100\ntotal_swap 11\ntotal_inactive_file 40\n"
    stat += "total_pgfault 7\ntotal_pgmajfault 2\ntotal_mapped_file 20\n"
    group = group.strip("/")
    files = {
        f"cpu,cpuacct/{group}/cpuacct.usage": "3000000000\n",
        f"cpu,cpuacct/{group}/cpuacct.usage_user": "2000000000\n",
        f"cpu,cpuacct/{group}/cpuacct.usage_sys": "1000000000\n",
        f"cpu,cpuacct/{group}/cpu.stat": "nr_periods 9\nnr_throttled 4\nthrottled_time 5000000000\n",
        f"memory/{group}/memory.usage_in_bytes": "190\n",
        f"memory/{group}/memory.stat": stat,
        f"memory/{group}/memory.limit_in_bytes": "1000\n",
        f"memory/{group}/memory.memsw.limit_in_bytes": unlimited,
        f"memory/{group}/memory.kmem.usage_in_bytes": "30\n",
        f"memory/{group}/memory.failcnt": "6\n",
        f"memory/{group}/memory.max_usage_in_bytes": "300\n",
        f"memory/{group}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        f"pids/{group}/pids.current": "5\n",
        f"pids/{group}/pids.max": "max\n",
        f"pids/{group}/cgroup.procs": "1\n2\n",
        f"blkio/{group}/blkio.throttle.io_service_bytes_recursive": "8:0 Read 100\n8:0 Write 200\nTotal 9\n",
        f"blkio/{group}/blkio.throttle.io_serviced": "8:0 Read 3\n8:0 Write 4\nTotal 7\n",
        f"hugetlb/{group}/hugetlb.2MB.usage_in_bytes": "2097152\n",
        f"hugetlb/{group}/hugetlb.2MB.max_usage_in_bytes": "4194304\n",
    }
    write(mount, files)


@pytest.fixture(params=[group_v1, group_v2], ids=["v1", "v2"])
def cgroups(request: pytest.FixtureRequest, tmp_path: Path) -> Cgroups:
    request.param(tmp_path, "/pods/a")
    return Cgroups(str(tmp_path))


def test_both_versions_give_the_same_figures(cgroups: Cgroups) -> None:
    assert cgroups.cpu_usage("/pods/a") == 3 * SECOND
    cpu = cgroups.cpu("/pods/a")
    assert cpu is not None
    assert (cpu.user, cpu.system, cpu.throttled_time) == (2 * SECOND, SECOND, 5 * SECOND)
    assert (cpu.periods, cpu.throttled) == (9, 4)
    memory = cgroups.memory("/pods/a")
    assert memory is not None
    assert (memory.usage, memory.working_set, memory.rss, memory.cache) == (190, 150, 100, 50)
    assert (memory.faults, memory.major_faults, memory.swap, memory.mapped) == (7, 2, 11, 20)
    assert (memory.kernel, memory.limit, memory.swap_limit) == (30, 1000, None)
    assert cgroups.memory_extremes("/pods/a") == (6, 300)
    assert cgroups.oom_kills("/pods/a") == 1
    assert (cgroups.tasks("/pods/a"), cgroups.tasks_limit("/pods/a")) == (5, None)
    assert cgroups.processes("/pods/a") == [1, 2]
    assert cgroups.io("/pods/a")["8:0"] == Io(100, 200, 3, 4)
    assert cgroups.huge_pages("/pods/a")["2MB"][0] == 2097152


def test_what_is_not_there_is_unknown_not_zero(cgroups: Cgroups) -> None:
    gone = "/pods/gone"
    assert cgroups.cpu_usage(gone) is None
    assert cgroups.cpu(gone) is None
    assert cgroups.memory(gone) is None
    assert cgroups.tasks(gone) is None
    assert cgroups.processes(gone) is None
    assert cgroups.oom_kills(gone) is None
    assert cgroups.pressure(gone, "cpu") is None
    assert cgroups.io(gone) == {}
    assert cgroups.huge_pages(gone) == {}


def test_pressure_is_read_on_v2_and_v1_has_none(cgroups: Cgroups) -> None:
    psi = cgroups.pressure("/pods/a", "memory")
    if not cgroups.v2:
        assert psi is None
        return
    assert psi is not None
    assert psi.some is not None
    assert psi.full is not None
    assert (psi.some.total, psi.some.avg10, psi.full.total) == (4_000_000, 1.5, 9)


def test_nano_cores_are_of_the_last_second_or_more() -> None:
    rates = Rates()
    assert rates.observe("a", 10 * SECOND, 0) is None
    assert rates.observe("a", 10 * SECOND + 5, 1) is None  # too short an interval tells nothing
    assert rates.observe("a", 12 * SECOND, SECOND) == SECOND // 2
    assert rates.observe("a", 12 * SECOND + 9, 2 * SECOND) == SECOND // 2  # the last one stands
    assert rates.observe("a", 14 * SECOND, SECOND) == 0
    assert rates.observe("young", 14 * SECOND, 3 * SECOND, born=12 * SECOND) == 3 * SECOND // 2
    rates.keep({"young"})
    assert rates.observe("a", 20 * SECOND, 5) is None


def test_interfaces_of_a_process_are_those_of_its_namespace() -> None:
    found = procfs.parse_dev(DEV)
    assert [one.name for one in found] == ["net1:1", "eth0"]
    eth0 = found[1]
    assert (eth0.rx_bytes, eth0.rx_packets, eth0.rx_errors, eth0.rx_dropped) == (1000, 10, 1, 2)
    assert (eth0.tx_bytes, eth0.tx_packets, eth0.tx_errors, eth0.tx_dropped) == (2000, 20, 3, 4)
    assert procfs.interfaces(2**22 + 1) is None
    assert procfs.sockets(2**22 + 1) is None
    assert procfs.descriptors(2**22 + 1) is None
    assert procfs.open_files_limit(2**22 + 1) is None


def test_there_are_56_metrics_each_once_and_their_groups_are_those_of_the_configuration() -> None:
    assert len(descriptors.TABLE) == len(descriptors.BY_NAME) == 56
    assert descriptors.GROUPS == POD_METRICS
    only = descriptors.listed(["oom"]).descriptors
    assert {one.name for one in only} == {"container_last_seen", "container_oom_events_total"}
    assert all(one.help and list(one.label_keys[:3]) == ["id", "name", "image"] for one in only)


# -- through the RPCs -------------------------------------------------------------------------------------


async def node_with_groups(worker: Worker, mount: Path) -> tuple[str, str]:
    """A pod with a cgroup of its own and a running container, both with figures."""
    pod_id = await worker.run_pod("p", linux=pb.LinuxPodSandboxConfig(cgroup_parent="/pods/p"))
    container_id = await worker.create(pod_id, "c")
    await worker.start_container(container_id)
    group_v2(mount, f"/pods/p/bulkhead-{container_id}")
    group_v2(mount, "/pods/p", usage_usec=8_000_000)
    worker.service.observing.stats.cgroups = Cgroups(str(mount))
    return pod_id, container_id


def test_stats_of_a_container_and_its_pod(tmp_path: Path) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id, container_id = await node_with_groups(worker, tmp_path)
        request = pb.ContainerStatsRequest(container_id=container_id[:12])
        before = time.time_ns()
        stats = (await worker.runtime.ContainerStats(request)).stats
        assert stats.attributes.id == container_id
        assert stats.attributes.labels == {"app": "c"}
        assert before <= stats.cpu.timestamp <= time.time_ns()
        assert stats.cpu.usage_core_nano_seconds.value == 3 * SECOND
        assert stats.memory.working_set_bytes.value == 150
        assert stats.memory.available_bytes.value == 850
        assert stats.swap.swap_usage_bytes.value == 11
        assert not stats.swap.HasField("swap_available_bytes")  # there is no limit
        assert stats.io.psi.Some.Total == 4_000_000_000  # ns
        assert stats.cpu.psi.Some.Avg10 == 1.5
        assert stats.writable_layer.used_bytes.value == 4096
        assert stats.writable_layer.timestamp == 5  # when storage measured it
        assert stats.writable_layer.fs_id.mountpoint == worker.node.settings.root

        of_pod = (
            await worker.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod_id))
        ).stats
        assert of_pod.linux.cpu.usage_core_nano_seconds.value == 8 * SECOND  # its own group's
        assert of_pod.linux.process.process_count.value == 5
        assert [one.attributes.id for one in of_pod.linux.containers] == [container_id]
        assert len(world.asked(storage.UsageList)) == 1  # one answer is good for a while

    play(scenario)


def test_a_pod_that_shares_its_cgroup_parent_is_the_sum_of_its_containers(tmp_path: Path) -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        pod_id, _ = await node_with_groups(worker, tmp_path)
        second = await worker.create(pod_id, "d")
        group_v2(tmp_path, f"/pods/p/bulkhead-{second}", usage_usec=1_000_000)
        await worker.run_pod("q", linux=pb.LinuxPodSandboxConfig(cgroup_parent="/pods/p"))
        stats = (await worker.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id=pod_id))).stats
        assert stats.linux.cpu.usage_core_nano_seconds.value == 4 * SECOND
        assert stats.linux.memory.usage_bytes.value == 380
        assert stats.linux.process.process_count.value == 10

    play(scenario)


def test_lists_of_stats_keep_to_their_filters_and_leave_out_what_has_ended(tmp_path: Path) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        pod_id, first = await node_with_groups(worker, tmp_path)
        other_pod, other = await worker.running("other")

        async def listed(**fields: Any) -> list[str]:
            wanted = pb.ContainerStatsFilter(**fields)
            request = pb.ListContainerStatsRequest(filter=wanted)
            found = [one.attributes.id for one in (await worker.runtime.ListContainerStats(request)).stats]
            streamed = []
            async for piece in worker.runtime.StreamContainerStats(
                pb.StreamContainerStatsRequest(filter=wanted)
            ):
                streamed += [one.attributes.id for one in piece.container_stats]
            assert streamed == found
            return found

        assert await listed() == [first, other]
        assert await listed(id=first[:10]) == [first]
        assert await listed(pod_sandbox_id=other_pod[:10]) == [other]
        assert await listed(pod_sandbox_id=other_pod, id=first) == []
        assert await listed(label_selector={"app": "c"}) == [first]
        assert await listed(id="f" * 64) == []
        world.monitors[first].end(0)
        await worker.stop_container(first)
        assert await listed() == [other]
        ended = await worker.runtime.ContainerStats(pb.ContainerStatsRequest(container_id=first))
        assert not ended.stats.HasField("cpu")
        assert ended.stats.writable_layer.used_bytes.value == 4096
        wanted = pb.PodSandboxStatsFilter(id=pod_id[:10])
        pods = await worker.runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest(filter=wanted))
        assert [one.attributes.id for one in pods.stats] == [pod_id]
        await worker.stop_pod(pod_id)
        left = await worker.runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest())
        assert [one.attributes.id for one in left.stats] == [other_pod]
        for call in (
            worker.runtime.ContainerStats(pb.ContainerStatsRequest(container_id="f" * 64)),
            worker.runtime.PodSandboxStats(pb.PodSandboxStatsRequest(pod_sandbox_id="f" * 64)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    play(scenario)


def test_while_storage_is_silent_the_layers_are_as_they_were(tmp_path: Path) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        _, container_id = await node_with_groups(worker, tmp_path)
        layers = worker.service.observing.stats.layers
        container = worker.node.store.containers[container_id]
        assert (await layers.all([container]))[container_id].used_bytes == 4096
        world.fail(storage.UsageList, RemoteError(Code.UNAVAILABLE, "gone"))
        layers._asked = 0.0
        assert (await layers.all())[container_id].timestamp_ns == 5

    play(scenario)


def test_network_figures_outlive_the_process_they_were_read_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        pod_id, _ = await node_with_groups(worker, tmp_path)
        stats: Stats = worker.service.observing.stats
        pod = worker.node.store.pods[pod_id]
        found: list[list[procfs.Interface] | None] = [procfs.parse_dev(DEV), None]
        monkeypatch.setattr(stats, "interfaces", lambda _pod: found.pop(0))  # there is no process to read
        first = stats.network(pod)
        assert first is not None
        assert first.default_interface.name == "eth0"
        assert [one.name for one in first.interfaces] == ["net1:1"]
        assert stats.network(pod) == first

    play(scenario)


def test_a_pod_in_the_hosts_network_has_no_interfaces_of_its_own() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        pod_id = await worker.run_pod("p")
        pod = worker.node.store.pods[pod_id]
        pod.config.linux.security_context.namespace_options.network = pb.NamespaceMode.NODE
        container_id = await worker.create(pod_id)
        worker.node.store.containers[container_id].record.pid = os.getpid()
        assert worker.service.observing.stats.network(pod) is None

    play(scenario)


def test_metrics_have_the_labels_of_their_descriptors_and_only_what_is_chosen(tmp_path: Path) -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        pod_id, container_id = await node_with_groups(worker, tmp_path)
        listed = await worker.runtime.ListMetricDescriptors(pb.ListMetricDescriptorsRequest())
        labels = {one.name: len(one.label_keys) for one in listed.descriptors}
        answer = await worker.runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest())
        (pod,) = answer.pod_metrics
        (container,) = pod.container_metrics
        assert (pod.pod_sandbox_id, container.container_id) == (pod_id, container_id)
        for metric in (*pod.metrics, *container.metrics):
            assert len(metric.label_values) == labels[metric.name], metric.name
        values = {metric.name: metric.value.value for metric in container.metrics}
        assert values["container_cpu_usage_seconds_total"] == 3
        assert values["container_cpu_cfs_throttled_seconds_total"] == 5
        assert values["container_memory_working_set_bytes"] == 150
        assert values["container_memory_max_usage_bytes"] == 300
        assert values["container_processes"] == 2
        assert values["container_fs_usage_bytes"] == 4096
        assert values["container_fs_reads_total"] == 3
        assert values["container_oom_events_total"] == 1
        assert values["container_pressure_cpu_waiting_seconds_total"] == 4
        assert values["container_hugetlb_usage_bytes"] == 2097152
        assert "container_hugetlb_max_usage_bytes" not in values  # v2 does not know
        streamed = [
            one.pod_sandbox_id
            async for piece in worker.runtime.StreamPodSandboxMetrics(pb.StreamPodSandboxMetricsRequest())
            for one in piece.pod_sandbox_metrics
        ]
        assert streamed == [pod_id]

        worker.node.settings.pod_metrics = []
        few = await worker.runtime.ListPodSandboxMetrics(pb.ListPodSandboxMetricsRequest())
        (metric,) = few.pod_metrics[0].container_metrics[0].metrics
        assert metric.name == "container_last_seen"

    play(scenario, pod_metrics=list(POD_METRICS))


def test_an_oom_kill_counts_once_and_is_not_forgotten_with_its_container(tmp_path: Path) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        stats = worker.service.observing.stats
        _, seen = await node_with_groups(worker, tmp_path)
        _, unseen = await worker.running("unseen")
        assert [stats.look_for_oom(worker.node.store.containers[seen]) for _ in range(2)] == [1, 1]
        for container_id in (seen, unseen):
            world.monitors[container_id].end(137, oom=True)
            await worker.stop_container(container_id)
        assert stats.oom_kills == {seen: 1, unseen: 1}
        await worker.remove_container(seen)
        assert (stats.oom_kills, stats.oom_total) == ({unseen: 1}, 2)

    play(scenario)


def test_the_sampler_gives_a_rate_to_the_first_who_asks(tmp_path: Path) -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        pod_id, container_id = await node_with_groups(worker, tmp_path)
        stats = worker.service.observing.stats
        assert await stats._sample_all() == 2  # the pod and its container
        for key in (pod_id, container_id):
            stats._rates._samples[key].at -= 2 * SECOND
            stats._rates._samples[key].usage -= SECOND
        answer = await worker.runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest())
        linux = answer.stats[0].linux
        for cpu in (linux.cpu, linux.containers[0].cpu):
            assert cpu.usage_nano_cores.value == pytest.approx(SECOND // 2, rel=0.2)

    play(scenario)


def test_the_group_of_a_container_of_an_older_release_is_worked_out(tmp_path: Path) -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        _, container_id = await node_with_groups(worker, tmp_path)
        container = worker.node.store.containers[container_id]
        known = container.record.cgroup
        container.record.cgroup = ""
        assert worker.service.observing.stats.group(container) == known != ""
        assert pod_config("x").linux.cgroup_parent == ""

    play(scenario)


def test_counts_of_containers_are_told_by_name_and_lost_log_is_asked_for_now_and_then(tmp_path: Path) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        _, container_id = await node_with_groups(worker, tmp_path)
        await worker.running("quiet")
        world.monitors[container_id].log_bytes_dropped = 70
        info: Any = await worker.service.info(None, InfoGet())  # type: ignore[arg-type]  # no call is looked at
        assert [(one.pod, one.container, one.oom_kills) for one in info.counts] == [("p", "c", 1)]
        counts = worker.service.observing.counts
        await eventually(lambda: counts.dropped_total == 70)
        (count,) = counts.all()
        assert (count.oom_kills, count.log_bytes_dropped) == (1, 70)
        assert len(world.asked(monitor.StateGet)) == 2  # each running one, once in five minutes
        assert (info.oom_kills, info.operations, info.event_clients) == (1, 0, 0)
        await worker.remove_container(container_id)
        assert counts.all() == []
        assert counts.dropped_total == 70

    play(scenario)
