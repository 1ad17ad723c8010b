"""What a pod's author may ask of the network: sysctls, bandwidth, ports, names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipc.errors import Code, RemoteError
from ipc.messages.network import PodSetup, PortMapping
from workers.network import namespaces, sysctl
from workers.network.capabilities import bandwidth, cni_args, runtime_config
from workers.network.pods import make_plan


def setup(**more: Any) -> PodSetup:
    fields = {"pod_id": "p", "name": "web", "namespace": "default", "uid": "u", "namespaces": ["net"]}
    return PodSetup(**{**fields, **more})


def refused(function: Any, *args: Any) -> str:
    with pytest.raises(RemoteError) as failure:
        function(*args)
    assert failure.value.code is Code.INVALID_ARGUMENT
    return failure.value.text


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("net.ipv4.tcp_syncookies", "net"),
        ("kernel.shmmax", "ipc"),
        ("kernel.shm_rmid_forced", "ipc"),
        ("kernel.msgmnb", "ipc"),
        ("kernel.sem", "ipc"),
        ("fs.mqueue.queues_max", "ipc"),
        ("kernel.domainname", "uts"),
    ],
)
def test_a_sysctl_needs_the_namespace_that_it_belongs_to(key: str, owner: str) -> None:
    sysctl.check({key: "1"}, [owner])
    others = {"net", "ipc", "uts"} - {owner}
    assert f"sysctl {key} needs the pod to have its own {owner}" in refused(sysctl.check, {key: "1"}, others)


@pytest.mark.parametrize(
    "key",
    [
        "kernel.core_pattern",
        "vm.swappiness",
        "fs.file-max",
        "kernel.semaphore",
        "kernel.sem_next_id",
        "netx.a",
    ],
)
def test_a_sysctl_of_the_node_is_refused(key: str) -> None:
    assert f"sysctl {key} is the node's" in refused(sysctl.check, {key: "1"}, ["net", "ipc", "uts"])


@pytest.mark.parametrize(
    "key",
    [
        "",
        "net",
        "net..ipv4",
        "net.ipv4.",
        ".net.x",
        "net/ipv4/x",
        "net.ipv4/../../kernel.core_pattern",
        "net.a b",
        "net.\n",
        "net.x\n",
        "NET.x",
        "net.ipv4.x=1+kernel.core_pattern",
    ],
)
def test_a_sysctl_that_is_no_name_is_refused(key: str) -> None:
    assert "is not a name of words" in refused(sysctl.check, {key: "1"}, ["net"])


@pytest.mark.parametrize("value", ["1\n2", "1\0", "1+kernel.core_pattern=x", "\x1b", "x" * 5000])
def test_a_sysctl_value_that_carries_more_than_a_value_is_refused(value: str) -> None:
    assert "is not a value" in refused(sysctl.check, {"net.core.somaxconn": value}, ["net"])


@pytest.mark.parametrize("value", ["1", "0 2147483647", "0\t10", "-1", "bbr cubic", ""])
def test_ordinary_sysctl_values_pass(value: str) -> None:
    sysctl.check({"net.core.somaxconn": value}, ["net"])


def test_sysctls_are_written_below_their_base_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "net" / "core").mkdir(parents=True)
    parameter = tmp_path / "net" / "core" / "somaxconn"
    parameter.write_text("0")
    sysctl.apply({"net.core.somaxconn": "9"}, base=str(tmp_path))
    assert parameter.read_text() == "9"
    (tmp_path / "net" / "core" / "link").symlink_to(parameter)
    with pytest.raises(RemoteError):
        sysctl.apply({"net.core.link": "1"}, base=str(tmp_path))
    assert "no such parameter" in refused(lambda: sysctl.apply({"net.core.nothing": "1"}, base=str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10M", 10_000_000),
        ("1k", 1000),
        ("1Ki", 1024),
        ("1.5G", 1_500_000_000),
        ("2000", 2000),
        (".5M", 500_000),
        ("2000000m", 2000),
        ("1P", 10**15),
    ],
)
def test_a_bandwidth_is_a_kubernetes_quantity(text: str, rate: int) -> None:
    assert bandwidth({"kubernetes.io/ingress-bandwidth": text})["ingressRate"] == rate


@pytest.mark.parametrize("text", ["", "fast", "10MB", "-1M", "1e6M", "999", "1.1P", "10 M", "0"])
def test_a_bandwidth_that_is_none_is_refused_by_its_annotation(text: str) -> None:
    assert "kubernetes.io/egress-bandwidth" in refused(bandwidth, {"kubernetes.io/egress-bandwidth": text})


def test_a_burst_holds_the_largest_packets_and_stays_in_bounds() -> None:
    slow = bandwidth({"kubernetes.io/egress-bandwidth": "1k"})
    fast = bandwidth({"kubernetes.io/egress-bandwidth": "1P"})
    assert slow["egressBurst"] >= 64 * 1024 * 8
    assert fast["egressBurst"] < 2**31


def test_only_capabilities_with_a_value_are_offered() -> None:
    assert runtime_config(setup()) == {"aliases": ["web"]}
    offered = runtime_config(
        setup(dns_servers=["1.1.1.1"], cgroup_parent="/kubepods", annotations={"a": "b"})
    )
    assert offered["dns"] == {"servers": ["1.1.1.1"]}
    assert offered["cgroupPath"] == "/kubepods"
    assert offered["io.kubernetes.cri.pod-annotations"] == {"a": "b"}


@pytest.mark.parametrize(
    ("protocol", "container_port", "host_port"),
    [("icmp", 80, 80), ("tcp", 0, 80), ("tcp", 80, 70000), ("tcp", 70000, 80)],
)
def test_a_port_mapping_that_cannot_be_is_refused(protocol: str, container_port: int, host_port: int) -> None:
    mapping = PortMapping(protocol=protocol, container_port=container_port, host_port=host_port)
    assert "port mapping" in refused(runtime_config, setup(port_mappings=[mapping]))


@pytest.mark.parametrize("field", ["name", "namespace", "uid"])
@pytest.mark.parametrize("value", ["a;K8S_POD_NAMESPACE=kube-system", "a=b", "a\nb"])
def test_a_name_cannot_smuggle_another_argument_to_plugins(field: str, value: str) -> None:
    assert "CNI_ARGS cannot carry" in refused(cni_args, setup(**{field: value}))


def test_namespaces_and_host_names_are_checked() -> None:
    assert "namespace 'pid'" in refused(namespaces.check, ["net", "pid"], "")
    assert "own uts namespace" in refused(namespaces.check, ["net"], "web")
    assert "cannot be set" in refused(namespaces.check, ["uts"], "x" * 65)
    assert "cannot be set" in refused(namespaces.check, ["uts"], "a\nb")


def test_a_plan_names_each_namespace_once_and_asks_nothing_of_cni_on_the_host_network() -> None:
    assert make_plan(setup(namespaces=["net", "net", "ipc"])).namespaces == ["net", "ipc"]
    mapping = PortMapping(protocol="tcp", container_port=80, host_port=80)
    plan = make_plan(setup(namespaces=["ipc"], port_mappings=[mapping]))
    assert (plan.args, plan.runtime_config) == ("", {})
