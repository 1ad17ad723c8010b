"""Runs in: cri. What a pod sandbox's config means for the processes that make the sandbox.

Owns host name, resolv.conf, sysctls and namespaces of a pod, and the path of a container's log. There is no
pause container, so what the sandbox's security context says about a process (run_as_user, seccomp and so
on) has no process to apply to; `privileged` and the namespace options do count.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping

from ipc.cri import api_pb2
from ipc.errors import invalid
from ipc.messages import network, storage

from . import userns, validate

#: Bytes of a pod's /dev/shm.
SHM_BYTES = 64 * 1024 * 1024

_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?\Z")
_SYSCTL = re.compile(r"[a-zA-Z0-9_-]+([./][a-zA-Z0-9_*-]+)+\Z")
_SYSCTL_VALUE = re.compile(r"[\x21-\x7e]+([ \t][\x21-\x7e]+)*\Z")
_IPC_SYSCTLS = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")
_PROTOCOLS = {api_pb2.TCP: "tcp", api_pb2.UDP: "udp", api_pb2.SCTP: "sctp"}
MAX_PORT = 65535
_PING = "net.ipv4.ping_group_range"


def options(config: api_pb2.PodSandboxConfig) -> api_pb2.NamespaceOption:
    """The sandbox's namespace options; unset ones are POD."""
    return config.linux.security_context.namespace_options


def host_network(config: api_pb2.PodSandboxConfig) -> bool:
    return options(config).network == api_pb2.NODE


def shares_pid(config: api_pb2.PodSandboxConfig) -> bool:
    """Whether the pod has a PID namespace of its own for all its containers, and so an init."""
    return options(config).pid == api_pb2.POD


def namespaces(config: api_pb2.PodSandboxConfig) -> list[str]:
    """The namespaces that network pins. A pod on the host's network has the host's name: no UTS either."""
    names = [] if host_network(config) else ["net", "uts"]
    if options(config).ipc != api_pb2.NODE:
        names.append("ipc")
    return [*names, "user"] if userns.of_pod(config) else names


def hostname(config: api_pb2.PodSandboxConfig, pod_id: str, node_name: str) -> str:
    """The name that processes of the pod see."""
    if host_network(config):
        return node_name
    text = config.hostname or pod_id[:12]
    if not _HOSTNAME.match(text):
        raise invalid(f"hostname: {text!r} is not a host name of at most 64 letters, digits, '-' and '.'")
    return text


def resolv_conf(dns: api_pb2.DNSConfig) -> bytes | None:
    """Content of resolv.conf(5); None where the request has nothing for it: then the host's is copied."""
    for word in (*dns.servers, *dns.searches, *dns.options):
        if not word or not word.isprintable() or " " in word:
            raise invalid(f"dns_config: {word!r} is not one word of resolv.conf")
    lines = [f"nameserver {server}" for server in dns.servers]
    if dns.searches:
        lines.insert(0, "search " + " ".join(dns.searches))
    if dns.options:
        lines.append("options " + " ".join(dns.options))
    return "".join(f"{line}\n" for line in lines).encode() or None


def sysctls(config: api_pb2.PodSandboxConfig, defaults: Mapping[str, str]) -> dict[str, str]:
    """What is set in the pod's namespaces: the node's defaults where they apply, then the request's own.

    A sysctl that is not of a namespace this pod has would change the node: INVALID_ARGUMENT.
    """
    own = {_sysctl_name(key): value for key, value in config.linux.sysctls.items()}
    for key, value in own.items():
        if not _SYSCTL_VALUE.match(value):
            raise invalid(f"sysctls: {value!r} cannot be the value of {key}")
        if not _namespaced(key, config):
            raise invalid(f"sysctls: {key} is not of a namespace that belongs to this pod")
    applicable = {_sysctl_name(key): value for key, value in defaults.items()}
    chosen = {key: value for key, value in applicable.items() if _namespaced(key, config)} | own
    if (mapped := userns.of_pod(config)) and _PING in chosen:
        chosen[_PING] = _ping_group_range(chosen[_PING], mapped.gids.length - 1)
    return chosen


def _ping_group_range(value: str, last: int) -> str:
    """The kernel takes only groups that the user namespace has: a range for everybody ends with the last."""
    numbers = value.split()
    if len(numbers) == 2 and all(number.isdigit() for number in numbers):
        return f"{numbers[0]}\t{min(int(numbers[1]), last)}"
    return value


