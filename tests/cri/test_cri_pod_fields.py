"""Fields of pods through the whole daemon: ports, addresses, sysctls, names, cgroups, handlers, status."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.cri_client import SHELL, Client, code_of
from tests.support.daemon import Node, wait_for
from tests.support.images import served

#: Of this module alone: bridges of others may still stand, and have routes.
SUBNET, SUBNET6 = "10.215.0.0/16", "fd14:215::/64"
BRIDGE = "bhpod0"
HOST = "10.90.90.1"  # an address of the node besides those of the bridge
HOST6 = "fd90:90::1"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    machine.enter()
    with served() as images, host_addresses():
        node = Node(registries=images.registries_conf, bridge=BRIDGE)
        make_dual_stack(node)
        with node:
            found = Client(node, images)
            found.pull()
            yield found


def make_dual_stack(node: Node) -> None:
    path = node.conf_dir / "10-test.conflist"
    document = json.loads(path.read_text())
    ipam = document["plugins"][0]["ipam"]
    ipam["ranges"] = [[{"subnet": SUBNET}], [{"subnet": SUBNET6}]]
    ipam["routes"].append({"dst": "::/0"})
    path.write_text(json.dumps(document))


@contextlib.contextmanager
def host_addresses() -> Iterator[None]:
    for address, length in ((HOST, 32), (HOST6, 128)):
        command = ["ip", "addr", "add", f"{address}/{length}", "dev", "lo", "nodad"]
        subprocess.run([word for word in command if ":" in address or word != "nodad"], check=True)
    try:
        yield
    finally:
        for address, length in ((HOST, 32), (HOST6, 128)):
            subprocess.run(["ip", "addr", "del", f"{address}/{length}", "dev", "lo"], check=True)


@pytest.fixture(autouse=True)
def clean(client: Client) -> Iterator[None]:
    """Whatever a test leaves running goes, and nothing of it stays."""
    yield
    client.node.remove_everything()
    assert client.node._settled_leftovers() == []


def port(container: int, host: int, protocol: Any = pb.Protocol.TCP, host_ip: str = "") -> pb.PortMapping:
    return pb.PortMapping(protocol=protocol, container_port=container, host_port=host, host_ip=host_ip)


def said(kind: socket.SocketKind, address: str, number: int) -> bytes:
    """What a server answers, b"" if there is none."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as sock, contextlib.suppress(OSError):
        sock.settimeout(1)
        sock.connect((address, number))
        sock.send(b"?\n")
        return sock.recv(100)
    return b""


