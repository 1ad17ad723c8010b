"""Runs in: nri. Sans-IO: collected adjustments, applied to an OCI spec.

Owns the order of it and the meaning of a removal. What this node or its runtime could not carry out is said
in `notes`, a sentence each. CDI devices are cri's to inject: only storage can read what they are.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from typing import Any

from ipc.nri import nri_pb2 as pb

from . import resources
from .oci import STAGES
from .owners import is_marked, unmarked

Spec = dict[str, Any]

#: The most open propagation of the root file system that a mount needs.
_PROPAGATION = ("rslave", "rshared")
#: Older runtimes pass over what came with these versions of the runtime-spec.
_NEWER = {
    "process.ioPriority": (1, 1, 0),
    "process.scheduler": (1, 1, 0),
    "linux.netDevices": (1, 3, 0),
    "linux.memoryPolicy": (1, 3, 0),
}


def apply(spec: Spec, wanted: pb.ContainerAdjustment) -> list[str]:
    """Change a spec; return what was not carried out."""
    notes: list[str] = []
    process, linux = spec["process"], spec.setdefault("linux", {})
    _map(spec, "annotations", wanted.annotations)
    process["env"] = _env(process.get("env") or [], wanted.env)
    if wanted.args:
        process["args"] = list(wanted.args)
    _hooks(spec, wanted.hooks)
    _rlimits(process, wanted.rlimits)
    _devices(linux, wanted.linux.devices)
    _process(process, wanted.linux)
    _linux(linux, wanted.linux, notes)
    _mounts(spec, wanted.mounts)
    return notes


def newer_than(version: str, wanted: pb.ContainerAdjustment) -> list[str]:
    """What a runtime that reads the runtime-spec up to `version` passes over."""
    known = tuple(int(part) for part in version.partition("-")[0].split(".") if part.isdecimal())
    asked = {
        "process.ioPriority": wanted.linux.HasField("io_priority"),
        "process.scheduler": wanted.linux.HasField("scheduler"),
        "linux.netDevices": bool(wanted.linux.net_devices),
        "linux.memoryPolicy": wanted.linux.HasField("memory_policy"),
    }
    return [
        f"{name} has no effect: the runtime knows the runtime-spec up to {version}"
        for name, since in _NEWER.items()
        if asked[name] and known < since
    ]


def _map(holder: Spec, name: str, wanted: Mapping[str, str]) -> None:
    if not wanted:
        return
    values = dict(holder.get(name) or {})
    for key in wanted:
        if is_marked(key):
            values.pop(unmarked(key), None)
    holder[name] = values | {key: value for key, value in wanted.items() if not is_marked(key)}


def _env(env: list[str], wanted: Iterable[pb.KeyValue]) -> list[str]:
    """Variables that are there keep their place."""
    values = dict(entry.partition("=")[::2] for entry in env)
    for one in wanted:
        if is_marked(one.key):
            values.pop(unmarked(one.key), None)
        else:
            values[one.key] = one.value
    return [f"{key}={value}" for key, value in values.items()]


def _hooks(spec: Spec, wanted: pb.Hooks) -> None:
    for stage, field in STAGES.items():
        if hooks := getattr(wanted, field):
            spec.setdefault("hooks", {}).setdefault(stage, []).extend(map(_hook, hooks))


def _hook(wanted: pb.Hook) -> Spec:
    made: Spec = {"path": wanted.path}
    lists = {"args": list(wanted.args), "env": list(wanted.env)}
    timeout = {"timeout": wanted.timeout.value} if wanted.HasField("timeout") else {}
    return made | {name: values for name, values in lists.items() if values} | timeout


def _rlimits(process: Spec, wanted: Iterable[pb.POSIXRlimit]) -> None:
    limits = {one["type"]: one for one in process.get("rlimits") or []}
    for one in wanted:
        limits.pop(unmarked(one.type), None)
        if not is_marked(one.type):
            limits[one.type] = {"type": one.type, "hard": one.hard, "soft": one.soft}
    if limits or "rlimits" in process:
        process["rlimits"] = list(limits.values())


def _devices(linux: Spec, wanted: Iterable[pb.LinuxDevice]) -> None:
    nodes = {node["path"]: node for node in linux.get("devices") or []}
    rules = []
    for one in wanted:
        nodes.pop(unmarked(one.path), None)
        if not is_marked(one.path):
            nodes[one.path] = _node(one)
            rules.append(_rule(one))
    if nodes or "devices" in linux:
        linux["devices"] = list(nodes.values())
    if rules:
        linux["resources"] = resources.merge(linux.get("resources") or {}, {"devices": rules})


def _node(wanted: pb.LinuxDevice) -> Spec:
    made: Spec = {"path": wanted.path, "type": wanted.type}
    if wanted.type != "p":
        made |= {"major": wanted.major, "minor": wanted.minor}
    names = {"file_mode": "fileMode", "uid": "uid", "gid": "gid"}
    return made | {
        name: getattr(wanted, field).value for field, name in names.items() if wanted.HasField(field)
    }


def _rule(wanted: pb.LinuxDevice) -> Spec:
    """Reading and writing; a block device may also be made anew."""
    access = "rwm" if wanted.type == "b" else "rw"
    numbers = {"major": wanted.major, "minor": wanted.minor}
    return {"allow": True, "type": wanted.type, "access": access, **numbers}


def _process(process: Spec, wanted: pb.LinuxContainerAdjustment) -> None:
    if wanted.HasField("oom_score_adj"):
        process["oomScoreAdj"] = wanted.oom_score_adj.value
    if wanted.HasField("io_priority"):
        process.pop("ioPriority", None)
        class_ = getattr(wanted.io_priority, "class")
        if class_ != pb.IOPRIO_CLASS_NONE:
            name = pb.IOPrioClass.Name(class_)
            process["ioPriority"] = {"class": name, "priority": wanted.io_priority.priority}
    if wanted.HasField("scheduler"):
        process.pop("scheduler", None)
        if wanted.scheduler.policy != pb.SCHED_NONE:
            process["scheduler"] = _scheduler(wanted.scheduler)


def _scheduler(wanted: pb.LinuxScheduler) -> Spec:
    made: Spec = {"policy": pb.LinuxSchedulerPolicy.Name(wanted.policy)}
    names = ("nice", "priority", "runtime", "deadline", "period")
    made |= {name: getattr(wanted, name) for name in names if getattr(wanted, name)}
    flags = [pb.LinuxSchedulerFlag.Name(flag) for flag in wanted.flags]
    return made | ({"flags": flags} if flags else {})


def _linux(linux: Spec, wanted: pb.LinuxContainerAdjustment, notes: list[str]) -> None:
    limits = wanted.resources
    linux["resources"] = resources.merge(linux.get("resources") or {}, resources.to_oci(limits))
    _keep_order(linux["resources"].get("memory") or {})
    for name in ("blockio_class", "rdt_class"):
        if limits.HasField(name) and getattr(limits, name).value:
            notes.append(f"{name} {getattr(limits, name).value!r} has no effect: this node has no classes")
    if wanted.cgroups_path:
        linux["cgroupsPath"] = wanted.cgroups_path
    if wanted.HasField("seccomp_policy"):
        linux["seccomp"] = _seccomp(wanted.seccomp_policy)
    _namespaces(linux, wanted.namespaces)
    _map(linux, "sysctl", wanted.sysctl)
    _net_devices(linux, wanted.net_devices)
    _rdt(linux, wanted.rdt)
    if wanted.HasField("memory_policy"):
        policy = wanted.memory_policy
        linux["memoryPolicy"] = {
            "mode": pb.MpolMode.Name(policy.mode),
            "nodes": policy.nodes,
            "flags": [pb.MpolFlag.Name(flag) for flag in policy.flags],
        }


def _keep_order(memory: Spec) -> None:
    """A limit of memory and swap together that the new limit of memory went over goes with it."""
    if 0 < memory.get("swap", 0) < memory.get("limit", 0):
        memory["swap"] = memory["limit"]


def _seccomp(wanted: pb.LinuxSeccomp) -> Spec:
    made: Spec = {"defaultAction": wanted.default_action}
    if wanted.HasField("default_errno"):
        made["defaultErrnoRet"] = wanted.default_errno.value
    texts = {"listenerPath": wanted.listener_path, "listenerMetadata": wanted.listener_metadata}
    lists = {
        "architectures": list(wanted.architectures),
        "flags": list(wanted.flags),
        "syscalls": [_syscall(rule) for rule in wanted.syscalls],
    }
    return made | {name: value for name, value in {**texts, **lists}.items() if value}


def _syscall(wanted: pb.LinuxSyscall) -> Spec:
    made: Spec = {"names": list(wanted.names), "action": wanted.action}
    if wanted.HasField("errno_ret"):
        made["errnoRet"] = wanted.errno_ret.value
    arguments = [
        {"index": one.index, "value": one.value, "valueTwo": one.value_two, "op": one.op}
        for one in wanted.args
    ]
    return made | ({"args": arguments} if arguments else {})


def _namespaces(linux: Spec, wanted: Iterable[pb.LinuxNamespace]) -> None:
    present = {one["type"]: one for one in linux.get("namespaces") or []}
    for one in wanted:
        present.pop(unmarked(one.type), None)
        if not is_marked(one.type):
            present[one.type] = {"type": one.type} | ({"path": one.path} if one.path else {})
    linux["namespaces"] = list(present.values())


def _net_devices(linux: Spec, wanted: Mapping[str, pb.LinuxNetDevice]) -> None:
    if not wanted:
        return
    devices = dict(linux.get("netDevices") or {})
    for key, device in wanted.items():
        devices.pop(unmarked(key), None)
        if not is_marked(key):
            devices[key] = {"name": device.name} if device.name else {}
    linux["netDevices"] = devices


def _rdt(linux: Spec, wanted: pb.LinuxRdt) -> None:
    if wanted.remove:
        linux.pop("intelRdt", None)
    made: Spec = {}
    if wanted.HasField("clos_id"):
        made["closID"] = wanted.clos_id.value
    if wanted.HasField("schemata"):
        made["schemata"] = list(wanted.schemata.value)
    if wanted.HasField("enable_monitoring"):
        made["enableMonitoring"] = wanted.enable_monitoring.value
    if made:
        linux["intelRdt"] = {**(linux.get("intelRdt") or {}), **made}


def _mounts(spec: Spec, wanted: Iterable[pb.Mount]) -> None:
    """Parents before what lies in them."""
    changes = list(wanted)
    if not changes:
        return
    gone = {_clean(unmarked(one.destination)) for one in changes}
    kept = [mount for mount in spec.get("mounts") or [] if _clean(mount["destination"]) not in gone]
    added = [_mount(one) for one in changes if not is_marked(one.destination)]
    spec["mounts"] = sorted([*kept, *added], key=lambda mount: _depth(mount["destination"]))
    for option in (option for mount in added for option in mount["options"]):
        _open_root(spec["linux"], option)


def _mount(wanted: pb.Mount) -> Spec:
    return {
        "destination": wanted.destination,
        "type": wanted.type or "bind",
        "source": wanted.source,
        "options": list(wanted.options),
    }


def _clean(path: str) -> str:
    return posixpath.normpath(path)


def _depth(path: str) -> int:
    clean = _clean(path)
    return 0 if clean == "/" else clean.count("/")


def _open_root(linux: Spec, option: str) -> None:
    """A mount that events of mounting go through needs a root that lets them through."""
    present = linux.get("rootfsPropagation", "")
    if option in _PROPAGATION:
        levels = ["", *_PROPAGATION]
        if levels.index(option) > (levels.index(present) if present in levels else 0):
            linux["rootfsPropagation"] = option