def _sysctl_name(text: str) -> str:
    if not _SYSCTL.match(text) or ".." in text:
        raise invalid(f"sysctls: {text!r} is not the name of a sysctl")
    # sysctl(8) takes both separators; whichever comes first is the one that separates
    slash, dot = text.find("/"), text.find(".")
    if slash == -1 or (dot != -1 and dot < slash):
        return text
    return text.translate(str.maketrans("./", "/."))


def _namespaced(key: str, config: api_pb2.PodSandboxConfig) -> bool:
    names = namespaces(config)
    if key.startswith("net."):
        return "net" in names
    if key in {"kernel.hostname", "kernel.domainname"}:
        return False  # the hostname field is for that
    return key.startswith(_IPC_SYSCTLS) and "ipc" in names


def port_mappings(config: api_pb2.PodSandboxConfig) -> list[network.PortMapping]:
    """Ports of the host that lead into the pod. Those without a host port are only told, not mapped."""
    return [_port_mapping(port) for port in config.port_mappings if port.host_port > 0]


def _port_mapping(port: api_pb2.PortMapping) -> network.PortMapping:
    if port.protocol not in _PROTOCOLS:
        raise invalid(f"port_mappings: {port.protocol} is no protocol")
    if not 0 < port.container_port <= MAX_PORT or port.host_port > MAX_PORT:
        raise invalid(f"port_mappings: {port.host_port}:{port.container_port} is out of range")
    if port.host_ip:
        _check_address(port.host_ip)
    return network.PortMapping(
        protocol=_PROTOCOLS[port.protocol],
        container_port=port.container_port,
        host_port=port.host_port,
        host_ip=port.host_ip,
    )


def _check_address(text: str) -> None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise invalid(f"port_mappings: host_ip {text!r} is not an address") from None


def network_setup(
    pod_id: str, config: api_pb2.PodSandboxConfig, *, default_sysctls: Mapping[str, str]
) -> network.PodSetup:
    """The request to network, for a config that `validate.pod` let pass."""
    mapped = userns.of_pod(config)
    return network.PodSetup(
        pod_id=pod_id,
        name=config.metadata.name,
        namespace=config.metadata.namespace,
        uid=config.metadata.uid,
        namespaces=namespaces(config),
        hostname="" if host_network(config) else hostname(config, pod_id, ""),
        port_mappings=[] if host_network(config) else port_mappings(config),
        dns_servers=list(config.dns_config.servers),
        dns_searches=list(config.dns_config.searches),
        dns_options=list(config.dns_config.options),
        annotations=dict(config.annotations),
        labels=dict(config.labels),
        sysctls=sysctls(config, default_sysctls),
        cgroup_parent=config.linux.cgroup_parent,
        uid_mappings=[mapped.uids] if mapped else [],
        gid_mappings=[mapped.gids] if mapped else [],
    )


def storage_setup(pod_id: str, config: api_pb2.PodSandboxConfig, *, node_name: str) -> storage.PodSetup:
    """The request to storage, for a config that `validate.pod` let pass."""
    mapped = userns.of_pod(config)
    return storage.PodSetup(
        pod_id=pod_id,
        hostname=hostname(config, pod_id, node_name),
        resolv_conf=resolv_conf(config.dns_config),
        shm_bytes=0 if options(config).ipc == api_pb2.NODE else SHM_BYTES,
        owner_uid=mapped.uids.host_id if mapped else 0,
        owner_gid=mapped.gids.host_id if mapped else 0,
    )


def container_log_path(config: api_pb2.ContainerConfig, sandbox: api_pb2.PodSandboxConfig) -> str:
    """Where the container's log goes; "" where the request names no file or no directory for it."""
    if not config.log_path or not sandbox.log_directory:
        return ""
    directory = validate.clean_path("log_directory", sandbox.log_directory)
    relative = config.log_path
    validate.texts("log_path", [relative])
    if relative.startswith("/") or _escapes(relative.split("/")):
        raise invalid(f"log_path: {relative!r} does not stay in the log directory")
    return validate.clean_path("log_path", f"{directory}/{relative}")


def _escapes(parts: Iterable[str]) -> bool:
    parts = list(parts)
    return ".." in parts or parts[-1] in {"", "."}
