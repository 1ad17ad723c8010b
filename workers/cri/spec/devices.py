"""Runs in: cri. Device nodes of a container and the rules of its device cgroup.

Owns the default allow-list (what every container may use) and the mapping of CRI devices. Refuses a device
that storage did not find.
"""

from __future__ import annotations

from typing import Any

from ipc.cri import api_pb2
from ipc.errors import invalid
from ipc.messages.storage import DeviceInfo

from . import validate
from .inputs import SpecInputs
from .notes import Notes

_ACCESS = "rwm"
_DENY_ALL = {"allow": False, "access": _ACCESS}
_ALLOW_ALL = {"allow": True, "access": _ACCESS}


def _rule(kind: str, major: int | None, minor: int | None, access: str = _ACCESS) -> dict[str, Any]:
    numbers = {"major": major, "minor": minor}
    given = {key: number for key, number in numbers.items() if number is not None}
    return {"allow": True, "type": kind, "access": access, **given}


#: What runtimes make in every /dev (runtime-spec, "Default Devices"), and making nodes of any kind (not
#: using them), which CAP_MKNOD alone would not allow.
_DEFAULT_RULES: tuple[dict[str, Any], ...] = (
    _rule("c", None, None, "m"),
    _rule("b", None, None, "m"),
    _rule("c", 1, 3),  # null
    _rule("c", 1, 5),  # zero
    _rule("c", 1, 7),  # full
    _rule("c", 1, 8),  # random
    _rule("c", 1, 9),  # urandom
    _rule("c", 5, 0),  # tty
    _rule("c", 5, 1),  # console
    _rule("c", 5, 2),  # ptmx
    _rule("c", 136, None),  # pts
)


def devices(inputs: SpecInputs, notes: Notes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Nodes to make, and rules of the device cgroup in order."""
    nodes: dict[str, dict[str, Any]] = {}
    rules: list[dict[str, Any]] = []
    privileged = inputs.config.linux.security_context.privileged
    if privileged:
        nodes = _all_nodes(inputs, notes)
    for request in inputs.config.devices:
        for path, found in _requested(request, inputs):
            nodes[path] = _node(path, found)
            rules.append(_rule(found.type, found.major, found.minor, _permissions(request)))
    if privileged:
        return list(nodes.values()), [_ALLOW_ALL]
    return list(nodes.values()), [_DENY_ALL, *_DEFAULT_RULES, *rules]


def _all_nodes(inputs: SpecInputs, notes: Notes) -> dict[str, dict[str, Any]]:
    found = inputs.rootfs.devices
    if not found:
        notes.add("the privileged container has no devices of the host: none were found")
    return {path: _node(path, device) for device in found if (path := device.requested + device.suffix)}


def _requested(request: api_pb2.Device, inputs: SpecInputs) -> list[tuple[str, DeviceInfo]]:
    host_path = validate.clean_path("devices.host_path", request.host_path)
    target = validate.clean_path("devices.container_path", request.container_path or request.host_path)
    found = [device for device in inputs.rootfs.devices if device.requested == host_path]
    if not found:
        raise invalid(f"devices: {host_path!r} is not a device of this node")
    return [(target + device.suffix, device) for device in found]


def _node(path: str, device: DeviceInfo) -> dict[str, Any]:
    return {
        "path": path,
        "type": device.type,
        "major": device.major,
        "minor": device.minor,
        "fileMode": device.mode,
        "uid": device.uid,
        "gid": device.gid,
    }


def _permissions(request: api_pb2.Device) -> str:
    access = request.permissions or _ACCESS
    if set(access) - set(_ACCESS) or len(set(access)) != len(access):
        raise invalid(f"devices: {request.permissions!r} are no permissions: letters of rwm")
    return access