def dial(address: str, number: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> bytes:
    return wait_for(lambda: said(kind, address, number), f"an answer of {address}:{number}")


# -- addresses and ports ----------------------------------------------------------------------------------


def test_a_pod_has_an_address_of_each_family(client: Client) -> None:
    pod_id, container_id = client.running()
    network = client.pod_status(pod_id).network
    others = [other.ip for other in network.additional_ips]
    assert ipaddress.ip_address(network.ip) in ipaddress.ip_network(SUBNET)
    assert [ipaddress.ip_address(ip) in ipaddress.ip_network(SUBNET6) for ip in others] == [True]
    inside = client.output(container_id, "ip -o addr show eth0")
    assert network.ip in inside
    assert others[0] in inside


@pytest.mark.parametrize("address", [HOST, HOST6, "127.0.0.1"])
def test_a_host_port_leads_into_the_pod(client: Client, address: str) -> None:
    server = "while true; do nc -l -p 80 -e echo from the pod; done"
    client.running(*SHELL, server, port_mappings=[port(80, 8080), port(81, 0)])
    assert dial(address, 8080) == b"from the pod\n"


def test_a_host_port_with_an_address_is_on_that_one_only(client: Client) -> None:
    server = "while true; do nc -l -p 80 -e echo from the pod; done"
    mappings = [port(80, 8081, host_ip=HOST), port(80, 8082, host_ip=HOST6)]
    client.running(*SHELL, server, port_mappings=mappings)
    assert dial(HOST, 8081) == b"from the pod\n"
    assert dial(HOST6, 8082) == b"from the pod\n"
    gateway = str(next(ipaddress.ip_network(SUBNET).hosts()))
    assert said(socket.SOCK_STREAM, gateway, 8081) == b""
    assert said(socket.SOCK_STREAM, HOST, 8082) == b""


_DATAGRAMS = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", 53))
while True:
    _, peer = sock.recvfrom(100)
    sock.sendto(b"a datagram", peer)
"""


def test_udp_ports_are_mapped_too(client: Client) -> None:
    _, container_id = client.running(port_mappings=[port(53, 8053, pb.Protocol.UDP)])
    pid = json.loads(client.status(container_id, verbose=True).info["info"])["pid"]
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-c", _DATAGRAMS]
    with subprocess.Popen(command) as server:
        try:
            assert dial(HOST, 8053, socket.SOCK_DGRAM) == b"a datagram"
        finally:
            server.kill()


def test_sctp_ports_reach_the_rules(client: Client) -> None:
    pod_id = client.run(client.pod_config(port_mappings=[port(3868, 8068, pb.Protocol.SCTP)]))
    assert client.pod_status(pod_id).state == pb.PodSandboxState.SANDBOX_READY
    rules = subprocess.run(["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True).stdout
    assert any("-p sctp" in rule and "8068" in rule for rule in rules.splitlines())


@pytest.mark.parametrize(
    "mapping",
    [port(0, 80), port(70_000, 80), port(80, 70_000), port(80, 80, 9), port(80, 80, host_ip="no address")],
    ids=["no port", "container port", "host port", "protocol", "host ip"],
)
def test_ports_that_cannot_be_are_refused(client: Client, mapping: pb.PortMapping) -> None:
    config = client.pod_config(port_mappings=[mapping])
    assert code_of(client.run, config) == grpc.StatusCode.INVALID_ARGUMENT


# -- sysctls ----------------------------------------------------------------------------------------------


def with_sysctls(client: Client, **options: Any) -> pb.PodSandboxConfig:
    sysctls = options.pop("sysctls")
    config = client.pod_config()
    config.linux.sysctls.update(sysctls)
    for name, mode in options.items():
        setattr(config.linux.security_context.namespace_options, name, mode)
    return config


def test_safe_and_unsafe_sysctls_of_the_pods_namespaces_are_set(client: Client) -> None:
    sysctls = {
        "net.ipv4.ip_local_port_range": "10000 20000",
        "net/ipv4/ip_unprivileged_port_start": "0",
        "net.ipv4.ping_group_range": "0 2147483647",
        "net.core.somaxconn": "777",
        "kernel.shm_rmid_forced": "1",
        "kernel.msgmax": "65000",
        "kernel.sem": "32000 1024000000 500 32000",
        "fs.mqueue.queues_max": "512",
    }
    sandbox = with_sysctls(client, sysctls=sysctls)
    pod_id = client.run(sandbox)
    container_id = client.create(pod_id, sandbox, client.container_config(["sleep", "1000"]))
    client.start(container_id)
    before = Path("/proc/sys/kernel/msgmax").read_text()
    for key, value in sysctls.items():
        path = "/proc/sys/" + key.replace(".", "/")
        assert client.output(container_id, f"cat {path}").split() == value.split(), key
    assert Path("/proc/sys/kernel/msgmax").read_text() == before


@pytest.mark.parametrize(
    ("sysctls", "options"),
    [
        ({"kernel.panic": "1"}, {}),
        ({"vm.swappiness": "1"}, {}),
        ({"fs.file-max": "1"}, {}),
        ({"kernel.hostname": "x"}, {}),
        ({"net.no.such.thing": "1"}, {}),
        ({"net.core.somaxconn": "1\nkernel.panic=1"}, {}),
        ({"net.core.somaxconn+kernel.panic": "1"}, {}),
        ({"net.core.somaxconn": "1+kernel.panic=1"}, {}),
        ({"net..core": "1"}, {}),
        ({"net.ipv4.../../kernel/panic": "1"}, {}),
        ({"net.core.somaxconn": ""}, {}),
        ({"net.core.somaxconn": "many"}, {}),
        ({"net.core.somaxconn": "5"}, {"network": pb.NamespaceMode.NODE}),
        ({"kernel.msgmax": "5"}, {"ipc": pb.NamespaceMode.NODE}),
    ],
)
def test_sysctls_that_are_not_the_pods_are_refused(
    client: Client, sysctls: dict[str, str], options: dict[str, Any]
) -> None:
    config = with_sysctls(client, sysctls=sysctls, **options)
    assert code_of(client.run, config) == grpc.StatusCode.INVALID_ARGUMENT


# -- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "web-0", "web.example.com", "A" * 64])
def test_host_names(client: Client, name: str) -> None:
    _, container_id = client.running(hostname=name)
    assert client.output(container_id, "hostname; cat /etc/hostname").split() == [name, name]
    hosts = client.output(container_id, "cat /etc/hosts").splitlines()
    assert any(line.split()[1:] == [name] for line in hosts)


def test_without_a_host_name_the_id_is_one(client: Client) -> None:
    pod_id, container_id = client.running()
    assert client.output(container_id, "hostname").strip() == pod_id[:12]


@pytest.mark.parametrize("name", ["A" * 65, "a b", "a\nb", "-a", "a-", "a/b", "a\0b", "ü"])
def test_host_names_that_cannot_be_are_refused(client: Client, name: str) -> None:
    config = client.pod_config(hostname=name)
    assert code_of(client.run, config) == grpc.StatusCode.INVALID_ARGUMENT


def test_dns_in_every_part(client: Client) -> None:
    servers, searches = ["10.0.0.10", "fd00::10"], [f"s{number}.local" for number in range(32)]
    dns = pb.DNSConfig(servers=servers, searches=searches, options=["ndots:5", "timeout:1", "rotate"])
    _, container_id = client.running(dns_config=dns)
    lines = client.output(container_id, "cat /etc/resolv.conf").splitlines()
    assert lines == [
        f"search {' '.join(searches)}",
        *(f"nameserver {server}" for server in servers),
        "options ndots:5 timeout:1 rotate",
    ]


def test_without_dns_the_nodes_is_copied(client: Client) -> None:
    _, container_id = client.running()
    here = Path("/etc/resolv.conf").read_text() if Path("/etc/resolv.conf").exists() else ""
    assert client.output(container_id, "cat /etc/resolv.conf") == here


@pytest.mark.parametrize("word", ["", "a b", "a\nnameserver 6.6.6.6"])
def test_dns_words_that_would_say_more_are_refused(client: Client, word: str) -> None:
    for part in ("servers", "searches", "options"):
        dns = pb.DNSConfig()
        getattr(dns, part).append(word)
        assert code_of(client.run, client.pod_config(dns_config=dns)) == grpc.StatusCode.INVALID_ARGUMENT


# -- cgroups ----------------------------------------------------------------------------------------------


def groups_of(path: str) -> set[Path]:
    """The directories of a group in all hierarchies."""
    found = {each for each in Path("/sys/fs/cgroup").glob(f"*/{path.strip('/')}") if each.is_dir()}
    return {each for each in found if not each.is_relative_to(machine.UNIFIED)}  # no group: see there


@pytest.mark.parametrize(
    ("parent", "path"),
    [
        ("/bhtest/burstable/pod1", "/bhtest/burstable/pod1"),
        ("bhtest/pod2/", "/bhtest/pod2"),
        ("bhtest-burstable-pod3.slice", "/bhtest.slice/bhtest-burstable.slice/bhtest-burstable-pod3.slice"),
    ],
)
@pytest.mark.parametrize("shared_pid", [False, True])
def test_cgroup_parents_in_both_spellings(client: Client, parent: str, path: str, shared_pid: bool) -> None:
    sandbox = client.pod_config(shared_pid=shared_pid)
    sandbox.linux.cgroup_parent = parent
    pod_id = client.run(sandbox)
    container_id = client.create(pod_id, sandbox, client.container_config(["sleep", "1000"]))
    client.start(container_id)
    pid = json.loads(client.status(container_id, verbose=True).info["info"])["pid"]
    groups = Path(f"/proc/{pid}/cgroup").read_text()
    assert f"{path}/bulkhead-{container_id}" in groups
    client.remove_pod(pod_id)
    top = path.split("/")[1]
    assert groups_of(top) == set(), "nobody had made it before the pod"


def test_a_cgroup_parent_that_was_there_stays(client: Client) -> None:
    """Also if its pods outlive the daemon that saw it; what a runtime added below is gone."""
    kubelets = Path("/sys/fs/cgroup/memory/bhkept")
    kubelets.mkdir()
    try:
        sandbox = client.pod_config(shared_pid=True)
        sandbox.linux.cgroup_parent = "/bhkept/made"
        pod_id = client.run(sandbox)
        client.start(client.create(pod_id, sandbox, client.container_config(["sleep", "1000"])))
        assert groups_of("/bhkept/made")
        client.node.stop()
        client.node.start()
        client.remove_pod(pod_id)
        assert groups_of("/bhkept") == {kubelets}
        assert groups_of("/bhkept/made") == set()
    finally:
        kubelets.rmdir()


@pytest.mark.parametrize("parent", ["../x", "/a/../../x", "a\0b", "a:b", "-.slice:x", "a--b.slice", "a\nb"])
def test_cgroup_parents_that_lead_elsewhere_are_refused(client: Client, parent: str) -> None:
    config = client.pod_config()
    config.linux.cgroup_parent = parent
    assert code_of(client.run, config) == grpc.StatusCode.INVALID_ARGUMENT


# -- namespaces -------------------------------------------------------------------------------------------

Mode = pb.NamespaceMode


def namespaces_of(client: Client, container_id: str) -> dict[str, str]:
    pid = json.loads(client.status(container_id, verbose=True).info["info"])["pid"]
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in ("net", "ipc", "uts", "pid", "mnt")}


def in_pod(
    client: Client, pod: pb.PodSandboxConfig, handler: str, modes: list[pb.NamespaceOption]
) -> list[str]:
    """A pod with a running container for each of the options."""
    pod_id = client.run(pod, handler)
    made = []
    for options in modes:
        config = client.container_config(["sleep", "1000"])
        config.linux.security_context.namespace_options.CopyFrom(options)
        made.append(client.create(pod_id, pod, config))
        client.start(made[-1])
    return made


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_namespaces_are_shared_as_asked_for(client: Client, handler: str) -> None:
    own = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("net", "ipc", "uts", "pid", "mnt")}
    nodes = pb.NamespaceOption(network=Mode.NODE, pid=Mode.NODE, ipc=Mode.NODE)
    pod = client.pod_config()
    pod.linux.security_context.namespace_options.CopyFrom(nodes)
    [found] = in_pod(client, pod, handler, [nodes])
    seen = namespaces_of(client, found)
    assert [seen[name] == own[name] for name in own] == [True, True, True, True, False]
    for pid_mode, same in ((Mode.CONTAINER, False), (Mode.POD, True)):
        pod = client.pod_config(shared_pid=pid_mode == Mode.POD)
        pods = pb.NamespaceOption(pid=pid_mode)
        first, second = (namespaces_of(client, c) for c in in_pod(client, pod, handler, [pods, pods]))
        assert not set(first.values()) & set(own.values())
        assert {name for name in first if first[name] == second[name]} == (
            {"net", "ipc", "uts", "pid"} if same else {"net", "ipc", "uts"}
        )


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_a_container_joins_the_processes_of_another_one_of_its_pod(client: Client, handler: str) -> None:
    pod = client.pod_config()
    alone = pb.NamespaceOption(pid=Mode.CONTAINER)
    [target, other] = in_pod(client, pod, handler, [alone, alone])
    pod_id = client.run(pod, handler)

    def debug(of: str) -> str:
        config = client.container_config(["sleep", "1000"])
        options = pb.NamespaceOption(pid=Mode.TARGET, target_id=of)
        config.linux.security_context.namespace_options.CopyFrom(options)
        return client.create(pod_id, pod, config)

    debugger = debug(target)
    client.start(debugger)
    seen = [namespaces_of(client, found) for found in (target, debugger, other)]
    assert seen[0]["pid"] == seen[1]["pid"] != seen[2]["pid"]
    assert client.output(debugger, "cat /proc/1/cmdline").startswith("sleep")
    client.stop(other)
    _, elsewhere = client.running()
    for of, code in (
        (other, grpc.StatusCode.FAILED_PRECONDITION),
        (elsewhere, grpc.StatusCode.FAILED_PRECONDITION),
        ("f" * 64, grpc.StatusCode.NOT_FOUND),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
    ):
        assert code_of(debug, of) == code


# -- handlers, status -------------------------------------------------------------------------------------


def test_a_runtime_handler_is_told_and_an_unknown_one_refused(client: Client) -> None:
    for handler in ("", "crun", "runc"):
        pod_id = client.run(client.pod_config(), handler)
        assert client.pod_status(pod_id).runtime_handler == handler
    assert code_of(client.run, client.pod_config(), "kata") == grpc.StatusCode.INVALID_ARGUMENT


def test_the_status_has_every_field(client: Client) -> None:
    sandbox = client.pod_config(labels={"app": "web"}, annotations={"note": "kept"})
    pod_id = client.run(sandbox, "runc")
    status = client.pod_status(pod_id)
    assert (status.id, status.metadata, status.runtime_handler) == (pod_id, sandbox.metadata, "runc")
    assert (dict(status.labels), dict(status.annotations)) == ({"app": "web"}, {"note": "kept"})
    assert status.state == pb.PodSandboxState.SANDBOX_READY
    assert status.created_at > 1_700_000_000 * 10**9
    assert status.linux.namespaces.options == sandbox.linux.security_context.namespace_options
    listed = client.node.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=10).items
    assert [(item.id, item.runtime_handler, item.created_at) for item in listed] == [
        (pod_id, "runc", status.created_at)
    ]
    stop = pb.StopPodSandboxRequest(pod_sandbox_id=pod_id)
    client.node.runtime.StopPodSandbox(stop, timeout=30)
    after = client.pod_status(pod_id)
    assert after.state == pb.PodSandboxState.SANDBOX_NOTREADY
    assert after.network.ip == ""


def test_shared_memory_is_the_pods(client: Client) -> None:
    sandbox = client.pod_config()
    pod_id = client.run(sandbox)
    ids = [client.create(pod_id, sandbox, client.container_config(["sleep", "1000"])) for _ in range(2)]
    for container_id in ids:
        client.start(container_id)
    client.output(ids[0], "echo shared > /dev/shm/file")
    assert client.output(ids[1], "cat /dev/shm/file") == "shared\n"
    size = client.output(ids[1], "df -k /dev/shm | tail -1").split()[1]
    assert size == str(64 * 1024)
    assert not os.path.exists("/dev/shm/file")
