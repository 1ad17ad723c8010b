"""Runs in: cri. Annotations of the OCI runtime-spec.

Owns the deny-list (a runtime acts on these, so a pod must not write them: CVE-2024-3154) and our own.
Those of the image go nowhere (CVE-2026-53488).
"""

from __future__ import annotations

from collections.abc import Mapping

from .inputs import SpecInputs

#: A key that is one of these or begins with one is not passed to the runtime.
DENIED = (
    "run.oci.",
    "org.systemd.property.",
    "org.criu.config",
    "module.wasm.image",
    "bundle",
    "io.kubernetes.cri.",
)
_OWN = "io.kubernetes.cri."


def of_container(inputs: SpecInputs) -> dict[str, str]:
    """The container's, without denied ones, and ours."""
    return allowed(inputs.config.annotations) | _ours(inputs)


def allowed(requested: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in requested.items() if not key.startswith(DENIED)}


def _ours(inputs: SpecInputs) -> dict[str, str]:
    """What runtimes with a sandbox of their own read, in the words that they know."""
    pod = inputs.sandbox.metadata
    values = {
        "container-type": "container",
        "container-name": inputs.config.metadata.name,
        "sandbox-id": inputs.pod_id,
        "sandbox-name": pod.name,
        "sandbox-namespace": pod.namespace,
        "sandbox-uid": pod.uid,
        "image-id": inputs.image_id,
        "image-name": inputs.config.image.user_specified_image or inputs.config.image.image,
    }
    return {_OWN + key: value for key, value in values.items()}
