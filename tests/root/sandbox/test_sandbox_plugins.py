"""Runs in: the tests, as root. The reference CNI plugins inside the network worker's sandbox, and that each
capability of it is needed by one of them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Collection, Iterator
from typing import Any

import pytest

from ipc import kernel
from ipc.messages import IdMapping
from supervisor import sandbox
from supervisor.table import TABLE
from tests.support import sandboxed
from tests.support.sandboxed import Host
from workers.network import namespaces

PLUGINS = "/usr/lib/cni"
ENTRY = TABLE["network"].sandbox
assert ENTRY is not None
CAPABILITIES = ENTRY.capabilities


@pytest.fixture
def host() -> Iterator[Host]:
    with sandboxed.host() as here:
        yield here


def chain(base: str) -> list[dict[str, Any]]:
    subnets = [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]]
    ipam = {
        "type": "host-local",
        "dataDir": f"{base}/ipam",
        "ranges": subnets,
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    ports = [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp"}]
    rates = {f"{way}{what}": 1_000_000 for way in ("ingress", "egress") for what in ("Rate", "Burst")}
    return [
        {"type": "loopback"},
        {
            "type": "bridge",
            "bridge": "bhs0",
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": ipam,
        },
        {"type": "portmap", "snat": True, "runtimeConfig": {"portMappings": ports}},
        {"type": "firewall"},
        {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.arp_notify": "1"}, "promisc": True, "mtu": 1400},
        {"type": "bandwidth", **rates},
    ]


def call(command: str, config: dict[str, Any], netns: str, previous: Any) -> Any:
    body = {"cniVersion": "1.0.0", "name": "bhs", **config}
    if previous is not None and config["type"] != "loopback":
        body["prevResult"] = previous
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": netns,
        "CNI_IFNAME": "lo" if config["type"] == "loopback" else "eth0",
        "CNI_PATH": PLUGINS,
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run(
        [f"{PLUGINS}/{config['type']}"],
        input=json.dumps(body).encode(),
        capture_output=True,
        env=environment,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, f"{command} {config['type']}: {done.stdout.decode()} {done.stderr.decode()}"
    return json.loads(done.stdout) if command == "ADD" and config["type"] != "loopback" else previous


def life_of_a_pod(base: str) -> None:
    netns = f"{base}/net"
    with open(netns, "w"):
        pass
    in_a_child(lambda: pin(netns))
    result = None
    for config in chain(base):
        result = call("ADD", config, netns, result)
    call("CHECK", chain(base)[1], netns, result)
    for config in reversed(chain(base)):
        call("DEL", config, netns, result)
    in_a_child(lambda: kernel.setns(os.open(netns, os.O_RDONLY), kernel.CLONE_NEWNET))
    subprocess.run(["iptables-legacy", "-t", "nat", "-S"], check=True, capture_output=True)
    kernel.umount(netns)
    life_of_a_user_namespace(f"{base}/mapped")


def life_of_a_user_namespace(directory: str) -> None:
    mappings = [IdMapping(container_id=0, host_id=200_000, length=65_536)]
    pins = namespaces.paths(directory, ["net", "ipc", "uts", "user"])
    sysctls = {"kernel.shmmax": "1000000", "net.ipv4.ping_group_range": "0\t65535"}
    try:
        namespaces.make(pins, hostname="inside", sysctls=sysctls, mappings=(mappings, mappings))
    finally:
        namespaces.unpin(directory)


def pin(path: str) -> None:
    kernel.unshare(kernel.CLONE_NEWNET)
    kernel.bind_mount("/proc/self/ns/net", path)


def in_a_child(function: Any) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def trial(capabilities: Collection[str], host: Host) -> str:
    """ "ok" or the trouble, from a host network, /run and /var/lib/cni that nobody else sees."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            # A test before this one may have changed its uid: then the kernel lets nobody look into us.
            kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
            _private_host()
            assert ENTRY is not None
            entry = dataclasses.replace(ENTRY, capabilities=frozenset(capabilities))
            sandbox.enter(entry, sandbox.Identity(0, 0), host.paths)
            life_of_a_pod(str(host.base))
            outcome = "ok"
        except BaseException as error:  # noqa: BLE001 - told to the parent, and the process ends
            outcome = f"{type(error).__name__}: {error}"
        os.write(write_fd, outcome.encode()[:4000])
        os._exit(0)
    os.close(write_fd)
    os.waitpid(pid, 0)
    with os.fdopen(read_fd) as pipe:
        return pipe.read()


def _private_host() -> None:
    kernel.unshare(kernel.CLONE_NEWNET | kernel.CLONE_NEWNS)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.makedirs("/var/lib/cni", exist_ok=True)
    for directory in ("/run", "/var/lib/cni"):
        kernel.mount("private", directory, "tmpfs")


def test_the_reference_plugins_work_in_the_network_workers_sandbox(host: Host) -> None:
    assert trial(CAPABILITIES, host) == "ok"


@pytest.mark.parametrize("name", sorted(CAPABILITIES))
def test_each_capability_of_the_network_worker_is_needed(name: str, host: Host) -> None:
    assert trial(CAPABILITIES - {name}, host) != "ok"
