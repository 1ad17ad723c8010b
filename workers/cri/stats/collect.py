"""Runs in: cri. ContainerStats, PodSandboxStats and their lists.

A pod's figures are those of its own cgroup if it has one to itself, else the sum of its containers'. Its
network is read through any of its processes; while it has none, the last reading stands, with its time. A
pod in the host's network has no interfaces of its own: those are the node's figures. Owns the samples for
CPU rates.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable

from ipc.cri import api_pb2 as pb
from ipc.messages.storage import LayerUsage
from workers.cri.node import Node
from workers.cri.spec import cgroups
from workers.cri.spec.pod import host_network
from workers.cri.state import Container, Phase, Pod
from workers.cri.stats import cgroupfs, procfs
from workers.cri.stats.cgroupfs import Cgroups, Memory, Psi
from workers.cri.stats.layers import Layers
from workers.cri.stats.rates import Rates
from workers.cri.views import has_labels

LIVE = frozenset({Phase.CREATED, Phase.RUNNING})
#: Seconds between samples of all groups; more groups make it longer, so that it takes a thousandth of a core.
PERIOD, PER_GROUP = 10.0, 0.02
SLICE = 50  # groups that are sampled at a time
#: ns; of a group that is younger, all it has used is a rate of now.
YOUNG = 60_000_000_000
PREFERRED = "eth0"


class Stats:
    """Reads figures and puts them into CRI's words."""

    def __init__(self, node: Node, mount: str = cgroupfs.MOUNT) -> None:
        self._node = node
        self._store = node.store
        self.cgroups = Cgroups(mount)
        self.layers = Layers(node)
        #: OOM kills of every container that is there, as they were last seen, and of all there ever were.
        self.oom_kills: dict[str, int] = {}
        self.oom_total = 0
        self._rates = Rates()
        self._networks: dict[str, pb.NetworkUsage] = {}

    def live(self) -> list[Container]:
        """Containers that clients see and that have a cgroup."""
        everybody = self._store.containers.values()
        return [one for one in everybody if one.phase in LIVE and not one.record.sandbox]

    # -- groups ---------------------------------------------------------------------------------------

    def group(self, container: Container) -> str:
        """The container's cgroup."""
        if container.record.cgroup:
            return container.record.cgroup
        pod = self._store.pods.get(container.record.pod_id)
        parent = "" if pod is None else pod.config.linux.cgroup_parent
        settings = self._node.settings
        driver, default = settings.cgroup_driver, settings.default_cgroup_parent
        return cgroups.cgroup_path(driver, parent, default, container.id).relative

    def pod_group(self, pod: Pod, shared: Counter[str] | None = None) -> str:
        """The pod's own cgroup; "" if it has none, or shares it with other pods."""
        parent = pod.config.linux.cgroup_parent
        if not parent or (shared or self.parents())[parent] > 1:
            return ""
        if self._node.settings.cgroup_driver == "systemd":
            return cgroups.expand_slice(cgroups.to_slice(parent))
        return cgroups.to_path(parent)

    def parents(self) -> Counter[str]:
        """How many pods name each cgroup parent."""
        return Counter(pod.config.linux.cgroup_parent for pod in self._store.pods.values())

    # -- containers -----------------------------------------------------------------------------------

    async def container(self, container: Container) -> pb.ContainerStats:
        """Stats of one container. Of one that has ended only its writable layer is left."""
        layers = await self.layers.all([container])
        return self.container_stats(container, layers.get(container.id))

    def container_stats(self, container: Container, layer: LayerUsage | None) -> pb.ContainerStats:
        """Stats of one container."""
        config = container.config
        stats = pb.ContainerStats(
            attributes=pb.ContainerAttributes(
                id=container.id,
                metadata=config.metadata,
                labels=config.labels,
                annotations=config.annotations,
            ),
        )
        if layer is not None:
            stats.writable_layer.CopyFrom(self.layer_usage(layer))
        if container.phase in LIVE:
            self._add_usage(stats, container)
        return stats

    def _add_usage(self, stats: pb.ContainerStats, container: Container) -> None:
        group, now = self.group(container), time.time_ns()
        self._add_cpu(stats.cpu, container.id, group, now, self._born(container))
        memory = self.cgroups.memory(group)
        if memory is not None:
            _set_memory(stats.memory, memory, now)
            if memory.swap is not None:
                _set_swap(stats.swap, memory, now)
        if self.cgroups.v2:
            _set_psi(stats.memory.psi, self.cgroups.pressure(group, "memory"))
            _set_io(stats.io, self.cgroups.pressure(group, "io"), now)

    def _born(self, container: Container) -> int | None:
        """When a young container was started, on the monotonic clock."""
        started = container.record.started_at_ns
        age = time.time_ns() - started
        return time.monotonic_ns() - age if started and 0 <= age < YOUNG else None

    def _add_cpu(self, cpu: pb.CpuUsage, key: str, group: str, now: int, born: int | None = None) -> None:
        usage = self.cgroups.cpu_usage(group)
        if usage is None:
            return
        cpu.timestamp, cpu.usage_core_nano_seconds.value = now, usage
        rate = self._rates.observe(key, time.monotonic_ns(), usage, born=born)
        if rate is not None:
            cpu.usage_nano_cores.value = rate
        if self.cgroups.v2:
            _set_psi(cpu.psi, self.cgroups.pressure(group, "cpu"))

    def layer_usage(self, layer: LayerUsage) -> pb.FilesystemUsage:
        """A writable layer in CRI's words."""
        return pb.FilesystemUsage(
            timestamp=layer.timestamp_ns,
            fs_id=pb.FilesystemIdentifier(mountpoint=self._node.settings.root),
            used_bytes=pb.UInt64Value(value=layer.used_bytes),
            inodes_used=pb.UInt64Value(value=layer.used_inodes),
        )

    # -- pods -----------------------------------------------------------------------------------------

    async def pod(self, pod: Pod) -> pb.PodSandboxStats:
        """Stats of one pod with those of its containers."""
        layers = await self.layers.all(self._store.containers_of(pod.id))
        return self.pod_stats(pod, layers, self.parents())

    def pod_stats(self, pod: Pod, layers: dict[str, LayerUsage], shared: Counter[str]) -> pb.PodSandboxStats:
        """Stats of one pod; `shared` from `parents`."""
        config = pod.config
        stats = pb.PodSandboxStats(
            attributes=pb.PodSandboxAttributes(
                id=pod.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
            ),
        )
        linux = stats.linux
        live = [one for one in self._store.containers_of(pod.id) if one.phase in LIVE]
        for container in live:
            if not container.record.sandbox:
                linux.containers.append(self.container_stats(container, layers.get(container.id)))
        group = self.pod_group(pod, shared)
        if group and pod.phase is Phase.READY:
            self._add_pod_group(linux, pod, group)
        elif live:
            self._add_sum(linux, live)
        network = self.network(pod)
        if network is not None:
            linux.network.CopyFrom(network)
        return stats

    def _add_pod_group(self, linux: pb.LinuxPodSandboxStats, pod: Pod, group: str) -> None:
        now = time.time_ns()
        self._add_cpu(linux.cpu, pod.id, group, now)
        memory = self.cgroups.memory(group)
        if memory is not None:
            _set_memory(linux.memory, memory, now)
        tasks = self.cgroups.tasks(group)
        if tasks is not None:
            linux.process.timestamp, linux.process.process_count.value = now, tasks
        if self.cgroups.v2:
            _set_psi(linux.memory.psi, self.cgroups.pressure(group, "memory"))
            _set_io(linux.io, self.cgroups.pressure(group, "io"), now)

    def _add_sum(self, linux: pb.LinuxPodSandboxStats, live: list[Container]) -> None:
        """A pod without a cgroup of its own: what its containers use, its sandbox container too."""
        now = time.time_ns()
        parts = list(linux.containers)
        for container in live:
            if container.record.sandbox:
                self._add_usage(part := pb.ContainerStats(), container)
                parts.append(part)
        if any(part.cpu.timestamp for part in parts):
            _sum_cpu(linux.cpu, parts, now)
        if any(part.memory.timestamp for part in parts):
            _sum_memory(linux.memory, parts, now)
        counts = [self.cgroups.tasks(self.group(container)) for container in live]
        if any(count is not None for count in counts):
            linux.process.timestamp = now
            linux.process.process_count.value = sum(count or 0 for count in counts)

    # -- networks -------------------------------------------------------------------------------------

    def interfaces(self, pod: Pod) -> list[procfs.Interface] | None:
        """The counters of the pod's interfaces, of now; None if it has no process, or the host's network."""
        if pod.phase is not Phase.READY or host_network(pod.config):
            return None
        for pid in self.pids(pod):
            found = procfs.interfaces(pid)
            if found is not None:
                return found
        return None

    def pids(self, pod: Pod) -> Iterable[int]:
        """Processes in the pod's network namespace; the pod's built-in init is not in it."""
        for container in self._store.containers_of(pod.id):
            if container.phase in LIVE and container.record.pid:
                yield container.record.pid

    def network(self, pod: Pod) -> pb.NetworkUsage | None:
        """CRI's network stats of a pod."""
        found = self.interfaces(pod)
        if found:
            self._networks[pod.id] = _network(found)
        elif pod.phase is not Phase.READY:
            self._networks.pop(pod.id, None)
        return self._networks.get(pod.id)

    # -- the sampler ----------------------------------------------------------------------------------

    async def sample(self) -> None:
        """For ever: a sample of every live group, now and then."""
        while True:
            groups = await self._sample_all()
            await asyncio.sleep(max(PERIOD, groups * PER_GROUP))

    async def _sample_all(self) -> int:
        live = [one for one in self._store.containers.values() if one.phase in LIVE]
        shared = self.parents()
        pods = [pod for pod in self._store.pods.values() if pod.phase is Phase.READY]
        groups = {one.id: self.group(one) for one in live}
        groups |= {pod.id: group for pod in pods if (group := self.pod_group(pod, shared))}
        for number, (key, group) in enumerate(groups.items()):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            usage = self.cgroups.cpu_usage(group)
            if usage is not None:
                self._rates.observe(key, time.monotonic_ns(), usage)
        for container in live:
            self.look_for_oom(container)
        self._rates.keep(groups.keys())
        return len(groups)

    def look_for_oom(self, container: Container) -> int:
        """How many of the container's processes the kernel has killed for its memory."""
        seen = self.oom_kills.get(container.id, 0)
        if container.phase in LIVE:
            seen = max(seen, self.cgroups.oom_kills(self.group(container)) or 0)
        elif container.record.exit is not None and container.record.exit.oom_killed:
            seen = max(seen, 1)
        if seen:
            self.oom_total += seen - self.oom_kills.get(container.id, 0)
            self.oom_kills[container.id] = seen
        return seen

    def changed(self, subject: Pod | Container, *, gone: bool) -> None:
        """Told by the store: the end of a container may have been by OOM, and what is gone is forgotten."""
        if gone:
            self.oom_kills.pop(subject.id, None)
            self._networks.pop(subject.id, None)
        elif isinstance(subject, Container) and subject.phase is Phase.EXITED:
            self.look_for_oom(subject)


