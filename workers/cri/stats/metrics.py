"""Runs in: cri. ListPodSandboxMetrics: the values of the metrics of descriptors.py.

What a kernel or a container does not have (a pressure file, a device, a limit) has no value: it is left
out. What belongs to a pod's network namespace stands with the pod, everything else with its containers.
Values are whole numbers by CRI's definition: seconds are rounded down. Nothing is read for a group that is
not chosen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

from ipc.cri import api_pb2 as pb
from ipc.errors import RemoteError
from ipc.messages.storage import FsInfo, FsInfoGet, LayerUsage
from workers.cri.node import Node
from workers.cri.spec.pod import host_network
from workers.cri.state import HIDDEN, Container, Pod
from workers.cri.stats import procfs
from workers.cri.stats.cgroupfs import Memory, Psi
from workers.cri.stats.collect import LIVE, Stats
from workers.cri.stats.descriptors import ALWAYS, BY_NAME, chosen

SECOND = 1_000_000_000
FS_TIMEOUT = 1.0
#: Processes whose descriptors are counted; a container with more is not one that anybody looks at in figures.
MOST_PROCESSES = 1024
_NETWORK = (
    ("receive_bytes", "rx_bytes"),
    ("receive_packets", "rx_packets"),
    ("receive_packets_dropped", "rx_dropped"),
    ("receive_errors", "rx_errors"),
    ("transmit_bytes", "tx_bytes"),
    ("transmit_packets", "tx_packets"),
    ("transmit_packets_dropped", "tx_dropped"),
    ("transmit_errors", "tx_errors"),
)


class _Writer:
    """Adds the metrics that are chosen to a list."""

    def __init__(self, names: frozenset[str], base: list[str], into: Any) -> None:
        self._names, self._base, self._into = names, base, into

    def add(self, name: str, value: int | None, *extra: str, at: int = 0) -> None:
        """Add a value, if there is one; `at`: when it was read, 0 for now."""
        name = f"container_{name}"
        if value is not None and name in self._names:
            metric = self._into.add(name=name, metric_type=BY_NAME[name].type, timestamp=at)
            metric.label_values.extend((*self._base, *extra))
            metric.value.value = max(0, value)


class Metrics:
    """Values of metrics."""

    def __init__(self, node: Node, stats: Stats) -> None:
        self._node = node
        self._stats = stats
        self._parts: dict[str, Callable[[_Writer, Container], None]] = {
            ALWAYS: self._last_seen,
            "cpu": self._cpu,
            "memory": self._memory,
            "diskIO": self._io,
            "hugetlb": self._huge,
            "process": self._process,
            "spec": self._spec,
            "oom": self._oom,
            "pressure": self._pressure,
        }

    async def each(self) -> AsyncIterator[pb.PodSandboxMetrics]:
        """The metrics of every pod; the loop turns between them."""
        groups = self._node.settings.pod_metrics
        names = chosen(groups)
        layers = await self._stats.layers.all(self._stats.live()) if "disk" in groups else {}
        disk = await self._fs_info() if "disk" in groups else None
        for pod in self._node.store.match_pods(""):
            if pod.phase not in HIDDEN:
                yield self._pod(pod, groups, names, layers, disk)
                await asyncio.sleep(0)

    async def _fs_info(self) -> FsInfo | None:
        try:
            return await self._node.peers.storage.call(FsInfoGet(), timeout=FS_TIMEOUT)
        except RemoteError:
            return None

    def _pod(
        self,
        pod: Pod,
        groups: Collection[str],
        names: frozenset[str],
        layers: dict[str, LayerUsage],
        disk: FsInfo | None,
    ) -> pb.PodSandboxMetrics:
        answer = pb.PodSandboxMetrics(pod_sandbox_id=pod.id)
        writer = _Writer(names, _labels_of_pod(pod), answer.metrics)
        writer.add("last_seen", time.time_ns() // SECOND)
        if "network" in groups:
            self._network(writer, pod)
        for container in self._node.store.containers_of(pod.id):
            if container.phase in LIVE and not container.record.sandbox:
                own = answer.container_metrics.add(container_id=container.id)
                writer = _Writer(names, _labels(pod, container), own.metrics)
                for group in (ALWAYS, *groups):
                    if group in self._parts:
                        self._parts[group](writer, container)
                if "process" in groups:
                    self._sockets(writer, pod, container)
                if disk is not None:
                    _disk(writer, layers.get(container.id), disk)
        return answer

    def _network(self, writer: _Writer, pod: Pod) -> None:
        for interface in self._stats.interfaces(pod) or ():
            for name, field in _NETWORK:
                writer.add(f"network_{name}_total", getattr(interface, field), interface.name)

    # -- parts of a container -------------------------------------------------------------------------

    def _last_seen(self, writer: _Writer, _container: Container) -> None:
        writer.add("last_seen", time.time_ns() // SECOND)

    def _cpu(self, writer: _Writer, container: Container) -> None:
        cpu = self._stats.cgroups.cpu(self._stats.group(container))
        if cpu is not None:
            writer.add("cpu_user_seconds_total", cpu.user // SECOND)
            writer.add("cpu_system_seconds_total", cpu.system // SECOND)
            writer.add("cpu_usage_seconds_total", cpu.usage // SECOND)
            writer.add("cpu_cfs_periods_total", cpu.periods)
            writer.add("cpu_cfs_throttled_periods_total", cpu.throttled)
            writer.add("cpu_cfs_throttled_seconds_total", cpu.throttled_time // SECOND)

    def _memory(self, writer: _Writer, container: Container) -> None:
        group = self._stats.group(container)
        memory = self._stats.cgroups.memory(group)
        if memory is None:
            return
        _add_memory(writer, memory)
        failcnt, max_usage = self._stats.cgroups.memory_extremes(group)
        writer.add("memory_failcnt", failcnt)
        writer.add("memory_max_usage_bytes", max_usage)

    def _io(self, writer: _Writer, container: Container) -> None:
        for device, io in self._stats.cgroups.io(self._stats.group(container)).items():
            writer.add("fs_reads_total", io.reads, device)
            writer.add("fs_writes_total", io.writes, device)
            writer.add("fs_reads_bytes_total", io.read_bytes, device)
            writer.add("fs_writes_bytes_total", io.written_bytes, device)
            writer.add("blkio_device_usage_total", io.read_bytes, device, "Read")
            writer.add("blkio_device_usage_total", io.written_bytes, device, "Write")

    def _huge(self, writer: _Writer, container: Container) -> None:
        for size, (usage, most) in self._stats.cgroups.huge_pages(self._stats.group(container)).items():
            writer.add("hugetlb_usage_bytes", usage, size)
            writer.add("hugetlb_max_usage_bytes", most, size)

    def _process(self, writer: _Writer, container: Container) -> None:
        group = self._stats.group(container)
        pids = self._stats.cgroups.processes(group)
        if pids is not None:
            writer.add("processes", len(pids))
            writer.add("file_descriptors", _descriptors(pids))
        tasks = self._stats.cgroups.tasks(group)
        if tasks is not None:
            writer.add("threads", tasks)
            writer.add("threads_max", self._stats.cgroups.tasks_limit(group) or 0)
        writer.add("ulimits_soft", procfs.open_files_limit(container.record.pid), "max_open_files")

    def _sockets(self, writer: _Writer, pod: Pod, container: Container) -> None:
        if not host_network(pod.config) and container.record.pid:
            writer.add("sockets", procfs.sockets(container.record.pid))

    def _spec(self, writer: _Writer, container: Container) -> None:
        told = container.config.linux.resources
        writer.add("start_time_seconds", container.record.started_at_ns // SECOND)
        writer.add("spec_cpu_period", told.cpu_period)
        if told.cpu_quota > 0:
            writer.add("spec_cpu_quota", told.cpu_quota)
        writer.add("spec_cpu_shares", told.cpu_shares)
        writer.add("spec_memory_limit_bytes", told.memory_limit_in_bytes)
        protected = told.unified.get("memory.min") or told.unified.get("memory.low") or "0"
        writer.add("spec_memory_reservation_limit_bytes", int(protected) if protected.isdecimal() else 0)
        writer.add("spec_memory_swap_limit_bytes", told.memory_swap_limit_in_bytes)

    def _oom(self, writer: _Writer, container: Container) -> None:
        writer.add("oom_events_total", self._stats.look_for_oom(container))

    def _pressure(self, writer: _Writer, container: Container) -> None:
        group = self._stats.group(container)
        for resource in ("cpu", "memory", "io"):
            psi = self._stats.cgroups.pressure(group, resource)
            if psi is not None:
                _add_pressure(writer, resource, psi)


def _add_memory(writer: _Writer, memory: Memory) -> None:
    writer.add("memory_cache", memory.cache)
    writer.add("memory_rss", memory.rss)
    writer.add("memory_kernel_usage", memory.kernel)
    writer.add("memory_mapped_file", memory.mapped)
    writer.add("memory_swap", memory.swap)
    writer.add("memory_usage_bytes", memory.usage)
    writer.add("memory_working_set_bytes", memory.working_set)
    for scope in ("container", "hierarchy"):  # of a container they are the same
        writer.add("memory_failures_total", memory.faults, "pgfault", scope)
        writer.add("memory_failures_total", memory.major_faults, "pgmajfault", scope)


def _add_pressure(writer: _Writer, resource: str, psi: Psi) -> None:
    for word, pressure in (("waiting", psi.some), ("stalled", psi.full)):
        if pressure is not None:
            writer.add(f"pressure_{resource}_{word}_seconds_total", pressure.total // 1_000_000)


def _disk(writer: _Writer, layer: LayerUsage | None, disk: FsInfo) -> None:
    device = disk.device or disk.mountpoint
    writer.add("fs_inodes_free", disk.inodes_free, device)
    writer.add("fs_inodes_total", disk.inodes, device)
    writer.add("fs_limit_bytes", disk.capacity_bytes, device)
    if layer is not None:
        writer.add("fs_usage_bytes", layer.used_bytes, device, at=layer.timestamp_ns)


def _descriptors(pids: list[int]) -> int | None:
    counts = [procfs.descriptors(pid) for pid in pids[:MOST_PROCESSES]]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _labels_of_pod(pod: Pod) -> list[str]:
    meta = pod.config.metadata
    name = f"k8s_POD_{meta.name}_{meta.namespace}_{meta.uid}_{meta.attempt}"
    return [pod.id, name, "", meta.name, meta.namespace, ""]


def _labels(pod: Pod, container: Container) -> list[str]:
    meta, own = pod.config.metadata, container.config.metadata
    name = f"k8s_{own.name}_{meta.name}_{meta.namespace}_{meta.uid}_{own.attempt}"
    return [container.id, name, container.record.image_name, meta.name, meta.namespace, own.name]
