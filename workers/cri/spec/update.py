"""Runs in: cri. UpdateContainerResources: what holds of the old limits, and what the new spec is.

Sans-IO. Owns the merge: a field that is zero or empty was not sent, so it stays as it is; `unified` and huge
pages are merged by key. Refuses what `cgroups.resources` refuses of a new container.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ipc.cri import api_pb2
from ipc.errors import invalid
from ipc.messages.supervisor import HostInfo

from . import cgroups, process
from .notes import Notes

_SCALARS = (
    "cpu_period",
    "cpu_quota",
    "cpu_shares",
    "memory_limit_in_bytes",
    "oom_score_adj",
    "cpuset_cpus",
    "cpuset_mems",
    "memory_swap_limit_in_bytes",
)
#: What an update may replace in linux.resources; devices are none of it.
_PARTS = ("cpu", "memory", "hugepageLimits", "unified")


@dataclass(frozen=True)
class Update:
    """What the monitor is told. `oom_score` None: it was not asked for. Properties: see `cgroups`."""

    resources: bytes
    spec: bytes
    oom_score: int | None
    unit_properties: dict[str, int]
    degraded: tuple[str, ...]


def merged(
    old: api_pb2.LinuxContainerResources, asked: api_pb2.LinuxContainerResources
) -> api_pb2.LinuxContainerResources:
    """The limits that hold after the update."""
    new = api_pb2.LinuxContainerResources()
    new.CopyFrom(old)
    for name in _SCALARS:
        if value := getattr(asked, name):
            setattr(new, name, value)
    _keep_order(new, asked)
    pages = {limit.page_size: limit.limit for limit in [*old.hugepage_limits, *asked.hugepage_limits]}
    del new.hugepage_limits[:]
    new.hugepage_limits.extend(
        api_pb2.HugepageLimit(page_size=size, limit=limit) for size, limit in pages.items()
    )
    for key, value in asked.unified.items():
        new.unified[key] = value
    return new


def _keep_order(new: api_pb2.LinuxContainerResources, asked: api_pb2.LinuxContainerResources) -> None:
    """Memory alone was raised over the old limit of memory and swap together: that one goes with it."""
    both = new.memory_swap_limit_in_bytes
    if not asked.memory_swap_limit_in_bytes and 0 < both < new.memory_limit_in_bytes:
        new.memory_swap_limit_in_bytes = new.memory_limit_in_bytes


def update(
    spec: bytes,
    new: api_pb2.LinuxContainerResources,
    asked: api_pb2.LinuxContainerResources,
    host: HostInfo,
    beyond: Mapping[str, Any] | None = None,
) -> Update:
    """What is to be done for limits that `merged` made, and for those that CRI has no fields for.

    Raises RemoteError.
    """
    notes = Notes()
    limits = cgroups.resources(new, host, notes)
    for part, values in (beyond or {}).items():
        limits[part] = {**limits.get(part, {}), **values}
    told = limits if new.cpu_quota >= 0 else limits | {"cpu": limits.get("cpu", {}) | {"quota": -1}}
    decoded: dict[str, Any] = msgspec.json.decode(spec)
    kept = {key: value for key, value in decoded["linux"]["resources"].items() if key not in _PARTS}
    decoded["linux"]["resources"] = kept | limits
    score = process.oom_score_of(new.oom_score_adj, host, notes) if asked.oom_score_adj else None
    if score is not None:
        decoded["process"]["oomScoreAdj"] = score
    return Update(
        resources=msgspec.json.encode(told),
        spec=msgspec.json.encode(decoded),
        oom_score=score,
        unit_properties=cgroups.unit_properties(told, host),
        degraded=notes.all(),
    )


def check(request: api_pb2.UpdateContainerResourcesRequest) -> None:
    """Everything that can be said of the request alone. Raises RemoteError(INVALID_ARGUMENT)."""
    if request.HasField("windows"):
        raise invalid("windows: this is a Linux node: the windows part must not be set")
    if not request.HasField("linux"):
        raise invalid("the request has no linux resources")
