"""Runs in: cri. Capabilities of a container's processes: capabilities(7), `process.capabilities`.

Owns the rules of add, drop, ALL and ambient. Refuses names the kernel has never had. What the node itself
does not have no container can get: it is left out with a note, since a runtime would fail on it.
"""

from __future__ import annotations

from collections.abc import Iterable

from ipc.capabilities import NAMES as KNOWN
from ipc.cri import api_pb2
from ipc.errors import invalid

from .inputs import SpecInputs
from .notes import Notes

#: In the order of their numbers.
NAMES = tuple(f"CAP_{name}" for name in KNOWN)
#: Given where neither the configuration nor the request says otherwise.
DEFAULT: tuple[str, ...] = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
)
ALL = "ALL"


def sets(inputs: SpecInputs, notes: Notes) -> dict[str, list[str]]:
    """The five sets. Inheritable is empty but for ambient ones: else a program with file capabilities would
    get more than its user may have (CVE-2022-24769)."""
    granted = effective(inputs)
    ambient = _names(inputs.config.linux.security_context.capabilities.add_ambient_capabilities)
    ambient = granted if ALL in ambient else ambient
    given = _ordered(_clamped(granted | ambient, inputs, notes))
    raised = [name for name in given if name in ambient]
    return {
        "bounding": given,
        "effective": given,
        "permitted": given,
        "inheritable": raised,
        "ambient": raised,
    }


def effective(inputs: SpecInputs) -> frozenset[str]:
    """What the request grants, before the node is asked; ambient ones not counted."""
    context = inputs.config.linux.security_context
    if context.privileged:
        return frozenset(NAMES)
    return requested(context.capabilities, inputs.settings.default_capabilities or DEFAULT)


def requested(request: api_pb2.Capability, default: Iterable[str]) -> frozenset[str]:
    """ALL is applied first, add before drop; then each name: added, then dropped."""
    add, drop = _names(request.add_capabilities), _names(request.drop_capabilities)
    granted = _names(default)
    if ALL in add:
        granted = frozenset(NAMES)
    if ALL in drop:
        granted = frozenset()
    return (granted | add) - drop - {ALL}


def _names(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(_name(text) for text in texts)


def _name(text: str) -> str:
    upper = text.upper()
    name = upper if upper == ALL or upper.startswith("CAP_") else f"CAP_{upper}"
    if name != ALL and name not in NAMES:
        raise invalid(f"capabilities: {text!r} is not the name of a capability")
    return name


def _clamped(wanted: frozenset[str], inputs: SpecInputs, notes: Notes) -> frozenset[str]:
    missing = wanted - frozenset(inputs.host.capabilities)
    if missing:
        names = ", ".join(_ordered(missing))
        notes.add(f"the container goes without {names}: Bulkhead itself does not have it on this node")
    return wanted - missing


def _ordered(names: Iterable[str]) -> list[str]:
    wanted = frozenset(names)
    return [name for name in NAMES if name in wanted]
