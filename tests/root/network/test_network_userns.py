"""Pods with a user namespace: their other namespaces belong to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import Code, RemoteError
from ipc.messages import IdMapping, network
from tests.support.network_node import CriClient, Node, node, pod_setup, serving

MAPPING = IdMapping(container_id=0, host_id=200_000, length=65_536)


@pytest.fixture
def here() -> Iterator[Node]:
    with node() as made:
        made.bridge_conf({"type": "portmap", "capabilities": {"portMappings": True}})
        yield made


@pytest.fixture
def client(here: Node) -> Iterator[CriClient]:
    with serving(here) as made:
        yield made


def mapped(**fields: Any) -> network.PodSetup:
    namespaces = fields.pop("namespaces", ["net", "ipc", "uts", "user"])
    request = pod_setup(namespaces=namespaces, **fields)
    request.uid_mappings = [MAPPING]
    request.gid_mappings = [MAPPING]
    return request


def test_the_namespaces_belong_to_the_pods_user_namespace(here: Node, client: CriClient) -> None:
    pod = client.call(mapped())
    assert set(pod.namespaces) == {"net", "ipc", "uts", "user"}
    assert pod.ips == ["10.213.7.2"]
    assert here.run_in(pod, "cat", "/proc/self/uid_map").split() == ["0", "200000", "65536"]
    assert here.run_in(pod, "cat", "/proc/self/gid_map").split() == ["0", "200000", "65536"]
    # only the owner's root may do these
    here.run_in(pod, "ip", "link", "set", "lo", "mtu", "9000")
    here.run_in(pod, "hostname", "renamed")
    client.call(network.PodTeardown(pod_id="pod0"))
    assert not (here.pins / "pod0").exists()
    assert here.held_addresses() == []


def test_sysctls_of_every_namespace_are_set_in_its_own_ids(here: Node, client: CriClient) -> None:
    sysctls = {
        "net.ipv4.ping_group_range": "0 65535",
        "net.ipv4.ip_unprivileged_port_start": "80",
        "kernel.shmmax": "1000000",
        "kernel.msgmax": "9000",
        "fs.mqueue.msg_max": "20",
    }
    pod = client.call(mapped(sysctls=sysctls))
    assert here.run_in(pod, "hostname").strip() == "host-of-pod0"
    for key, value in sysctls.items():
        path = "/proc/sys/" + key.replace(".", "/")
        assert here.run_in(pod, "cat", path).split() == value.split()
    client.call(network.PodTeardown(pod_id="pod0"))


def test_a_refused_sysctl_leaves_nothing_and_names_the_key(here: Node, client: CriClient) -> None:
    with pytest.raises(RemoteError) as caught:
        client.call(mapped(sysctls={"net.ipv4.ping_group_range": "0 2147483647"}))
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert "ping_group_range" in caught.value.text
    assert not (here.pins / "pod0").exists()


def test_a_pod_on_the_hosts_network_can_have_one_too(here: Node, client: CriClient) -> None:
    pod = client.call(mapped(namespaces=["ipc", "user"], hostname=""))
    assert set(pod.namespaces) == {"ipc", "user"}
    assert pod.ips == []
    client.call(network.PodTeardown(pod_id="pod0"))


def test_setup_again_answers_the_same_namespace(here: Node, client: CriClient) -> None:
    first = client.call(mapped())
    inode = Path(first.namespaces["user"]).stat().st_ino
    assert client.call(mapped()) == first
    assert Path(first.namespaces["user"]).stat().st_ino == inode
    client.call(network.PodTeardown(pod_id="pod0"))


@pytest.mark.parametrize(
    "mappings",
    [
        [],
        [MAPPING, MAPPING],
        [IdMapping(container_id=1, host_id=200_000, length=10)],
        [IdMapping(container_id=0, host_id=0, length=10)],
        [IdMapping(container_id=0, host_id=200_000, length=0)],
        [IdMapping(container_id=0, host_id=2**32 - 5, length=10)],
    ],
)
def test_mappings_that_cannot_be_are_refused(
    here: Node, client: CriClient, mappings: list[IdMapping]
) -> None:
    request = mapped()
    request.uid_mappings = mappings
    with pytest.raises(RemoteError) as caught:
        client.call(request)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert not (here.pins / "pod0").exists()
