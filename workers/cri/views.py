"""Runs in: cri. What clients see of pods and containers: CRI messages made of records, and filters."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ipc.cri import api_pb2 as pb
from ipc.messages.monitor import ExitRecord
from workers.cri.state import Container, Phase, Pod, Store

_STATES = {
    Phase.CREATED: pb.ContainerState.CONTAINER_CREATED,
    Phase.RUNNING: pb.ContainerState.CONTAINER_RUNNING,
    Phase.EXITED: pb.ContainerState.CONTAINER_EXITED,
}
#: "SIGTERM", "SIGRTMIN+3" -> the number of CRI's enum
_SIGNALS: dict[str, Any] = {
    name.removeprefix("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-"): value
    for name, value in pb.Signal.items()
}
OOM_KILLED = "OOMKilled"


def pod_state(pod: Pod) -> pb.PodSandboxState:
    """READY only while containers can be made in it."""
    ready = pod.phase is Phase.READY
    return pb.PodSandboxState.SANDBOX_READY if ready else pb.PodSandboxState.SANDBOX_NOTREADY


def container_state(container: Container) -> pb.ContainerState:
    """The CRI state; what is unknown is said to be so, never guessed."""
    return _STATES.get(container.phase, pb.ContainerState.CONTAINER_UNKNOWN)


# -- lists ------------------------------------------------------------------------------------------------


def match_pods(store: Store, wanted: pb.PodSandboxFilter) -> list[Pod]:
    """The pods that pass a filter: id prefix, state and labels, all of them."""
    return [
        pod
        for pod in store.match_pods(wanted.id)
        if (not wanted.HasField("state") or pod_state(pod) == wanted.state.state)
        and has_labels(pod.config.labels, wanted.label_selector)
    ]


def list_pods(store: Store, wanted: pb.PodSandboxFilter) -> Iterable[pb.PodSandbox]:
    """As `match_pods`, as they stand in a list."""
    return map(pod_item, match_pods(store, wanted))


def pod_item(pod: Pod) -> pb.PodSandbox:
    """A pod as it stands in a list."""
    return pb.PodSandbox(
        id=pod.id,
        metadata=pod.config.metadata,
        state=pod_state(pod),
        created_at=pod.record.created_at_ns,
        labels=pod.config.labels,
        annotations=pod.config.annotations,
        runtime_handler=pod.record.handler,
    )


def match_containers(store: Store, wanted: pb.ContainerFilter) -> list[Container]:
    """The containers that pass a filter: id prefix, pod, state and labels, all of them."""
    pod_id = pod_of(store, wanted.pod_sandbox_id)
    return [
        container
        for container in store.match_containers(wanted.id)
        if (not wanted.pod_sandbox_id or container.record.pod_id == pod_id)
        and (not wanted.HasField("state") or container_state(container) == wanted.state.state)
        and has_labels(container.config.labels, wanted.label_selector)
    ]


def list_containers(store: Store, wanted: pb.ContainerFilter) -> Iterable[pb.Container]:
    """As `match_containers`, as they stand in a list."""
    return map(container_item, match_containers(store, wanted))


def pod_of(store: Store, text: str) -> str:
    """The one pod that a filter's prefix means, "" if it means none or several."""
    matches = store.match_pods(text) if text else []
    return matches[0].id if len(matches) == 1 else ""


def container_item(container: Container) -> pb.Container:
    """A container as it stands in a list; made once, only the state changes."""
    item = container.listed
    if not item.id:
        item.CopyFrom(_container_item(container))
    item.state = container_state(container)
    return item


