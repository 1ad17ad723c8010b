"""Runs in: cri. The `linux` object of the OCI runtime-spec.

Owns namespaces, hidden paths, and the assembly of cgroups, devices and seccomp. Refuses a namespace that the
request needs and that does not exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ipc.cri import api_pb2
from ipc.errors import precondition

from . import cgroups, devices, mounts, seccomp, security, userns, validate
from .inputs import SpecInputs
from .notes import Notes

#: Hidden where the request has no list of its own: they tell or change things of the whole node.
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

#: Names of pinned namespaces -> types of the runtime-spec
_TYPES = {"net": "network", "ipc": "ipc", "uts": "uts", "pid": "pid"}


def linux(inputs: SpecInputs, path: cgroups.CgroupPath, notes: Notes) -> dict[str, Any]:
    """The whole object."""
    nodes, rules = devices.devices(inputs, notes)
    limits = cgroups.resources(inputs.config.linux.resources, inputs.host, notes)
    context = inputs.config.linux.security_context
    parts: dict[str, Any] = {
        "namespaces": namespaces(inputs),
        "cgroupsPath": path.oci,
        "resources": limits | {"devices": rules},
        "devices": nodes,
        "rootfsPropagation": mounts.rootfs_propagation(inputs.config),
        "maskedPaths": hidden_paths("masked_paths", inputs, context.masked_paths, MASKED_PATHS),
        "readonlyPaths": hidden_paths("readonly_paths", inputs, context.readonly_paths, READONLY_PATHS),
    }
    if mapped := userns.of_pod(inputs.sandbox):
        parts["uidMappings"], parts["gidMappings"] = [userns.oci(mapped.uids)], [userns.oci(mapped.gids)]
    if profile := seccomp.profile(inputs, notes):
        parts["seccomp"] = profile
    if label := security.mount_label(inputs, notes):
        parts["mountLabel"] = label
    return parts


def namespaces(inputs: SpecInputs) -> list[dict[str, str]]:
    """mount is always new; the others by their mode. A cgroup namespace only where cgroups are one tree."""
    found = [{"type": "mount"}, *_network_and_names(inputs), *_ipc(inputs), *_pid(inputs)]
    if userns.of_pod(inputs.sandbox):
        found.append({"type": "user", "path": _user(inputs)})
    privileged = inputs.config.linux.security_context.privileged
    if inputs.host.cgroup_version == 2 and not privileged:
        found.append({"type": "cgroup"})
    return found


def _user(inputs: SpecInputs) -> str:
    if path := inputs.namespaces.get("user"):
        return path
    raise precondition("userns_options: the pod sandbox has no user namespace")


def _network_and_names(inputs: SpecInputs) -> list[dict[str, str]]:
    options = mounts.namespace_options(inputs)
    if options.network == api_pb2.NODE:
        return []
    return [*_pinned(inputs, "net", "network"), *_pinned(inputs, "uts", "network")]


def _ipc(inputs: SpecInputs) -> list[dict[str, str]]:
    mode = mounts.namespace_options(inputs).ipc
    if mode == api_pb2.NODE:
        return []
    return [{"type": "ipc"}] if mode == api_pb2.CONTAINER else _pinned(inputs, "ipc", "ipc")


def _pid(inputs: SpecInputs) -> list[dict[str, str]]:
    mode = mounts.namespace_options(inputs).pid
    if mode == api_pb2.NODE:
        return []
    if mode == api_pb2.CONTAINER:
        return [{"type": "pid"}]
    if mode == api_pb2.TARGET:
        return [_target(inputs)]
    return _pinned(inputs, "pid", "pid")


def _target(inputs: SpecInputs) -> dict[str, str]:
    if not inputs.target_pid_namespace:
        target = mounts.namespace_options(inputs).target_id
        raise precondition(f"namespace_options.target_id: container {target!r} has no PID namespace to join")
    return {"type": "pid", "path": inputs.target_pid_namespace}


def _pinned(inputs: SpecInputs, name: str, option: str) -> list[dict[str, str]]:
    """The pod's namespace; none where the pod itself uses the node's."""
    if path := inputs.namespaces.get(name):
        return [{"type": _TYPES[name], "path": path}]
    pod = inputs.sandbox.linux.security_context.namespace_options
    if getattr(pod, option) == api_pb2.NODE:
        return []
    raise precondition(
        f"namespace_options.{option}: the pod sandbox has no {_TYPES[name]} namespace to share"
    )


def hidden_paths(
    what: str,
    inputs: SpecInputs,
    requested: Iterable[str],
    default: Iterable[str],
) -> list[str]:
    """The request's list, else the default. Nothing is hidden from a privileged container.

    A pod with procMount Unmasked sends empty lists, as clients do that know nothing of them. Such a pod has
    a user namespace, so there an empty list is one, and elsewhere it means: the default.
    """
    if inputs.config.linux.security_context.privileged:
        return []
    paths = list(requested)
    if not paths and not userns.of_pod(inputs.sandbox):
        paths = list(default)
    return list(dict.fromkeys(validate.clean_path(what, path) for path in paths))
