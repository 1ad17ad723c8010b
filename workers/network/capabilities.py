"""Runs in: network.

What the runtime tells CNI plugins about a pod, sans I/O: the values of every capability (`runtimeConfig`,
CNI conventions) and CNI_ARGS. Values that come from a pod's author are checked here; a bad one is refused,
named, before anything is made.
"""

from __future__ import annotations

import re
from typing import Any

from ipc.errors import invalid
from ipc.messages.network import PodSetup, PortMapping

_QUANTITY = re.compile(r"(?=\.?[0-9])([0-9]{0,20})(?:\.([0-9]{0,20}))?(m|[kMGTPE]|[KMGTPE]i|)\Z")
_FACTORS = {
    "": 1000,
    "m": 1,
    **{unit: 1000 ** (power + 1) for power, unit in enumerate("kMGTPE", start=1)},
    **{unit + "i": 1000 * 1024**power for power, unit in enumerate("KMGTPE", start=1)},
}  # in thousandths, as the smallest unit is one
#: Kubernetes' own bounds of a bandwidth, in bits per second.
RATE_MIN, RATE_MAX = 1000, 10**15
#: A burst is a second's worth, at least two of the largest offloaded packets, at most what the plugin takes.
BURST_MIN, BURST_MAX = 2 * 64 * 1024 * 8, 2**31 - 1
PROTOCOLS = ("tcp", "udp", "sctp")
_PORT_MAX = 65535


def runtime_config(setup: PodSetup) -> dict[str, Any]:
    """Return the value of every capability that the pod has something for. Raises INVALID_ARGUMENT."""
    config: dict[str, Any] = {
        "portMappings": [_port_mapping(port) for port in setup.port_mappings if port.host_port > 0],
        "bandwidth": bandwidth(setup.annotations),
        "dns": _dns(setup),
        "io.kubernetes.cri.pod-annotations": dict(setup.annotations),
        "aliases": [setup.name] if setup.name else [],
        "cgroupPath": setup.cgroup_parent,
    }
    return {capability: value for capability, value in config.items() if value}


def _port_mapping(port: PortMapping) -> dict[str, Any]:
    protocol = port.protocol.lower()
    if protocol not in PROTOCOLS:
        raise invalid(f"port mapping: protocol {port.protocol!r} is none of {', '.join(PROTOCOLS)}")
    if not (0 < port.container_port <= _PORT_MAX and port.host_port <= _PORT_MAX):
        raise invalid(f"port mapping {port.host_port} to {port.container_port}: no such port")
    mapping = {"hostPort": port.host_port, "containerPort": port.container_port, "protocol": protocol}
    return mapping | ({"hostIP": port.host_ip} if port.host_ip else {})


def _dns(setup: PodSetup) -> dict[str, list[str]]:
    lists = {"servers": setup.dns_servers, "searches": setup.dns_searches, "options": setup.dns_options}
    return {key: list(values) for key, values in lists.items() if values}


def bandwidth(annotations: dict[str, str]) -> dict[str, int]:
    """Return rates and bursts (bits per second, bits) of the annotations that Kubernetes defines."""
    shaped: dict[str, int] = {}
    for direction in ("ingress", "egress"):
        key = f"kubernetes.io/{direction}-bandwidth"
        if key in annotations:
            rate = _rate(key, annotations[key])
            shaped[f"{direction}Rate"] = rate
            shaped[f"{direction}Burst"] = min(max(rate, BURST_MIN), BURST_MAX)
    return shaped


def _rate(key: str, text: str) -> int:
    match = _QUANTITY.match(text)
    if match is None:
        raise invalid(f"annotation {key}: {text!r} is not a quantity such as 10M")
    whole, fraction, unit = match.groups(default="")
    rate: int = int(whole + fraction) * _FACTORS[unit] // (1000 * 10 ** len(fraction))
    if not RATE_MIN <= rate <= RATE_MAX:
        raise invalid(f"annotation {key}: {text} is not between 1k and 1P bits per second")
    return rate


def cni_args(setup: PodSetup) -> str:
    """Return CNI_ARGS of a pod. Raises INVALID_ARGUMENT for a value that would smuggle in another pair."""
    pairs = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": setup.namespace,
        "K8S_POD_NAME": setup.name,
        "K8S_POD_INFRA_CONTAINER_ID": setup.pod_id,
        "K8S_POD_UID": setup.uid,
    }
    for key, value in pairs.items():
        if any(character in ";=" or not character.isprintable() for character in value):
            raise invalid(f"{key}: {value!r} has a character that CNI_ARGS cannot carry")
    return ";".join(f"{key}={value}" for key, value in pairs.items())