def _container_item(container: Container) -> pb.Container:
    record, config = container.record, container.config
    return pb.Container(
        id=record.id,
        pod_sandbox_id=record.pod_id,
        metadata=config.metadata,
        image=image_spec(container),
        image_ref=record.image_id,
        image_id=record.image_id,
        created_at=record.created_at_ns,
        labels=config.labels,
        annotations=config.annotations,
    )


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether every wanted label is there with that value."""
    return all(key in labels and labels[key] == value for key, value in wanted.items())


def image_spec(container: Container) -> pb.ImageSpec:
    """The image as it was asked for, under the name that people know."""
    spec = pb.ImageSpec()
    spec.CopyFrom(container.config.image)
    spec.image = container.record.image_name
    return spec


# -- one pod ----------------------------------------------------------------------------------------------


def pod_status(pod: Pod, *, verbose: bool) -> pb.PodSandboxStatusResponse:
    """PodSandboxStatus of a pod."""
    status = pb.PodSandboxStatus(
        id=pod.id,
        metadata=pod.config.metadata,
        state=pod_state(pod),
        created_at=pod.record.created_at_ns,
        network=_network(pod),
        labels=pod.config.labels,
        annotations=pod.config.annotations,
        runtime_handler=pod.record.handler,
    )
    options = pod.config.linux.security_context.namespace_options
    status.linux.namespaces.options.CopyFrom(options)
    return pb.PodSandboxStatusResponse(
        status=status, info=_pod_info(pod) if verbose else {}, timestamp=time.time_ns()
    )


def _network(pod: Pod) -> pb.PodSandboxNetworkStatus:
    ips = pod.record.ips if pod.phase is Phase.READY else []
    return pb.PodSandboxNetworkStatus(
        ip=ips[0] if ips else "", additional_ips=[pb.PodIP(ip=ip) for ip in ips[1:]]
    )


def _resources(told: pb.LinuxContainerResources) -> dict[str, Any]:
    """What was told of a pod's resources, in the proto's words."""
    return {field.name: str(value) for field, value in told.ListFields()}


def _pod_info(pod: Pod) -> dict[str, str]:
    info = {
        "pid": pod.record.init_pid,
        "hostname": pod.record.hostname,
        "namespaces": pod.record.namespaces,
        "runtimeHandler": pod.record.handler,
        "overhead": _resources(pod.config.linux.overhead),
        "resources": _resources(pod.config.linux.resources),
        "cniResult": msgspec.Raw(pod.record.cni_result or b"null"),
    }
    return {"info": msgspec.json.encode(info).decode()}


# -- one container ----------------------------------------------------------------------------------------


def container_status(container: Container, spec: bytes | None) -> pb.ContainerStatusResponse:
    """ContainerStatus of a container; `spec` is its OCI spec for a verbose answer."""
    record, config = container.record, container.config
    status = pb.ContainerStatus(
        id=record.id,
        metadata=config.metadata,
        state=container_state(container),
        created_at=record.created_at_ns,
        started_at=record.started_at_ns,
        image=image_spec(container),
        image_ref=record.image_id,
        image_id=record.image_id,
        labels=config.labels,
        annotations=config.annotations,
        log_path=record.log_path,
        stop_signal=_SIGNALS.get(record.stop_signal, pb.Signal.SIGNAL_RUNTIME_DEFAULT),
    )
    status.mounts.extend(_mounts(container))
    status.user.linux.uid, status.user.linux.gid = record.uid, record.gid
    status.user.linux.supplemental_groups.extend(record.groups)
    status.resources.linux.CopyFrom(config.linux.resources)
    if record.exit is not None:
        _add_exit(status, record.exit)
    info = {} if spec is None else _container_info(container, spec)
    return pb.ContainerStatusResponse(status=status, info=info)


def _mounts(container: Container) -> Iterable[pb.Mount]:
    """The mounts as they were asked for; an image volume says by its id which image it became."""
    config = pb.ContainerConfig()
    config.CopyFrom(container.config)
    for mount, image_id in zip(config.mounts, container.record.mount_images, strict=False):
        if image_id:
            mount.image.image_ref = image_id
    return config.mounts


def _add_exit(status: pb.ContainerStatus, exit_: ExitRecord) -> None:
    status.exit_code = exit_.exit_code
    status.finished_at = exit_.finished_at_ns
    status.reason = exit_reason(exit_)
    status.message = exit_.message


def exit_reason(exit_: ExitRecord) -> str:
    """The word that kubelets know: an OOM kill comes before everything else."""
    if exit_.oom_killed:
        return OOM_KILLED
    return exit_.reason or ("Completed" if exit_.exit_code == 0 else "Error")


def _container_info(container: Container, spec: bytes) -> dict[str, str]:
    running = container.phase in {Phase.RUNNING, Phase.CREATED}
    info = {
        "sandboxID": container.record.pod_id,
        "pid": container.record.pid if running else 0,
        "privileged": container.config.linux.security_context.privileged,
        "runtimeSpec": msgspec.Raw(spec or b"null"),
    }
    return {"info": msgspec.json.encode(info).decode()}
