"""Pods on real networks, made by the plugins that distributions ship."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ipc.blocking import Client
from ipc.errors import Code, RemoteError
from ipc.messages import network
from tests.support.leaks import mounts
from tests.support.network_node import CriClient, Node, node, pod_setup, serving, wait_for


@pytest.fixture
def here() -> Iterator[Node]:
    with node() as made:
        yield made


@pytest.fixture
def client(here: Node) -> Iterator[CriClient]:
    with serving(here) as made:
        yield made


def teardown(client: CriClient, pod_id: str = "pod0") -> None:
    client.call(network.PodTeardown(pod_id=pod_id))


def test_a_pod_gets_an_address_pinned_namespaces_and_its_name(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    pod = client.call(pod_setup())
    assert pod.ips == ["10.213.7.2"]
    assert list(pod.namespaces) == ["net", "ipc", "uts"]
    links = json.loads(here.run_in(pod, "ip", "-j", "addr"))
    assert {link["ifname"] for link in links} == {"lo", "eth0"}
    assert "UP" in links[0]["flags"]
    assert here.run_in(pod, "hostname").strip() == "host-of-pod0"
    with here.listening(pod, 7000):
        assert here.dial("10.213.7.2", 7000) == "hello from the pod"
    teardown(client)
    assert here.links() == {"bhtest0"}
    assert here.held_addresses() == []


def test_each_namespace_is_the_pods_own(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    pod = client.call(pod_setup())
    for kind in ("net", "ipc", "uts"):
        inside = here.run_in(pod, "readlink", f"/proc/self/ns/{kind}").strip()
        assert inside != str(Path(f"/proc/self/ns/{kind}").readlink())
    teardown(client)


def test_setup_again_answers_from_the_record(here: Node, client: CriClient) -> None:
    here.fake("counter", f'cat > /dev/null; echo x >> {here.root}/runs; echo \'{{"cniVersion":"1.0.0"}}\'\n')
    here.write_conf(
        "1.conflist", {"cniVersion": "1.0.0", "name": "testnet", "plugins": [{"type": "counter"}]}
    )
    first = client.call(pod_setup())
    assert client.call(pod_setup()) == first
    assert (here.root / "runs").read_text() == "x\n"
    teardown(client)


def test_the_result_of_the_plugins_is_told(here: Node, client: CriClient) -> None:
    here.bridge_conf(version="0.4.0")
    pod = client.call(pod_setup())
    result = json.loads(pod.cni_result)
    assert result["cniVersion"] == "0.4.0"
    assert result["ips"][0]["version"] == "4"
    assert [link["sandbox"] for link in result["interfaces"] if link.get("sandbox")] == [
        pod.namespaces["net"]
    ]
    teardown(client)


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0"])
def test_every_version_that_the_plugins_know_works(here: Node, client: CriClient, version: str) -> None:
    here.bridge_conf({"type": "portmap", "capabilities": {"portMappings": True}}, version=version)
    assert client.call(pod_setup()).ips == ["10.213.7.2"]
    client.call(network.PodCheck(pod_id="pod0"))
    teardown(client)
    assert here.held_addresses() == []


def test_the_newest_version_that_list_and_plugins_share_is_taken(here: Node, client: CriClient) -> None:
    document = {"cniVersions": ["0.4.0", "1.0.0", "1.1.0"], "name": "testnet", "plugins": [here.bridge()]}
    here.write_conf("10.conflist", document)
    assert json.loads(client.call(pod_setup()).cni_result)["cniVersion"] == "1.0.0"
    teardown(client)


def test_teardown_of_what_is_not_there_is_success(client: CriClient) -> None:
    teardown(client)
    teardown(client)


def test_teardown_gives_the_address_back_when_the_namespace_is_gone(here: Node, client: CriClient) -> None:
    here.bridge_conf({"type": "portmap", "capabilities": {"portMappings": True}})
    client.call(
        pod_setup(port_mappings=[network.PortMapping(protocol="tcp", container_port=80, host_port=8080)])
    )
    subprocess.run(["umount", "-l", here.pins / "pod0" / "net"], check=True)
    teardown(client)
    assert here.held_addresses() == []
    assert not [rule for rule in here.firewall() if "8080" in rule]


def test_teardown_works_when_the_configuration_is_gone(here: Node, client: CriClient) -> None:
    path = here.bridge_conf()
    client.call(pod_setup())
    path.unlink()
    teardown(client)
    assert here.held_addresses() == []


def test_a_changed_configuration_counts_for_the_next_pod(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    client.call(pod_setup("old"))
    entry = here.bridge(bridge="bhtest1", ipam=here.host_local("10.213.8.0/24"))
    here.write_conf("10-test.conflist", {"cniVersion": "1.0.0", "name": "testnet", "plugins": [entry]})
    assert client.call(pod_setup("new")).ips == ["10.213.8.2"]
    for pod_id in ("old", "new"):
        teardown(client, pod_id)
    assert here.held_addresses() == []


def test_two_families_are_told_in_the_results_order(here: Node, client: CriClient) -> None:
    ranges = [[{"subnet": "10.213.7.0/24"}], [{"subnet": "fd00:bead::/64"}]]
    entry = here.bridge(ipam=here.host_local() | {"ranges": ranges})
    here.write_conf("10.conflist", {"cniVersion": "1.0.0", "name": "testnet", "plugins": [entry]})
    pod = client.call(pod_setup())
    assert pod.ips == ["10.213.7.2", "fd00:bead::2"]
    with here.listening(pod, 7000, family=socket.AF_INET6):
        # The kernel first looks whether anybody else has the bridge's address.
        wait_for(lambda: here.dial("fd00:bead::2", 7000) == "hello from the pod")
    teardown(client)


def test_a_host_port_leads_to_the_pod_and_is_closed_again(here: Node, client: CriClient) -> None:
    here.bridge_conf({"type": "portmap", "capabilities": {"portMappings": True}})
    mapping = network.PortMapping(protocol="TCP", container_port=7000, host_port=18080)
    unmapped = network.PortMapping(protocol="tcp", container_port=7001, host_port=0)
    pod = client.call(pod_setup(port_mappings=[mapping, unmapped]))
    with here.listening(pod, 7000):
        assert here.dial("10.213.7.1", 18080) == "hello from the pod"
        assert here.dial("127.0.0.1", 18080) == "hello from the pod"
    teardown(client)
    assert not [rule for rule in here.firewall() if "18080" in rule or "10.213.7.2" in rule]


def test_bandwidth_annotations_shape_both_directions(here: Node, client: CriClient) -> None:
    here.bridge_conf({"type": "bandwidth", "capabilities": {"bandwidth": True}})
    annotations = {"kubernetes.io/ingress-bandwidth": "8M", "kubernetes.io/egress-bandwidth": "16M"}
    client.call(pod_setup(annotations=annotations))
    shapers = here.run("tc", "qdisc", "show")
    assert "rate 8Mbit" in shapers
    assert "rate 16Mbit" in shapers
    teardown(client)
    assert here.links() == {"bhtest0"}


def test_check_passes_and_then_names_what_is_wrong(here: Node, client: CriClient) -> None:
    here.bridge_conf({"type": "firewall"})
    pod = client.call(pod_setup())
    client.call(network.PodCheck(pod_id="pod0"))
    here.run_in(pod, "ip", "link", "set", "eth0", "down")
    here.run_in(pod, "ip", "addr", "flush", "dev", "eth0")
    with pytest.raises(RemoteError) as failure:
        client.call(network.PodCheck(pod_id="pod0"))
    assert failure.value.code is Code.FAILED_PRECONDITION
    assert 'CNI plugin "bridge", CHECK' in failure.value.text
    teardown(client)
    assert not [rule for rule in here.firewall() if "10.213.7.2" in rule]


def test_check_says_that_a_namespace_is_gone(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    client.call(pod_setup())
    subprocess.run(["umount", "-l", here.pins / "pod0" / "ipc"], check=True)
    with pytest.raises(RemoteError, match="the ipc namespace of pod pod0 is gone"):
        client.call(network.PodCheck(pod_id="pod0"))
    teardown(client)
    with pytest.raises(RemoteError) as failure:
        client.call(network.PodCheck(pod_id="pod0"))
    assert failure.value.code is Code.NOT_FOUND


def test_a_list_that_forbids_check_is_not_checked(here: Node, client: CriClient) -> None:
    document = {"cniVersion": "1.0.0", "name": "testnet", "disableCheck": True, "plugins": [here.bridge()]}
    here.write_conf("10.conflist", document)
    pod = client.call(pod_setup())
    here.run_in(pod, "ip", "addr", "flush", "dev", "eth0")
    client.call(network.PodCheck(pod_id="pod0"))
    teardown(client)


def test_ptp_and_a_file_of_one_plugin(here: Node, client: CriClient) -> None:
    single = {"cniVersion": "1.0.0", "name": "testnet", "type": "ptp", "ipam": here.host_local()}
    here.write_conf("10-single.conf", single)
    pod = client.call(pod_setup())
    with here.listening(pod, 7000):
        assert here.dial(pod.ips[0], 7000) == "hello from the pod"
    teardown(client)
    assert here.links() == set()


def test_macvlan_moves_a_link_into_the_pod(here: Node, client: CriClient) -> None:
    here.run("ip", "link", "add", "bhparent0", "type", "veth", "peer", "name", "bhparent1")
    here.run("ip", "link", "set", "bhparent0", "up")
    entry = {"type": "macvlan", "master": "bhparent0", "ipam": here.host_local()}
    here.write_conf("10.conflist", {"cniVersion": "1.0.0", "name": "testnet", "plugins": [entry]})
    pod = client.call(pod_setup())
    assert pod.ips == ["10.213.7.2"]
    assert "macvlan" in here.run_in(pod, "ip", "-d", "link", "show", "eth0")
    teardown(client)
    assert here.held_addresses() == []


def test_the_loopback_plugin_may_stand_in_a_chain(here: Node, client: CriClient) -> None:
    here.bridge_conf({"type": "loopback"}, version="1.0.0")
    assert "10.213.7.2" in client.call(pod_setup()).ips
    teardown(client)


def test_a_pod_on_the_host_network_needs_no_configuration(here: Node, client: CriClient) -> None:
    pod = client.call(pod_setup(namespaces=["ipc", "uts"]))
    assert pod.ips == []
    assert list(pod.namespaces) == ["ipc", "uts"]
    assert client.call(pod_setup(namespaces=["ipc", "uts"])) == pod
    client.call(network.PodCheck(pod_id="pod0"))
    teardown(client)


def test_a_pod_with_no_namespace_of_its_own_is_recorded(client: CriClient) -> None:
    assert client.call(pod_setup(namespaces=[], hostname="")).namespaces == {}
    assert client.call(network.PodList()).pods == ["pod0"]
    teardown(client)


def test_without_a_network_setup_is_unavailable_and_leaves_nothing(here: Node, client: CriClient) -> None:
    here.write_conf("05-broken.conflist", "{")
    with pytest.raises(RemoteError) as failure:
        client.call(pod_setup())
    assert failure.value.code is Code.UNAVAILABLE
    assert failure.value.reason == "NetworkPluginNotReady"
    assert "05-broken.conflist: not JSON" in failure.value.text


def test_sysctls_hold_in_the_pod_and_not_on_the_node(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    wanted = {
        "net.ipv4.ip_local_port_range": "20000 21000",
        "net.core.somaxconn": "77",
        "kernel.shm_rmid_forced": "1",
        "kernel.sem": "500 64000 64 512",
        "kernel.msgmax": "16384",
        "fs.mqueue.msg_max": "33",
        "kernel.domainname": "pod.example",
    }
    before = {key: Path("/proc/sys", *key.split(".")).read_text() for key in wanted}
    pod = client.call(pod_setup(sysctls=wanted))
    for key, value in wanted.items():
        inside = here.run_in(pod, "cat", "/proc/sys/" + key.replace(".", "/"))
        assert inside.split() == value.split(), key
    assert before == {key: Path("/proc/sys", *key.split(".")).read_text() for key in wanted}
    assert here.run("cat", "/proc/sys/net/core/somaxconn").strip() != "77"
    teardown(client)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kernel.core_pattern", "|/bin/false"),
        ("net.ipv4.no_such_parameter", "1"),
        ("net.core.bpf_jit_enable", "1"),
        ("net.core.somaxconn", "no number"),
        ("net.ipv4.conf", "1"),
        ("net.core.somaxconn", "1\nkernel.core_pattern=x"),
    ],
)
def test_a_sysctl_that_cannot_be_the_pods_is_refused_by_name(
    here: Node, client: CriClient, key: str, value: str
) -> None:
    here.bridge_conf()
    with pytest.raises(RemoteError) as failure:
        client.call(pod_setup(sysctls={key: value}))
    assert failure.value.code is Code.INVALID_ARGUMENT
    assert f"sysctl {key}" in failure.value.text
    assert client.call(network.PodList()).pods == []
    assert here.held_addresses() == []


def test_pods_are_made_side_by_side_and_each_is_its_own(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    names = [f"pod{number}" for number in range(8)]

    def setup(name: str) -> network.PodNetwork:
        with here.client() as own:
            return own.call(pod_setup(name))

    def remove(name: str) -> None:
        with here.client() as own:
            teardown(own, name)

    with ThreadPoolExecutor(8) as pool:
        pods = list(pool.map(setup, names))
        assert len({pod.ips[0] for pod in pods}) == len(names)
        assert client.call(network.PodList()).pods == names
        list(pool.map(remove, names))
    assert here.held_addresses() == []


def test_the_same_pod_asked_for_at_once_is_made_once(here: Node, client: CriClient) -> None:
    here.bridge_conf()

    def setup(_number: int) -> network.PodNetwork:
        with here.client() as own:
            return own.call(pod_setup())

    with ThreadPoolExecutor(4) as pool:
        pods = list(pool.map(setup, range(4)))
    assert all(pod == pods[0] for pod in pods)
    assert len(here.held_addresses()) == 1
    teardown(client)


def test_a_copy_of_a_pin_in_another_mount_namespace_does_not_keep_the_namespace(
    here: Node, client: CriClient
) -> None:
    here.bridge_conf()
    client.call(pod_setup())
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            assert len(mounts([here.pins], other.pid)) == 3
            teardown(client)
            assert mounts([here.pins], other.pid) == set()
        finally:
            other.kill()


def test_pins_without_a_record_are_listed_and_can_be_torn_down(here: Node, client: CriClient) -> None:
    here.bridge_conf()
    client.call(pod_setup(namespaces=["ipc"], hostname=""))
    (here.records / "pod0.json").unlink()
    (here.pins / "only-pid").mkdir()
    (here.pins / "only-pid" / "pid").touch()
    assert client.call(network.PodList()).pods == ["pod0"]
    teardown(client)
    assert (here.pins / "only-pid" / "pid").exists()
    (here.pins / "only-pid" / "pid").unlink()
    (here.pins / "only-pid").rmdir()


def test_a_pod_id_that_is_no_name_is_refused(client: CriClient) -> None:
    for pod_id in ("../x", "", "a/b", ".hidden", "x" * 200, "a;b"):
        with pytest.raises(RemoteError) as failure:
            client.call(pod_setup(pod_id))
        assert failure.value.code is Code.INVALID_ARGUMENT


def test_only_cri_may_change_pods(here: Node, client: CriClient) -> None:
    with Client(here.socket_path, timeout=10) as root:
        assert root.call(network.PodList()).pods == []
        with pytest.raises(RemoteError) as failure:
            root.call(pod_setup())
    assert failure.value.code is Code.PERMISSION_DENIED


def connected(client: CriClient, pod_id: str, port: int) -> socket.socket:
    _answer, fds = client.call_fds(network.PortConnect(pod_id=pod_id, port=port))
    with fds:
        return socket.socket(fileno=fds.take())


def heard(sock: socket.socket) -> bytes:
    with sock:
        sock.setblocking(True)
        sock.settimeout(10)
        return sock.recv(100)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_of_a_pods_loopback_is_reached_by_either_family(
    here: Node, client: CriClient, family: int
) -> None:
    here.bridge_conf()
    pod = client.call(pod_setup())
    with here.listening(pod, 7000, family=family):
        assert heard(connected(client, "pod0", 7000)) == b"hello from the pod"
    for pod_id, port, code in (
        ("pod0", 7001, Code.UNAVAILABLE),
        ("pod0", 0, Code.INVALID_ARGUMENT),
        ("pod1", 7000, Code.NOT_FOUND),
    ):
        with pytest.raises(RemoteError) as refused:
            connected(client, pod_id, port)
        assert refused.value.code is code
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1 port 7001: connection refused"):
        connected(client, "pod0", 7001)
    teardown(client)


def test_a_pod_with_host_network_has_the_nodes_ports(here: Node, client: CriClient) -> None:
    client.call(pod_setup(namespaces=["ipc", "uts"], hostname=""))
    node_itself = network.PodNetwork(ips=[], namespaces={"net": str(here.netns)})
    with here.listening(node_itself, 7002):
        assert heard(connected(client, "pod0", 7002)) == b"hello from the pod"
    teardown(client)
