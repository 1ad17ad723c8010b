"""Pods with user namespaces through the whole daemon, on real runtimes."""

from __future__ import annotations

import json
import os
import stat
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

HOST, LENGTH = 400_000, 65_536
HANDLERS = ["crun", "runc"]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    machine.enter()
    with served() as images, Node(registries=images.registries_conf, bridge="bhuser0") as node:
        found = Client(node, images)
        found.pull()
        yield found


@pytest.fixture(autouse=True)
def clean(client: Client) -> Iterator[None]:
    """Whatever a test leaves running goes, and nothing of it stays."""
    yield
    client.node.remove_everything()
    assert client.node._settled_leftovers() == []


def mapping(host: int = HOST, container: int = 0, length: int = LENGTH) -> pb.IDMapping:
    return pb.IDMapping(host_id=host, container_id=container, length=length)


def mapped_config(client: Client, *, shared_pid: bool = False, **fields: Any) -> pb.PodSandboxConfig:
    config = client.pod_config(shared_pid=shared_pid, **fields)
    options = config.linux.security_context.namespace_options.userns_options
    options.mode = pb.NamespaceMode.POD
    options.uids.append(mapping())
    options.gids.append(mapping())
    return config


def running(client: Client, sandbox: pb.PodSandboxConfig, handler: str, config: Any = None) -> str:
    pod_id = client.run(sandbox, handler)
    config = config or client.container_config(["sleep", "1000"])
    container_id = client.create(pod_id, sandbox, config)
    client.start(container_id)
    return container_id


def pid_of(client: Client, container_id: str) -> int:
    return int(json.loads(client.status(container_id, verbose=True).info["info"])["pid"])


def test_the_feature_is_claimed_for_both_runtimes(client: Client) -> None:
    status = client.node.runtime.Status(pb.StatusRequest(), timeout=10)
    claimed = {handler.name: handler.features.user_namespaces for handler in status.runtime_handlers}
    assert claimed == {"": True, "crun": True, "runc": True}
    assert status.features.user_namespaces_host_network


@pytest.mark.parametrize("handler", HANDLERS)
def test_root_inside_is_nobody_outside(client: Client, handler: str) -> None:
    container_id = running(client, mapped_config(client), handler)
    assert client.output(container_id, "cat /proc/self/uid_map").split() == ["0", str(HOST), str(LENGTH)]
    assert client.output(container_id, "id -u; id -g; stat -c %u:%g / /bin/busybox").split() == [
        "0", "0", "0:0", "0:0",
    ]  # fmt: skip
    status = Path(f"/proc/{pid_of(client, container_id)}/status").read_text()
    assert f"Uid:\t{HOST}\t{HOST}\t{HOST}\t{HOST}" in status
    client.output(container_id, "echo x > /etc/new; chown 5:6 /etc/new")
    (upper,) = (client.node.state / "containers").glob("*/upper/etc/new")
    assert (upper.stat().st_uid, upper.stat().st_gid) == (HOST + 5, HOST + 6)


@pytest.mark.parametrize("handler", HANDLERS)
def test_the_pods_files_and_devices_work_for_its_root(client: Client, handler: str) -> None:
    sandbox = mapped_config(client, dns_config=pb.DNSConfig(servers=["10.0.0.10"]))
    container_id = running(client, sandbox, handler)
    script = """
    set -e
    grep -q 10.0.0.10 /etc/resolv.conf
    stat -c %u:%g /etc/resolv.conf /etc/hosts /dev/shm
    echo shared > /dev/shm/file
    echo lost > /dev/null
    head -c 4 /dev/urandom | wc -c
    cat /sys/class/net/eth0/operstate
    hostname renamed 2>/dev/null || echo no new name
    mount -t tmpfs none /tmp 2>/dev/null || echo no new mount
    """
    lines = client.output(container_id, script).splitlines()
    assert lines == ["0:0", "0:0", "0:0", "4", "up", "no new name", "no new mount"]


