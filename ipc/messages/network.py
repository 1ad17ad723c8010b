"""Runs in: every process (types only). Owner: network. Caller: cri."""

from __future__ import annotations

from . import Body, Empty, IdMapping, Request, request
from .checking import Finding, Findings, Known


class PortMapping(Body):
    protocol: str  # "tcp", "udp", "sctp"
    container_port: int
    host_port: int
    host_ip: str = ""


class PodNetwork(Body):
    """Addresses and the pinned namespaces' paths by name ("net", "ipc", "uts", "user")."""

    ips: list[str]
    namespaces: dict[str, str]
    cni_result: bytes = b""  # JSON, for verbose status


@request("network.pod.setup", reply=PodNetwork, idempotent=True)
class PodSetup(Request[PodNetwork]):
    """Make and pin the pod's namespaces, set sysctls and host name in them, bring up loopback, run CNI ADD.

    Sent again after success it answers from its record. Found half done (its process died), DEL is run and
    everything begins anew. On failure nothing is left: DEL has run, the namespaces are gone.
    UNAVAILABLE while there is no CNI configuration. `namespaces` without "net" = host network. With "user"
    the others belong to that user namespace, whose mappings must be given.
    """

    pod_id: str
    name: str
    namespace: str
    uid: str
    namespaces: list[str]
    hostname: str = ""  # "" with host network
    port_mappings: list[PortMapping] = []
    dns_servers: list[str] = []
    dns_searches: list[str] = []
    dns_options: list[str] = []
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    sysctls: dict[str, str] = {}
    cgroup_parent: str = ""
    uid_mappings: list[IdMapping] = []
    gid_mappings: list[IdMapping] = []


@request("network.pod.teardown", idempotent=True)
class PodTeardown(Request[Empty]):
    """CNI DEL (also when the namespace is gone), unpin, forget. Absent is success. An error leaves the
    record, so that it can be called again."""

    pod_id: str


@request("network.pod.check", idempotent=True)
class PodCheck(Request[Empty]):
    """CNI CHECK of a pod. FAILED_PRECONDITION with the plugin's sentence if it is not as it should be."""

    pod_id: str


class NetworkState(Body):
    ready: bool
    reason: str = ""  # "NetworkPluginNotReady"
    message: str = ""
    network: str = ""
    configuration: str = ""  # path of the conflist in use


@request("network.status.get", reply=NetworkState, idempotent=True)
class StatusGet(Request[NetworkState]):
    pass


class PodsListed(Body):
    pods: list[str]


@request("network.pod.list", reply=PodsListed, idempotent=True)
class PodList(Request[PodsListed]):
    """Every pod that network still has a record or a namespace of; `cri` tears down what it does not know."""


@request("network.port.connect", idempotent=True)
class PortConnect(Request[Empty]):
    """Connect to a TCP port of the pod's loopback, IPv4 then IPv6; the reply carries the connected socket.

    A pod with host network has the node's loopback. NOT_FOUND without such a pod; UNAVAILABLE with the
    kernel's word if nobody listens; DEADLINE_EXCEEDED if nobody answers.
    """

    pod_id: str
    port: int


@request("network.store.check", reply=Findings, idempotent=True)
class StoreCheck(Request[Findings]):
    """What is wrong with records, pinned namespaces and addresses. Changes nothing."""

    known: Known


@request("network.store.mend", reply=Findings, idempotent=True)
class StoreMend(Request[Findings]):
    """Mend what a check has found: DEL, unpin, forget, one after the other."""

    known: Known
    findings: list[Finding]
