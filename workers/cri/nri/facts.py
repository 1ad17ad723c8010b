"""Runs in: cri. Sans-IO: what plugins are told of a pod and of a container."""

from __future__ import annotations

import msgspec

from ipc.cri import api_pb2 as pb
from ipc.messages.nri import ContainerFacts, PodFacts
from workers.cri.nri import limits
from workers.cri.state import Container, Phase, Pod

#: The runtime-spec's words for namespaces that have other names here.
_NAMESPACES = {"net": "network"}
_STATES = {
    Phase.CREATING: "creating",
    Phase.CREATED: "created",
    Phase.RUNNING: "running",
    Phase.EXITED: "exited",
    Phase.GONE: "exited",
}
_PROFILES = {
    pb.SecurityProfile.RuntimeDefault: "runtime/default",
    pb.SecurityProfile.Unconfined: "unconfined",
}


def encoded(resources: pb.LinuxContainerResources) -> bytes:
    """Limits in the runtime-spec's words, as messages carry them."""
    return msgspec.json.encode(limits.to_oci(resources))


def of_pod(pod: Pod) -> PodFacts:
    """A pod."""
    config, linux = pod.config, pod.config.linux
    return PodFacts(
        id=pod.id,
        name=config.metadata.name,
        uid=config.metadata.uid,
        namespace=config.metadata.namespace,
        labels=dict(config.labels),
        annotations=dict(config.annotations),
        runtime_handler=pod.record.handler,
        cgroup_parent=linux.cgroup_parent,
        overhead=encoded(linux.overhead) if linux.HasField("overhead") else b"",
        resources=encoded(linux.resources) if linux.HasField("resources") else b"",
        namespaces={_NAMESPACES.get(name, name): path for name, path in pod.record.namespaces.items()},
        ips=pod.record.ips,
        pid=pod.record.init_pid,
    )


def of_container(container: Container, spec: bytes) -> ContainerFacts:
    """A container, with the spec that it has or is about to have."""
    config, record, exit_ = container.config, container.record, container.record.exit
    return ContainerFacts(
        id=container.id,
        pod_id=record.pod_id,
        name=config.metadata.name,
        state=_STATES.get(record.phase, ""),
        spec=spec,
        labels=dict(config.labels),
        annotations=dict(config.annotations),
        seccomp_profile=_seccomp(config.linux.security_context),
        cdi_devices=[one.name for one in config.CDI_devices],
        pid=record.pid if record.phase in {Phase.CREATED, Phase.RUNNING} else 0,
        created_at_ns=record.created_at_ns,
        started_at_ns=record.started_at_ns,
        finished_at_ns=exit_.finished_at_ns if exit_ else 0,
        exit_code=exit_.exit_code if exit_ else 0,
        reason=exit_.reason if exit_ else "",
        message=exit_.message if exit_ else "",
        image_name=record.image_name,
        image_id=record.image_id,
    )


def _seccomp(security: pb.LinuxContainerSecurityContext) -> str:
    if not security.HasField("seccomp"):
        return ""
    profile = security.seccomp
    return _PROFILES.get(profile.profile_type) or f"localhost/{profile.localhost_ref}"
