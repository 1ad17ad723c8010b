"""Runs in: nri. Sans-IO: pods and containers as plugins see them, made of cri's facts and the OCI spec.

A seccomp policy is shown when a container is created, and only then: it is half of what a spec has, the
same for almost all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ipc.messages.nri import ContainerFacts, PodFacts
from ipc.nri import nri_pb2 as pb

from . import resources

Spec = dict[str, Any]

STATES = {
    "creating": pb.CONTAINER_CREATED,
    "created": pb.CONTAINER_CREATED,
    "running": pb.CONTAINER_RUNNING,
    "exited": pb.CONTAINER_STOPPED,
}
#: Stage in the runtime-spec -> field of Hooks.
STAGES = {
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}
_LOCALHOST = "localhost/"
_SCHEDULER = ("nice", "priority", "runtime", "deadline", "period")


def pod(facts: PodFacts) -> pb.PodSandbox:
    """A pod as plugins see it."""
    made = pb.PodSandbox(
        id=facts.id,
        name=facts.name,
        uid=facts.uid,
        namespace=facts.namespace,
        labels=facts.labels,
        annotations=facts.annotations,
        runtime_handler=facts.runtime_handler,
        pid=facts.pid,
        ips=facts.ips,
    )
    made.linux.cgroup_parent = facts.cgroup_parent
    made.linux.namespaces.extend(
        pb.LinuxNamespace(type=type_, path=path) for type_, path in sorted(facts.namespaces.items())
    )
    if facts.overhead:
        made.linux.pod_overhead.CopyFrom(decoded_resources(facts.overhead))
    if facts.resources:
        made.linux.pod_resources.CopyFrom(decoded_resources(facts.resources))
    return made


def decoded_resources(data: bytes) -> pb.LinuxResources:
    """Resources out of a message; none for none."""
    return resources.to_interface(msgspec.json.decode(data)) if data else pb.LinuxResources()


def container(facts: ContainerFacts, spec: Spec | None = None, *, seccomp: bool = False) -> pb.Container:
    """A container as plugins see it; `spec` if it is decoded already."""
    spec = spec or msgspec.json.decode(facts.spec)
    process = spec.get("process") or {}
    made = pb.Container(
        id=facts.id,
        pod_sandbox_id=facts.pod_id,
        name=facts.name,
        state=STATES.get(facts.state, pb.CONTAINER_UNKNOWN),
        labels=facts.labels,
        annotations={**facts.annotations, **(spec.get("annotations") or {})},
        args=process.get("args") or [],
        env=process.get("env") or [],
        mounts=map(_mount, spec.get("mounts") or []),
        hooks=_hooks(spec.get("hooks") or {}),
        linux=_linux(spec, facts, seccomp=seccomp),
        pid=facts.pid,
        rlimits=map(_rlimit, process.get("rlimits") or []),
        created_at=facts.created_at_ns,
        started_at=facts.started_at_ns,
        finished_at=facts.finished_at_ns,
        exit_code=facts.exit_code,
        status_reason=facts.reason,
        status_message=facts.message,
        user=_user(process.get("user") or {}),
    )
    made.CDI_devices.extend(pb.CDIDevice(name=name) for name in facts.cdi_devices)
    made.image.name, made.image.digest = facts.image_name, facts.image_digest
    made.image.config_digest = facts.image_id
    return made


def _mount(oci: Mapping[str, Any]) -> pb.Mount:
    return pb.Mount(
        destination=oci["destination"],
        type=oci.get("type", ""),
        source=oci.get("source", ""),
        options=oci.get("options") or [],
    )


def _rlimit(oci: Mapping[str, Any]) -> pb.POSIXRlimit:
    return pb.POSIXRlimit(type=oci["type"], hard=oci["hard"], soft=oci["soft"])


def _user(oci: Mapping[str, Any]) -> pb.User:
    return pb.User(
        uid=oci.get("uid", 0), gid=oci.get("gid", 0), additional_gids=oci.get("additionalGids") or []
    )


def _hooks(oci: Mapping[str, Any]) -> pb.Hooks:
    return pb.Hooks(**{field: map(_hook, oci.get(stage) or []) for stage, field in STAGES.items()})


def _hook(oci: Mapping[str, Any]) -> pb.Hook:
    made = pb.Hook(path=oci["path"], args=oci.get("args") or [], env=oci.get("env") or [])
    if oci.get("timeout") is not None:
        made.timeout.value = oci["timeout"]
    return made


def _linux(spec: Spec, facts: ContainerFacts, *, seccomp: bool) -> pb.LinuxContainer:
    linux, process = spec.get("linux") or {}, spec.get("process") or {}
    made = pb.LinuxContainer(
        namespaces=map(_namespace, linux.get("namespaces") or []),
        devices=map(_device, linux.get("devices") or []),
        resources=resources.to_interface(linux.get("resources") or {}),
        cgroups_path=linux.get("cgroupsPath", ""),
        sysctl=linux.get("sysctl") or {},
    )
    if process.get("oomScoreAdj") is not None:
        made.oom_score_adj.value = process["oomScoreAdj"]
    if profile := _profile(facts.seccomp_profile):
        made.seccomp_profile.CopyFrom(profile)
    if seccomp and linux.get("seccomp"):
        made.seccomp_policy.CopyFrom(_seccomp(linux["seccomp"]))
    for host, device in (linux.get("netDevices") or {}).items():
        made.net_devices[host].name = device.get("name", "")
    _more(made, linux, process)
    return made


def _more(made: pb.LinuxContainer, linux: Mapping[str, Any], process: Mapping[str, Any]) -> None:
    if priority := process.get("ioPriority"):
        made.io_priority.priority = priority.get("priority", 0)
        setattr(made.io_priority, "class", pb.IOPrioClass.Value(priority["class"]))
    if scheduler := process.get("scheduler"):
        numbers = {name: scheduler.get(name, 0) for name in _SCHEDULER}
        policy, flags = scheduler["policy"], scheduler.get("flags") or []
        made.scheduler.CopyFrom(pb.LinuxScheduler(policy=policy, flags=flags, **numbers))
    if rdt := linux.get("intelRdt"):
        if rdt.get("closID"):
            made.rdt.clos_id.value = rdt["closID"]
        if rdt.get("schemata"):
            made.rdt.schemata.value.extend(rdt["schemata"])


def _namespace(oci: Mapping[str, Any]) -> pb.LinuxNamespace:
    return pb.LinuxNamespace(type=oci["type"], path=oci.get("path", ""))


def _device(oci: Mapping[str, Any]) -> pb.LinuxDevice:
    made = pb.LinuxDevice(
        path=oci["path"], type=oci["type"], major=oci.get("major", 0), minor=oci.get("minor", 0)
    )
    for field, name in (("file_mode", "fileMode"), ("uid", "uid"), ("gid", "gid")):
        if oci.get(name) is not None:
            getattr(made, field).value = oci[name]
    return made


def _profile(text: str) -> pb.SecurityProfile | None:
    if not text:
        return None
    if text.startswith(_LOCALHOST):
        reference = text.removeprefix(_LOCALHOST)
        return pb.SecurityProfile(profile_type=pb.SecurityProfile.LOCALHOST, localhost_ref=reference)
    unconfined = text == "unconfined"
    type_ = pb.SecurityProfile.UNCONFINED if unconfined else pb.SecurityProfile.RUNTIME_DEFAULT
    return pb.SecurityProfile(profile_type=type_)


def _seccomp(oci: Mapping[str, Any]) -> pb.LinuxSeccomp:
    made = pb.LinuxSeccomp(
        default_action=oci["defaultAction"],
        architectures=oci.get("architectures") or [],
        flags=oci.get("flags") or [],
        listener_path=oci.get("listenerPath", ""),
        listener_metadata=oci.get("listenerMetadata", ""),
        syscalls=_syscalls(oci.get("syscalls") or []),
    )
    if oci.get("defaultErrnoRet") is not None:
        made.default_errno.value = oci["defaultErrnoRet"]
    return made


def _syscalls(rules: Iterable[Mapping[str, Any]]) -> Iterable[pb.LinuxSyscall]:
    for rule in rules:
        made = pb.LinuxSyscall(names=rule["names"], action=rule["action"])
        if rule.get("errnoRet") is not None:
            made.errno_ret.value = rule["errnoRet"]
        for argument in rule.get("args") or []:
            made.args.add(
                index=argument["index"],
                value=argument["value"],
                value_two=argument.get("valueTwo", 0),
                op=argument["op"],
            )
        yield made
