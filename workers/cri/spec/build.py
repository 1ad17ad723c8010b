"""Runs in: cri. The entry: from SpecInputs to the bytes of an OCI config.json.

Owns the top level of the runtime-spec. Every refusal is a RemoteError with a sentence for the pod's author.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ipc.messages.storage import Hook

from . import cdi, cgroups, image, linux, mounts, process, signals, validate
from .annotations import of_container, of_scope
from .inputs import Built, SpecInputs
from .notes import Notes

#: What every runtime in use reads; crun before 1.9 refuses a higher one.
OCI_VERSION = "1.0.2"
#: Said where the runtime knows it: "rro" and others stand in it.
OCI_VERSION_NEWER = "1.1.0"


def build(inputs: SpecInputs) -> Built:
    """Build the spec of one container. Raises RemoteError for what is wrong with the request or the image."""
    validate.container(inputs.config, inputs.sandbox)
    notes = Notes()
    execution = image.execution(inputs.image_config)
    path = cgroup_path(inputs)
    spec: dict[str, Any] = {
        "ociVersion": oci_version(inputs.runtime.oci_version_max),
        "process": process.process(inputs, execution, notes),
        "root": {
            "path": inputs.rootfs.rootfs,
            "readonly": inputs.config.linux.security_context.readonly_rootfs,
        },
        "mounts": mounts.mounts(inputs, notes),
        "annotations": of_container(inputs),
        "linux": linux.linux(inputs, path, notes),
    }
    spec["annotations"] |= of_scope(spec["linux"]["resources"], inputs.host)
    if hooks := inputs.rootfs.hooks:
        spec["hooks"] = {stage: [hook(one) for one in chosen] for stage, chosen in hooks.items()}
    if inputs.rootfs.cdi is not None:
        cdi.apply(spec, inputs.rootfs.cdi)
    process.check_size(spec["process"])
    return Built(
        spec=msgspec.json.encode(spec),
        cgroup_path=path.relative,
        systemd_cgroup=inputs.host.cgroup_driver == "systemd",
        stop_signal=signals.stop_signal(inputs.config, execution),
        degraded=notes.all(),
    )


def hook(hook: Hook) -> dict[str, Any]:
    made: dict[str, Any] = {"path": hook.path}
    given = {"args": hook.args, "env": hook.env, "timeout": hook.timeout}
    return made | {key: value for key, value in given.items() if value}


def cgroup_path(inputs: SpecInputs) -> cgroups.CgroupPath:
    return cgroups.cgroup_path(
        inputs.host.cgroup_driver,
        inputs.sandbox.linux.cgroup_parent,
        inputs.settings.default_cgroup_parent,
        inputs.container_id,
    )


def oci_version(newest: str) -> str:
    """The version to write, for a runtime that reads up to `newest`; what is no version counts as old."""
    try:
        known = tuple(int(part) for part in newest.partition("-")[0].split("."))
    except ValueError:
        return OCI_VERSION
    return OCI_VERSION_NEWER if known >= (1, 1, 0) else OCI_VERSION
