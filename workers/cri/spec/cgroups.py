"""Runs in: cri. Names of cgroups and the `resources` of the OCI runtime-spec.

Owns both spellings of a pod's cgroup: a path for cgroupfs ("/kubepods/burstable/podX"), a slice for systemd
("kubepods-burstable-podX.slice"), whichever the client used. Zero and empty limits mean "not set"; refused
is what the node's cgroup version cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ipc.cri import api_pb2
from ipc.errors import invalid, precondition
from ipc.messages.supervisor import HostInfo

from . import validate
from .notes import Notes

PREFIX = "bulkhead"
_SLICE = ".slice"
_DEFAULT_PARENT = {"systemd": "system.slice", "cgroupfs": f"/{PREFIX}"}
_INT64_MAX = 2**63 - 1
#: Less than this cannot start a process: the runtime's own first steps are counted too.
MIN_MEMORY_BYTES = 512 * 1024


@dataclass(frozen=True)
class CgroupPath:
    """`oci` goes into linux.cgroupsPath; `relative` is where the group is, below each hierarchy's root."""

    oci: str
    relative: str


def cgroup_path(driver: str, parent: str, default_parent: str, container_id: str) -> CgroupPath:
    """The container's cgroup below its pod's."""
    parent = _chosen(driver, parent, default_parent)
    if driver == "systemd":
        slice_name = to_slice(parent)
        unit = f"{PREFIX}-{container_id}.scope"
        return CgroupPath(f"{slice_name}:{PREFIX}:{container_id}", f"{expand_slice(slice_name)}/{unit}")
    path = f"{to_path(parent)}/{PREFIX}-{container_id}"
    return CgroupPath(path, path)


def pod_group(driver: str, parent: str, default_parent: str) -> str:
    """Where a pod's processes are, below each hierarchy's root, whatever the spelling of its parent."""
    parent = _chosen(driver, parent, default_parent)
    return expand_slice(to_slice(parent)) if driver == "systemd" else to_path(parent)


def _chosen(driver: str, parent: str, default_parent: str) -> str:
    parent = parent or default_parent or _DEFAULT_PARENT[driver]
    validate.texts("cgroup_parent", [parent])
    return parent


def relative(driver: str, oci: str) -> str:
    """Where a group is that the runtime-spec names in the driver's own way. Raises RemoteError."""
    if driver == "systemd":
        slice_name, prefix, name = [*oci.split(":"), "", ""][:3]
        if oci.count(":") != 2 or not prefix or not name:
            raise invalid(f"cgroups path: {oci!r} is not of the form slice:prefix:name")
        return f"{expand_slice(slice_name)}/{prefix}-{name}.scope"
    if not oci.startswith("/"):
        raise invalid(f"cgroups path: {oci!r} is not absolute")
    return to_path(oci)


def to_slice(parent: str) -> str:
    """The name of the slice: the last part of a path of slices, or a cgroupfs path in systemd's spelling."""
    parts = _parts(parent)
    if not parts:
        return "-.slice"
    if parts[-1].endswith(_SLICE):
        return parts[-1]
    # a dash separates levels in the name of a slice, so one in a level's own name becomes an underscore
    return "-".join(part.replace("-", "_") for part in parts) + _SLICE


def expand_slice(name: str) -> str:
    """Where systemd puts a slice: a-b.slice is /a.slice/a-b.slice (systemd.slice(5))."""
    stem = name.removesuffix(_SLICE)
    if stem == "-":
        return ""
    levels = stem.split("-")
    if not name.endswith(_SLICE) or "" in levels:
        raise invalid(f"cgroup_parent: {name!r} is not the name of a slice")
    return "".join(f"/{'-'.join(levels[: depth + 1])}{_SLICE}" for depth in range(len(levels)))


def to_path(parent: str) -> str:
    """The path, without a trailing slash; a lone slice stands where systemd would have put it."""
    parts = _parts(parent)
    if len(parts) == 1 and parts[0].endswith(_SLICE):
        return expand_slice(parts[0])
    return "".join(f"/{part}" for part in parts)


def _parts(parent: str) -> list[str]:
    parts = [part for part in parent.split("/") if part not in {"", "."}]
    if ".." in parts or any(":" in part or not part.isprintable() for part in parts):
        raise invalid(f"cgroup_parent: {parent!r} is not the name of a cgroup")
    return parts


def resources(request: api_pb2.LinuxContainerResources, host: HostInfo, notes: Notes) -> dict[str, Any]:
    """cpu, memory, hugepageLimits and unified; what is not set is not there."""
    parts = {
        "cpu": _cpu(request),
        "memory": _memory(request, host, notes),
        "hugepageLimits": _hugepages(request, host),
        "unified": _unified(request, host),
    }
    return {key: value for key, value in parts.items() if value}


