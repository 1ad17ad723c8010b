"""Runs in: cri. Annotations of the OCI runtime-spec.

A runtime may act on any annotation, so it is told those only that its handler's configuration allows
(`runtimes.NAME.allowed_annotations`), and our own. Owns the deny-list: what these do to the host no pod may
ask for, whatever is allowed (CVE-2024-3154). Those of the image go nowhere (CVE-2026-53488).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ipc.messages.supervisor import HostInfo

from . import cgroups
from .inputs import SpecInputs

#: A key that is one of these or begins with one is never passed to the runtime.
DENIED = (
    "run.oci.",
    "org.systemd.property.",
    "org.criu.config",
    "module.wasm.image",
    "bundle",
    "io.kubernetes.cri.",
)
_OWN = "io.kubernetes.cri."
#: Under systemd on cgroup v2 crun puts a container into a group of this name below its scope. The kubelet and
#: its kin look at the scope; empty means none.
_SUBGROUP = "run.oci.systemd.subgroup"
_PROPERTY = "org.systemd.property."
#: A scope that had to be killed counts as failed, and stays until somebody resets it, unless this is said.
_COLLECT = {f"{_PROPERTY}CollectMode": "'inactive-or-failed'"}


def of_container(inputs: SpecInputs) -> dict[str, str]:
    """What is allowed of the pod's and the container's, and ours."""
    patterns = _patterns(inputs)
    requested = dict(inputs.sandbox.annotations) | dict(inputs.config.annotations)
    return allowed(requested, patterns) | _ours(inputs)


def _patterns(inputs: SpecInputs) -> Sequence[str]:
    name = inputs.runtime.name
    return next((r.allowed_annotations for r in inputs.settings.runtimes if r.name == name), [])


def allowed(requested: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    """Those that one of the patterns allows: exact names, or beginnings with a * after them."""
    exact = {pattern for pattern in patterns if not pattern.endswith("*")}
    beginnings = tuple(pattern[:-1] for pattern in patterns if pattern.endswith("*"))
    return {
        key: value
        for key, value in requested.items()
        if (key in exact or key.startswith(beginnings)) and not key.startswith(DENIED)
    }


def _ours(inputs: SpecInputs) -> dict[str, str]:
    """What runtimes with a sandbox of their own read, in the words that they know."""
    pod = inputs.sandbox.metadata
    values = {
        "container-type": "sandbox" if inputs.is_sandbox else "container",
        "container-name": inputs.config.metadata.name,
        "sandbox-id": inputs.sandbox_id or inputs.pod_id,
        "sandbox-name": pod.name,
        "sandbox-namespace": pod.namespace,
        "sandbox-uid": pod.uid,
        "image-id": inputs.image_id,
        "image-name": inputs.config.image.user_specified_image or inputs.config.image.image,
    }
    return {_OWN + key: value for key, value in values.items()}


def of_scope(limits: Mapping[str, Any], host: HostInfo) -> dict[str, str]:
    """What crun and runc tell systemd of the container's scope; nothing with the cgroupfs driver."""
    if host.cgroup_driver != "systemd":
        return {}
    properties = cgroups.unit_properties(limits, host)
    told = {f"{_PROPERTY}{name}": f"uint64 {value}" for name, value in properties.items()}
    return {_SUBGROUP: ""} | _COLLECT | told
