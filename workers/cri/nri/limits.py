"""Runs in: cri. Sans-IO: limits of containers between CRI and the runtime-spec, for plugins.

CRI's fields go there as they are, checked or not: what is wrong with them is said where they are applied.
Of what comes back, CRI has a field for most; `beyond` is the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipc.cri import api_pb2 as pb

Oci = dict[str, Any]

_SCALARS = {
    ("cpu", "shares"): "cpu_shares",
    ("cpu", "quota"): "cpu_quota",
    ("cpu", "period"): "cpu_period",
    ("cpu", "cpus"): "cpuset_cpus",
    ("cpu", "mems"): "cpuset_mems",
    ("memory", "limit"): "memory_limit_in_bytes",
    ("memory", "swap"): "memory_swap_limit_in_bytes",
}
_PARTS = ("cpu", "memory", "pids")


def to_oci(limits: pb.LinuxContainerResources) -> Oci:
    """What is set, in the runtime-spec's words."""
    made: Oci = {}
    for (part, name), field in _SCALARS.items():
        if value := getattr(limits, field):
            made.setdefault(part, {})[name] = value
    if limits.hugepage_limits:
        made["hugepageLimits"] = [
            {"pageSize": one.page_size, "limit": one.limit} for one in limits.hugepage_limits
        ]
    if limits.unified:
        made["unified"] = dict(limits.unified)
    return made


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Oci:
    """What `after` has that `before` has not, or otherwise."""
    made: Oci = {}
    for part in (*_PARTS, "unified"):
        old = before.get(part) or {}
        new = {name: value for name, value in (after.get(part) or {}).items() if old.get(name) != value}
        if new:
            made[part] = new
    old_pages = before.get("hugepageLimits") or []
    pages = [one for one in after.get("hugepageLimits") or [] if one not in old_pages]
    return made | ({"hugepageLimits": pages} if pages else {})


def to_cri(wanted: Mapping[str, Any]) -> pb.LinuxContainerResources:
    """What CRI has fields for."""
    made = pb.LinuxContainerResources()
    for (part, name), field in _SCALARS.items():
        value = (wanted.get(part) or {}).get(name)
        if value is not None:
            setattr(made, field, value)
    for one in wanted.get("hugepageLimits") or []:
        made.hugepage_limits.add(page_size=one["pageSize"], limit=one["limit"])
    made.unified.update(wanted.get("unified") or {})
    return made


def beyond(wanted: Mapping[str, Any]) -> Oci:
    """What CRI has no fields for."""
    made: Oci = {}
    for part in _PARTS:
        for name, value in (wanted.get(part) or {}).items():
            if (part, name) not in _SCALARS:
                made.setdefault(part, {})[name] = value
    return made


def override(asked: pb.LinuxContainerResources, wanted: pb.LinuxContainerResources) -> None:
    """Put what plugins want over what was asked for."""
    for field in _SCALARS.values():
        if value := getattr(wanted, field):
            setattr(asked, field, value)
    sizes = {one.page_size for one in wanted.hugepage_limits}
    kept = [one for one in asked.hugepage_limits if one.page_size not in sizes]
    del asked.hugepage_limits[:]
    asked.hugepage_limits.extend([*kept, *wanted.hugepage_limits])
    asked.unified.update(wanted.unified)
