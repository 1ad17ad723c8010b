"""Runs in: nri. Sans-IO: the default validator, which needs no plugin.

It refuses adjustments that the configuration forbids, and containers that were created without a plugin
that they need: of the configuration, or of the pod's annotation `required-plugins.noderesource.dev` (a YAML
list; with `/container.NAME` after it for one container, with `/pod` or nothing for all).
"""

from __future__ import annotations

import re

from ipc.nri import nri_pb2 as pb
from ipc.settings import NriValidator

from .owners import Owners

REQUIRED = "required-plugins.noderesource.dev"
_TRUE, _FALSE = {"1", "t", "T", "true", "TRUE", "True"}, {"0", "f", "F", "false", "FALSE", "False"}
_PLAIN = r"""[^\s"'\[\]{},#:&*!|>%@`-](?:(?!:(?:\s|$))[^"'\[\]{},#])*?"""  # "a: b" is a mapping
_SCALAR = re.compile(rf"""\s*(?:"([^"\\]*)"|'([^']*)'|({_PLAIN}))\s*""")


class Rejected(Exception):
    """The adjustment is not allowed, or not complete."""


def validate(
    config: NriValidator, pod: pb.PodSandbox, container: pb.Container, owners: Owners, plugins: set[str]
) -> None:
    """Look at the collected adjustments of a container. `container` is as it was before. Raises Rejected."""
    _hooks(config, container, owners)
    _seccomp(config, container, owners)
    for field, forbidden, what in (
        (pb.Namespace, config.reject_namespace_adjustment, "namespaces"),
        (pb.Sysctl, config.reject_sysctl_adjustment, "sysctls"),
    ):
        if forbidden and (entries := owners.entries(container.id, field)):
            who = ", ".join(f"{plugin!r} ({key})" for key, plugin in sorted(entries.items()))
            raise Rejected(f"plugins must not change {what}: {who}")
    _required(config, pod, container.name, plugins)


def _hooks(config: NriValidator, container: pb.Container, owners: Owners) -> None:
    owner = owners.of(container.id, pb.OciHooks)
    if owner and config.reject_oci_hook_adjustment:
        raise Rejected(f"plugins must not add OCI hooks: {owner}")


def _seccomp(config: NriValidator, container: pb.Container, owners: Owners) -> None:
    owner = owners.of(container.id, pb.SeccompPolicy)
    if not owner:
        return
    type_ = pb.SecurityProfile.UNCONFINED
    if container.linux.HasField("seccomp_profile"):
        type_ = container.linux.seccomp_profile.profile_type
    forbidden, what = {
        pb.SecurityProfile.UNCONFINED: (config.reject_unconfined_seccomp_adjustment, "unconfined"),
        pb.SecurityProfile.RUNTIME_DEFAULT: (config.reject_runtime_default_seccomp_adjustment, "default"),
        pb.SecurityProfile.LOCALHOST: (config.reject_custom_seccomp_adjustment, "custom"),
    }[type_]
    if forbidden:
        raise Rejected(
            f"plugins must not change the seccomp policy of a container with the {what} one: {owner}"
        )


def _required(config: NriValidator, pod: pb.PodSandbox, name: str, plugins: set[str]) -> None:
    if config.tolerate_missing_annotation and _tolerates(config.tolerate_missing_annotation, pod, name):
        return
    asked = annotation(pod, REQUIRED, name)
    required = [*config.required_plugins, *(yaml_list(asked) if asked is not None else [])]
    missing = sorted(set(required) - plugins)
    if missing:
        raise Rejected(f"required plugins are not there: {', '.join(missing)}")


def _tolerates(key: str, pod: pb.PodSandbox, name: str) -> bool:
    value = annotation(pod, key, name)
    if value is not None and value not in _TRUE | _FALSE:
        raise Rejected(f"annotation {key}: {value!r} is neither true nor false")
    return value in _TRUE


def annotation(pod: pb.PodSandbox, key: str, container: str) -> str | None:
    """The value that counts for a container: its own, else the pod's."""
    for name in (f"{key}/container.{container}", f"{key}/pod", key):
        if name in pod.annotations:
            return pod.annotations[name]
    return None


def yaml_list(text: str) -> list[str]:
    """A YAML list of plain or quoted words, in either of its two styles. Raises Rejected."""
    stripped = text.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        parts = stripped[1:-1].split(",")
        parts = parts[:-1] if parts and not parts[-1].strip() else parts
    else:
        lines = [line.strip() for line in stripped.splitlines() if line.strip()]
        if any(not line.startswith("- ") for line in lines):
            raise Rejected(f"annotation {REQUIRED}: {text[:200]!r} is no YAML list of names")
        parts = [line[2:] for line in lines]
    return [_word(part, text) for part in parts]


def _word(part: str, text: str) -> str:
    found = _SCALAR.fullmatch(part)
    if found is None:
        raise Rejected(f"annotation {REQUIRED}: {text[:200]!r} is no YAML list of names")
    return next(group for group in found.groups() if group is not None)