@pytest.mark.parametrize("handler", HANDLERS)
def test_volumes_with_the_pods_mappings_keep_their_owners(
    client: Client, handler: str, tmp_path: Path
) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    volume = tmp_path / "private/volume"
    volume.mkdir(mode=0o755)
    (volume / "data").write_text("host")
    os.chown(volume / "data", 1000, 1000)
    (tmp_path / "hosts").write_text("the kubelet's\n")
    sandbox = mapped_config(client)
    maps: dict[str, Any] = {"uidMappings": [mapping()], "gidMappings": [mapping()]}
    config = client.container_config(
        ["sleep", "1000"],
        mounts=[
            pb.Mount(container_path="/mnt", host_path=str(volume), **maps),
            pb.Mount(container_path="/ro", host_path=str(volume), readonly=True, **maps),
            pb.Mount(container_path="/etc/hosts", host_path=str(tmp_path / "hosts"), **maps),
            pb.Mount(container_path="/plain", host_path=str(volume)),
        ],
    )
    container_id = running(client, sandbox, handler, config)
    script = "stat -c %u:%g /mnt /mnt/data /etc/hosts /plain/data; echo y > /mnt/new; chown 7:8 /mnt/new;"
    script += "cat /etc/hosts; touch /ro/x || echo read-only"
    lines = client.output(container_id, f"exec 2>/dev/null; {script}").splitlines()
    assert lines == ["0:0", "1000:1000", "0:0", "65534:65534", "the kubelet's", "read-only"]
    assert ((volume / "new").stat().st_uid, (volume / "new").stat().st_gid) == (7, 8)
    client.stop(container_id)
    mounted = f"{client.node.run_root}/containers/{container_id}/"
    wait_for(lambda: mounted not in Path("/proc/self/mountinfo").read_text(), "its mounts are gone")
    assert (volume / "data").stat().st_uid == 1000


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_pod_with_one_pid_namespace_has_its_init_inside(client: Client, handler: str) -> None:
    sandbox = mapped_config(client, shared_pid=True)
    pod_id = client.run(sandbox, handler)
    ids = [client.create(pod_id, sandbox, client.container_config(["sleep", "1000"])) for _ in range(2)]
    for container_id in ids:
        client.start(container_id)
    lines = client.output(ids[0], "ps -o pid,args").splitlines()
    assert sum("sleep 1000" in line for line in lines) == 2
    assert any(line.split()[0] == "1" and "init" in line for line in lines)
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id, verbose=True)
    told = client.node.runtime.PodSandboxStatus(request, timeout=10).info["info"]
    status = Path(f"/proc/{json.loads(told)['pid']}/status").read_text()
    assert f"Uid:\t{HOST}\t{HOST}" in status
    assert "CapEff:\t0000000000000000" in status
    client.execute(ids[0], "kill", "-9", "1")
    assert client.status(ids[1]).state == pb.ContainerState.CONTAINER_RUNNING


@pytest.mark.parametrize("handler", HANDLERS)
def test_the_hosts_network_and_a_user_namespace(client: Client, handler: str) -> None:
    sandbox = mapped_config(client)
    sandbox.linux.security_context.namespace_options.network = pb.NamespaceMode.NODE
    container_id = running(client, sandbox, handler)
    found = client.output(container_id, "cat /proc/net/dev; ls -d /sys/class/net; mount")
    assert "bhuser0" in found
    assert "on /sys type sysfs (ro," in found
    assert client.execute(container_id, *SHELL, "ip link set lo mtu 9000").exit_code != 0


@pytest.mark.parametrize("handler", HANDLERS)
def test_users_terminals_and_logs(client: Client, handler: str) -> None:
    sandbox = mapped_config(client)
    pod_id = client.run(sandbox, handler)
    config = client.container_config(
        SHELL, args=["id -u; id -G; tty; echo seen > /dev/stdout; exit 4"], tty=True
    )
    config.linux.security_context.run_as_user.value = 1234
    config.linux.security_context.run_as_group.value = 4321
    config.linux.security_context.supplemental_groups.append(50)
    container_id = client.create(pod_id, sandbox, config)
    client.start(container_id)
    assert client.ended(container_id).exit_code == 4
    text = [line.strip() for line in client.log(container_id) if line.strip()]  # a line may come in parts
    assert text[0] == "1234"
    assert set(text[1].split()) == {"4321", "50"}
    assert text[2:] == ["/dev/pts/0", "seen"]
    status = client.status(container_id)
    assert (status.user.linux.uid, status.user.linux.gid) == (1234, 4321)