# -- in CRI's words ---------------------------------------------------------------------------------------


def _set_memory(usage: pb.MemoryUsage, memory: Memory, now: int) -> None:
    usage.timestamp = now
    usage.working_set_bytes.value = memory.working_set
    usage.usage_bytes.value = memory.usage
    usage.rss_bytes.value = memory.rss
    usage.page_faults.value = memory.faults
    usage.major_page_faults.value = memory.major_faults
    if memory.limit is not None:
        usage.available_bytes.value = max(0, memory.limit - memory.working_set)


def _set_swap(usage: pb.SwapUsage, memory: Memory, now: int) -> None:
    swap = memory.swap or 0
    usage.timestamp = now
    usage.swap_usage_bytes.value = swap
    if memory.swap_limit is not None:
        usage.swap_available_bytes.value = max(0, memory.swap_limit - swap)


def _set_psi(stats: pb.PsiStats, psi: Psi | None) -> None:
    if psi is None:
        return
    for field, pressure in (("Some", psi.some), ("Full", psi.full)):
        if pressure is not None:
            data = getattr(stats, field)
            data.Total = pressure.total * 1000
            data.Avg10, data.Avg60, data.Avg300 = pressure.avg10, pressure.avg60, pressure.avg300


def _set_io(usage: pb.IoUsage, psi: Psi | None, now: int) -> None:
    if psi is not None:
        usage.timestamp = now
        _set_psi(usage.psi, psi)


