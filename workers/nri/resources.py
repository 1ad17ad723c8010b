"""Runs in: nri. Sans-IO: `linux.resources` of the OCI runtime-spec as the interface has it, and back.

Owns which field is which. What is absent on one side is absent on the other. Blocks of I/O (`blockIO`) are
not in the interface but for a class's name, which no configuration of ours gives a meaning to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message

from ipc.nri import nri_pb2 as pb

Oci = dict[str, Any]

#: Field of the interface -> name in the runtime-spec, for fields that wrap one value.
MEMORY = {
    "limit": "limit",
    "reservation": "reservation",
    "swap": "swap",
    "kernel": "kernel",
    "kernel_tcp": "kernelTCP",
    "swappiness": "swappiness",
    "disable_oom_killer": "disableOOMKiller",
    "use_hierarchy": "useHierarchy",
}
CPU = {
    "shares": "shares",
    "quota": "quota",
    "period": "period",
    "realtime_runtime": "realtimeRuntime",
    "realtime_period": "realtimePeriod",
}
CPUSETS = ("cpus", "mems")


def to_interface(oci: Mapping[str, Any]) -> pb.LinuxResources:
    """What plugins see of limits."""
    made = pb.LinuxResources()
    _wrap(made.memory, MEMORY, oci.get("memory") or {})
    cpu = oci.get("cpu") or {}
    _wrap(made.cpu, CPU, cpu)
    for name in CPUSETS:
        setattr(made.cpu, name, cpu.get(name, ""))
    for limit in oci.get("hugepageLimits") or []:
        made.hugepage_limits.add(page_size=limit["pageSize"], limit=limit["limit"])
    for key, value in (oci.get("unified") or {}).items():
        made.unified[key] = value
    for rule in oci.get("devices") or []:
        _rule_to_interface(made.devices.add(), rule)
    pids = (oci.get("pids") or {}).get("limit")
    if pids is not None:
        made.pids.limit = pids
    return made


def _wrap(target: Message, names: Mapping[str, str], oci: Mapping[str, Any]) -> None:
    for field, name in names.items():
        if oci.get(name) is not None:
            getattr(target, field).value = oci[name]


def _rule_to_interface(rule: pb.LinuxDeviceCgroup, oci: Mapping[str, Any]) -> None:
    rule.allow, rule.type, rule.access = oci["allow"], oci.get("type", ""), oci.get("access", "")
    for name in ("major", "minor"):
        if oci.get(name) is not None:
            getattr(rule, name).value = oci[name]


def to_oci(wanted: pb.LinuxResources) -> Oci:
    """What a plugin set, in the runtime-spec's words."""
    cpu = _unwrap(wanted.cpu, CPU) | {name: getattr(wanted.cpu, name) for name in CPUSETS}
    parts: Oci = {
        "memory": _unwrap(wanted.memory, MEMORY),
        "cpu": {name: value for name, value in cpu.items() if value != ""},
        "hugepageLimits": [{"pageSize": one.page_size, "limit": one.limit} for one in wanted.hugepage_limits],
        "unified": dict(wanted.unified),
        "devices": [_rule_to_oci(rule) for rule in wanted.devices],
        "pids": {"limit": wanted.pids.limit} if wanted.HasField("pids") else {},
    }
    return {name: part for name, part in parts.items() if part}


def _unwrap(source: Message, names: Mapping[str, str]) -> Oci:
    return {name: getattr(source, field).value for field, name in names.items() if source.HasField(field)}


def _rule_to_oci(rule: pb.LinuxDeviceCgroup) -> Oci:
    made: Oci = {"allow": rule.allow}
    texts = {"type": rule.type, "access": rule.access}
    numbers = {name: getattr(rule, name).value for name in ("major", "minor") if rule.HasField(name)}
    return made | {name: text for name, text in texts.items() if text} | numbers


def merge(old: Oci, new: Mapping[str, Any]) -> Oci:
    """Limits with others put over them; huge pages by size, rules of devices appended."""
    made = dict(old)
    for name in ("memory", "cpu", "unified", "pids"):
        if part := new.get(name):
            made[name] = {**(old.get(name) or {}), **part}
    if pages := new.get("hugepageLimits"):
        sizes = {one["pageSize"]: one for one in [*(old.get("hugepageLimits") or []), *pages]}
        made["hugepageLimits"] = list(sizes.values())
    if rules := new.get("devices"):
        made["devices"] = [*(old.get("devices") or []), *rules]
    return made
