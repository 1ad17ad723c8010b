"""Runs in: cri. The table of CRI's metrics: what ListMetricDescriptors tells. Sans-IO.

Names, types and labels are those that cAdvisor gave to kubelets, since dashboards are made of them. A group
is what `metrics.pod_metrics` of the configuration chooses by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ipc.cri import api_pb2 as pb

BASE = ("id", "name", "image", "pod", "namespace", "container")
COUNTER, GAUGE = pb.MetricType.COUNTER, pb.MetricType.GAUGE
#: Always told, whatever is chosen.
ALWAYS = "always"


@dataclass(frozen=True)
class Descriptor:
    """One metric. `extra` are its labels after BASE."""

    name: str
    group: str
    type: Any
    help: str
    extra: tuple[str, ...] = ()


def _rows(group: str, type_: Any, extra: tuple[str, ...], *rows: tuple[str, str]) -> Iterator[Descriptor]:
    for name, help_ in rows:
        yield Descriptor(f"container_{name}", group, type_, help_, extra)


def _network(direction: str, verb: str) -> Iterator[Descriptor]:
    return _rows(
        "network",
        COUNTER,
        ("interface",),
        (f"network_{direction}_bytes_total", f"Bytes {verb}."),
        (f"network_{direction}_packets_total", f"Packets {verb}."),
        (f"network_{direction}_packets_dropped_total", f"Packets dropped that were to be {verb}."),
        (f"network_{direction}_errors_total", f"Errors while packets were {verb}."),
    )


def _pressure(resource: str) -> Iterator[Descriptor]:
    return _rows(
        "pressure",
        COUNTER,
        (),
        (f"pressure_{resource}_stalled_seconds_total", f"Time in which no task could go on for {resource}."),
        (f"pressure_{resource}_waiting_seconds_total", f"Time in which some task waited for {resource}."),
    )


TABLE: tuple[Descriptor, ...] = (
    *_rows(ALWAYS, GAUGE, (), ("last_seen", "When the container was last looked at, in Unix time.")),
    *_rows(
        "cpu",
        COUNTER,
        (),
        ("cpu_user_seconds_total", "CPU time in user mode."),
        ("cpu_system_seconds_total", "CPU time in the kernel."),
        ("cpu_usage_seconds_total", "CPU time."),
        ("cpu_cfs_periods_total", "Periods of the CPU quota that have passed."),
        ("cpu_cfs_throttled_periods_total", "Periods in which the quota was used up."),
        ("cpu_cfs_throttled_seconds_total", "Time for which the quota held the container back."),
    ),
    *_rows(
        "memory",
        GAUGE,
        (),
        ("memory_cache", "Bytes of page cache."),
        ("memory_rss", "Bytes of anonymous memory."),
        ("memory_kernel_usage", "Bytes of the kernel for the container."),
        ("memory_mapped_file", "Bytes of mapped files."),
        ("memory_swap", "Bytes of swap."),
        ("memory_usage_bytes", "Bytes in use, page cache and all."),
        ("memory_max_usage_bytes", "Most bytes there ever were in use."),
        ("memory_working_set_bytes", "Bytes in use that the kernel cannot simply take back."),
    ),
    *_rows("memory", COUNTER, (), ("memory_failcnt", "How often the limit was hit.")),
    *_rows(
        "memory",
        COUNTER,
        ("failure_type", "scope"),
        ("memory_failures_total", "Page faults."),
    ),
    *_rows(
        "disk",
        GAUGE,
        ("device",),
        ("fs_inodes_free", "Free inodes of the file system."),
        ("fs_inodes_total", "Inodes of the file system."),
        ("fs_limit_bytes", "Bytes that the file system holds."),
        ("fs_usage_bytes", "Bytes of the container's writable layer."),
    ),
    *_rows(
        "diskIO",
        COUNTER,
        ("device",),
        ("fs_reads_total", "Reads."),
        ("fs_writes_total", "Writes."),
        ("fs_reads_bytes_total", "Bytes read."),
        ("fs_writes_bytes_total", "Bytes written."),
    ),
    *_rows(
        "diskIO",
        COUNTER,
        ("device", "operation"),
        ("blkio_device_usage_total", "Bytes by device and operation."),
    ),
    *_network("receive", "received"),
    *_network("transmit", "sent"),
    *_rows(
        "hugetlb",
        GAUGE,
        ("pagesize",),
        ("hugetlb_usage_bytes", "Bytes of huge pages in use."),
        ("hugetlb_max_usage_bytes", "Most bytes of huge pages there ever were in use."),
    ),
    *_rows(
        "process",
        GAUGE,
        (),
        ("processes", "Processes."),
        ("threads", "Tasks, each thread one."),
        ("threads_max", "Most tasks there may be, 0 if there is no limit."),
        ("file_descriptors", "Open descriptors of all processes."),
        ("sockets", "Open sockets in the pod's network namespace."),
    ),
    *_rows(
        "process",
        GAUGE,
        ("ulimit",),
        ("ulimits_soft", "Soft limits of the first process, where it has any."),
    ),
    *_rows(
        "spec",
        GAUGE,
        (),
        ("start_time_seconds", "When the container was started, in Unix time."),
        ("spec_cpu_period", "Period of the CPU quota, in microseconds."),
        ("spec_cpu_quota", "CPU quota of a period, in microseconds."),
        ("spec_cpu_shares", "CPU shares."),
        ("spec_memory_limit_bytes", "Memory limit, 0 if there is none."),
        ("spec_memory_reservation_limit_bytes", "Memory that is protected, 0 if none is."),
        ("spec_memory_swap_limit_bytes", "Limit of memory and swap together, 0 if there is none."),
    ),
    *_rows("oom", COUNTER, (), ("oom_events_total", "Processes that the kernel killed for memory.")),
    *_pressure("cpu"),
    *_pressure("memory"),
    *_pressure("io"),
)
BY_NAME = {descriptor.name: descriptor for descriptor in TABLE}
GROUPS = tuple(dict.fromkeys(descriptor.group for descriptor in TABLE if descriptor.group != ALWAYS))


def chosen(groups: Collection[str]) -> frozenset[str]:
    """Names of the metrics of these groups, and of those that are always told."""
    return frozenset(one.name for one in TABLE if one.group in groups or one.group == ALWAYS)


def listed(groups: Collection[str]) -> pb.ListMetricDescriptorsResponse:
    """ListMetricDescriptors."""
    names = chosen(groups)
    return pb.ListMetricDescriptorsResponse(
        descriptors=[
            pb.MetricDescriptor(name=one.name, help=one.help, label_keys=[*BASE, *one.extra])
            for one in TABLE
            if one.name in names
        ]
    )