def _sum_cpu(cpu: pb.CpuUsage, parts: list[pb.ContainerStats], now: int) -> None:
    cpu.timestamp = now
    cpu.usage_core_nano_seconds.value = sum(part.cpu.usage_core_nano_seconds.value for part in parts)
    if all(part.cpu.HasField("usage_nano_cores") for part in parts):
        cpu.usage_nano_cores.value = sum(part.cpu.usage_nano_cores.value for part in parts)


def _sum_memory(memory: pb.MemoryUsage, parts: list[pb.ContainerStats], now: int) -> None:
    memory.timestamp = now
    for name in ("working_set_bytes", "usage_bytes", "rss_bytes", "page_faults", "major_page_faults"):
        getattr(memory, name).value = sum(getattr(part.memory, name).value for part in parts)


def _network(found: list[procfs.Interface]) -> pb.NetworkUsage:
    """eth0 is a pod's own interface by custom; without one, the first."""
    default = next((one for one in found if one.name == PREFERRED), found[0])
    return pb.NetworkUsage(
        timestamp=time.time_ns(),
        default_interface=_interface(default),
        interfaces=[_interface(one) for one in found if one is not default],
    )


def _interface(one: procfs.Interface) -> pb.NetworkInterfaceUsage:
    return pb.NetworkInterfaceUsage(
        name=one.name,
        rx_bytes=pb.UInt64Value(value=one.rx_bytes),
        rx_errors=pb.UInt64Value(value=one.rx_errors),
        tx_bytes=pb.UInt64Value(value=one.tx_bytes),
        tx_errors=pb.UInt64Value(value=one.tx_errors),
    )


def wanted_container(stats_of: Container, wanted: pb.ContainerStatsFilter, pod_id: str) -> bool:
    """Whether a live container passes a filter; `pod_id` is what its pod's prefix means."""
    if stats_of.phase not in LIVE or (wanted.pod_sandbox_id and stats_of.record.pod_id != pod_id):
        return False
    return has_labels(stats_of.config.labels, wanted.label_selector)
