"""Runs in: cri. Container Device Interface: which devices a request names, and what they change of the spec.

Owns the two ways of asking (the field CDI_devices, annotations that begin with cdi.k8s.io/) and the order in
which edits meet what is there. What a device is, storage has read from the node's specifications.
"""

from __future__ import annotations

from typing import Any

from ipc.cri import api_pb2
from ipc.messages.storage import CdiEdits, CdiMount, CdiNode

from . import mounts

ANNOTATION_PREFIX = "cdi.k8s.io/"


def devices(config: api_pb2.ContainerConfig) -> list[str]:
    """Qualified names, each once: those of the field, then those of annotations in order of their keys."""
    names = [device.name for device in config.CDI_devices]
    for key in sorted(config.annotations):
        if key.startswith(ANNOTATION_PREFIX):
            names += [name.strip() for name in config.annotations[key].split(",")]
    return list(dict.fromkeys(names))


def apply(spec: dict[str, Any], edits: CdiEdits) -> None:
    """Change a spec. An edit wins over what is there: variables, nodes and mounts of the same name."""
    process, linux = spec["process"], spec["linux"]
    process["env"] = _environment(process["env"], edits.env)
    groups = [*process["user"]["additionalGids"], *edits.additional_gids]
    process["user"]["additionalGids"] = list(dict.fromkeys(groups))
    linux["devices"] = _nodes(linux["devices"], edits.nodes, process["user"])
    linux["resources"]["devices"] += [_rule(node) for node in edits.nodes if node.permissions]
    spec["mounts"] = _mounts(spec["mounts"], edits.mounts)
    if edits.intel_rdt:
        linux["intelRdt"] = edits.intel_rdt


def _environment(env: list[str], added: list[str]) -> list[str]:
    variables = dict(entry.partition("=")[::2] for entry in [*env, *added])
    return [f"{key}={value}" for key, value in variables.items()]


def _nodes(present: list[dict[str, Any]], added: list[CdiNode], user: dict[str, Any]) -> list[dict[str, Any]]:
    nodes = {node["path"]: node for node in present}
    for node in added:
        nodes[node.path] = _node(node, user)
    return list(nodes.values())


def _node(node: CdiNode, user: dict[str, Any]) -> dict[str, Any]:
    """Whose node it is when nobody says: the process's own, so that it can open it."""
    made: dict[str, Any] = {"path": node.path, "type": node.type}
    if node.type != "p":
        made |= {"major": node.major, "minor": node.minor}
    if node.mode is not None:
        made["fileMode"] = node.mode
    made["uid"] = user["uid"] if node.uid is None else node.uid
    made["gid"] = user["gid"] if node.gid is None else node.gid
    return made


def _rule(node: CdiNode) -> dict[str, Any]:
    rule: dict[str, Any] = {"allow": True, "type": node.type, "major": node.major, "minor": node.minor}
    return rule | {"access": node.permissions}


def _mounts(present: list[mounts.Mount], added: list[CdiMount]) -> list[mounts.Mount]:
    if not added:
        return present
    replaced = {mount.destination for mount in added}
    kept = [mount for mount in present if mount["destination"] not in replaced]
    new = [
        {
            "destination": mount.destination,
            "type": mount.type,
            "source": mount.source,
            "options": mount.options,
        }
        for mount in added
    ]
    return mounts.in_order([*kept, *new])