@pytest.mark.parametrize("handler", HANDLERS)
def test_output_can_be_opened_again(client: Client, handler: str) -> None:
    config = client.container_config(SHELL, args=["echo out > /dev/stdout; echo err > /dev/stderr"])
    config.linux.security_context.run_as_user.value = 1234
    container_id = running(client, mapped_config(client), handler, config)
    assert client.ended(container_id).exit_code == 0
    assert sorted(client.log(container_id)) == ["err", "out"]
    other = running(client, mapped_config(client), handler)
    assert client.output(other, "echo again > /dev/stdout") == "again\n"


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_privileged_container_stays_in_the_namespace(client: Client, handler: str) -> None:
    sandbox = mapped_config(client)
    sandbox.linux.security_context.privileged = True
    config = client.container_config(["sleep", "1000"])
    config.linux.security_context.privileged = True
    container_id = running(client, sandbox, handler, config)
    script = "mount -t tmpfs none /tmp && echo mounted; mknod /x c 1 3 2>/dev/null || echo no node"
    assert client.output(container_id, script).splitlines() == ["mounted", "no node"]


def test_sysctls_fit_the_groups_of_the_namespace(client: Client) -> None:
    sandbox = mapped_config(client)
    sandbox.linux.sysctls["net.ipv4.ping_group_range"] = "0 2147483647"
    sandbox.linux.sysctls["kernel.shmmax"] = "1234567"
    container_id = running(client, sandbox, "")
    text = client.output(container_id, "cat /proc/sys/net/ipv4/ping_group_range /proc/sys/kernel/shmmax")
    assert text.split() == ["0", str(LENGTH - 1), "1234567"]


def test_the_status_tells_the_mappings(client: Client) -> None:
    sandbox = mapped_config(client)
    pod_id = client.run(sandbox)
    options = client.pod_status(pod_id).linux.namespaces.options
    assert options == sandbox.linux.security_context.namespace_options


def test_mode_node_is_the_hosts_namespace(client: Client) -> None:
    sandbox = client.pod_config()
    sandbox.linux.security_context.namespace_options.userns_options.mode = pb.NamespaceMode.NODE
    container_id = running(client, sandbox, "")
    assert client.output(container_id, "cat /proc/self/uid_map").split() == ["0", "0", "4294967295"]


def test_a_users_id_outside_is_refused(client: Client) -> None:
    sandbox = mapped_config(client)
    pod_id = client.run(sandbox)
    config = client.container_config(["true"])
    config.linux.security_context.run_as_user.value = LENGTH
    assert code_of(client.create, pod_id, sandbox, config) == grpc.StatusCode.INVALID_ARGUMENT


def test_other_mappings_of_a_mount_are_refused(client: Client, tmp_path: Path) -> None:
    sandbox = mapped_config(client)
    pod_id = client.run(sandbox)
    other: dict[str, Any] = {"uidMappings": [mapping(host=500_000)], "gidMappings": [mapping()]}
    mount = pb.Mount(container_path="/mnt", host_path=str(tmp_path), **other)
    config = client.container_config(["true"], mounts=[mount])
    assert code_of(client.create, pod_id, sandbox, config) == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "uids",
    [
        [],
        [mapping(), mapping(500_000, LENGTH)],
        [mapping(container=1)],
        [mapping(host=0)],
        [mapping(length=0)],
        [mapping(host=2**32 - 2, length=2)],
    ],
    ids=["none", "two", "not from 0", "the host's root", "empty", "too far"],
)
def test_mappings_that_cannot_be_are_refused(client: Client, uids: list[pb.IDMapping]) -> None:
    sandbox = mapped_config(client)
    options = sandbox.linux.security_context.namespace_options.userns_options
    del options.uids[:]
    options.uids.extend(uids)
    assert code_of(client.run, sandbox) == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("mode", [pb.NamespaceMode.CONTAINER, pb.NamespaceMode.TARGET])
def test_modes_that_mean_nothing_here_are_refused(client: Client, mode: Any) -> None:
    sandbox = mapped_config(client)
    sandbox.linux.security_context.namespace_options.userns_options.mode = mode
    assert code_of(client.run, sandbox) == grpc.StatusCode.INVALID_ARGUMENT


def test_directories_on_the_way_are_closed_to_others(client: Client) -> None:
    container_id = running(client, mapped_config(client), "")
    home = client.node.run_root / "containers" / container_id
    found = home.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o710, 0, HOST)