def _cpu(request: api_pb2.LinuxContainerResources) -> dict[str, Any]:
    if request.cpu_quota < -1:
        raise invalid(f"cpu_quota: {request.cpu_quota} is neither a time nor -1 for no limit")
    values = {
        "shares": validate.not_negative("cpu_shares", request.cpu_shares),
        "quota": max(0, request.cpu_quota),  # a new group has none, and crun 1.8 cannot write -1
        "period": validate.not_negative("cpu_period", request.cpu_period),
        "cpus": validate.cpuset("cpuset_cpus", request.cpuset_cpus),
        "mems": validate.cpuset("cpuset_mems", request.cpuset_mems),
    }
    return {key: value for key, value in values.items() if value}


def _memory(request: api_pb2.LinuxContainerResources, host: HostInfo, notes: Notes) -> dict[str, Any]:
    limit, both = request.memory_limit_in_bytes, request.memory_swap_limit_in_bytes
    for what, number in (("memory_limit_in_bytes", limit), ("memory_swap_limit_in_bytes", both)):
        if number < -1:
            raise invalid(f"{what}: {number} is neither a size nor -1 for no limit")
    if 0 < limit < MIN_MEMORY_BYTES:
        raise invalid(f"memory_limit_in_bytes: {limit} is too little to start a process in")
    if both and not limit:
        raise invalid(
            "memory_swap_limit_in_bytes is memory and swap together: it needs memory_limit_in_bytes"
        )
    if 0 < both < limit:
        raise invalid("memory_swap_limit_in_bytes is memory and swap together: it is below the memory limit")
    if both and not host.swap:
        if both > limit:
            notes.add("the swap limit has no effect: this node has no swap to limit")
        both = 0
    values = {"limit": limit, "swap": both}
    return {key: value for key, value in values.items() if value}


def _hugepages(request: api_pb2.LinuxContainerResources, host: HostInfo) -> list[dict[str, Any]]:
    """Kubelets send a limit of zero for each size with every container; that alone asks for nothing."""
    if not any(limit.limit for limit in request.hugepage_limits):
        return []
    if "hugetlb" not in host.cgroup_controllers:
        raise precondition("hugepage_limits: this node has no hugetlb cgroup controller")
    return [
        {"pageSize": validate.page_size(each.page_size), "limit": min(each.limit, _INT64_MAX)}
        for each in request.hugepage_limits
    ]


def _unified(request: api_pb2.LinuxContainerResources, host: HostInfo) -> dict[str, str]:
    if request.unified and host.cgroup_version != 2:
        raise precondition("unified: this node has cgroup v1, which has no such files")
    for key in request.unified:
        if "/" in key or not key.isprintable() or "." not in key:
            raise invalid(f"unified: {key!r} is not the name of a cgroup file")
    return dict(request.unified)


#: Limits of cgroup v2 that systemd manages, by their files. It writes its own values over a runtime's when
#: it loads its units anew, and older runtimes (crun 1.8) tell it of none of them but the weight.
_PROPERTIES = {
    "memory.max": "MemoryMax",
    "memory.high": "MemoryHigh",
    "memory.low": "MemoryLow",
    "memory.min": "MemoryMin",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
    "cpu.weight": "CPUWeight",
}
_INFINITY = 2**64 - 1
_DEFAULT_PERIOD = 100_000  # microseconds
_QUOTA_STEP = 10_000  # systemd keeps whole percents of a CPU


def unit_properties(limits: Mapping[str, Any], host: HostInfo) -> dict[str, int]:
    """Limits that `resources` made as properties of the container's scope (org.freedesktop.systemd1)."""
    if host.cgroup_driver != "systemd":
        return {}
    if host.cgroup_version != 2:
        return _cpu_properties(limits.get("cpu", {})) | _memory_of_v1(limits.get("memory", {}))
    memory, unified = limits.get("memory", {}), limits.get("unified", {})
    found = _cpu_properties(limits.get("cpu", {}))
    if limit := memory.get("limit"):
        found["MemoryMax"] = _unsigned(limit)
    if swap := memory.get("swap"):
        found["MemorySwapMax"] = _INFINITY if swap < 0 else swap - max(memory.get("limit", 0), 0)
    texts = {name: unified[file].strip() for file, name in _PROPERTIES.items() if file in unified}
    known = {name: text for name, text in texts.items() if text == "max" or text.isdecimal()}
    return found | {name: _INFINITY if text == "max" else int(text) for name, text in known.items()}


def _memory_of_v1(memory: Mapping[str, int]) -> dict[str, int]:
    """On cgroup v1 systemd knows the limit of memory, by another name, and nothing of swap."""
    return {"MemoryLimit": _unsigned(memory["limit"])} if memory.get("limit") else {}


def _cpu_properties(cpu: Mapping[str, int]) -> dict[str, int]:
    quota, period = cpu.get("quota", 0), cpu.get("period", 0)
    found = {"CPUQuotaPeriodUSec": period} if period else {}
    if quota < 0:
        found["CPUQuotaPerSecUSec"] = _INFINITY
    elif quota:
        steps = -(-quota * 1_000_000 // ((period or _DEFAULT_PERIOD) * _QUOTA_STEP))
        found["CPUQuotaPerSecUSec"] = steps * _QUOTA_STEP
    return found


def _unsigned(limit: int) -> int:
    return _INFINITY if limit < 0 else limit
