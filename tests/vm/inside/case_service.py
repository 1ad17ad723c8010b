"""Bulkhead as a service of systemd on cgroup v2, with both cgroup drivers and both OCI runtimes."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from supervisor.table import TABLE
from tests.support.images import Served, served
from tests.vm.inside.node import (
    CGROUPS,
    MIB,
    SERVICE,
    SHELL,
    Node,
    cgroup_of,
    children,
    processes,
    read,
    run,
    wait_for,
)

SLEEP = ["sleep", "1000"]
COUNTER = [*SHELL, "i=0; while true; do echo $i; i=$((i+1)); sleep 0.2; done"]
DRIVERS = ("cgroupfs", "systemd")
RUNTIMES = ("crun", "runc")
BASE = f"/system.slice/{SERVICE}"
MONITORS = "/bulkhead.monitors"

both_runtimes = pytest.mark.parametrize("handler", RUNTIMES)


@pytest.fixture(scope="session")
def images() -> Iterator[Served]:
    with served(larger_files=1) as found:
        yield found


@pytest.fixture(scope="session")
def swap() -> Iterator[None]:
    """Swap space, which limits of swap need."""
    run("dd", "if=/dev/zero", "of=/swap", "bs=1M", "count=32")
    run("chmod", "600", "/swap")
    run("mkswap", "/swap")
    run("swapon", "/swap")
    yield
    run("swapoff", "/swap")


@pytest.fixture(scope="session", params=DRIVERS)
def node(request: pytest.FixtureRequest, images: Served, swap: None) -> Iterator[Node]:
    found = Node(request.param, images)
    found.install()
    found.start()
    yield found
    found.stop()
    assert found.settled_leftovers() == []
    assert not (CGROUPS / MONITORS[1:]).exists()


@pytest.fixture(autouse=True)
def clean(node: Node) -> Iterator[None]:
    """Whatever a case leaves running goes, and nothing of it stays."""
    yield
    node.wait_answering()
    node.remove_everything()
    assert node.settled_leftovers() == []


def limits() -> pb.LinuxContainerResources:
    return pb.LinuxContainerResources(
        cpu_shares=512,
        cpu_quota=50_000,
        cpu_period=100_000,
        memory_limit_in_bytes=64 * MIB,
        memory_swap_limit_in_bytes=80 * MIB,
        unified={"pids.max": "40", "memory.high": str(60 * MIB)},
    )


LIMIT_FILES = {
    "memory.max": str(64 * MIB),
    "memory.swap.max": str(16 * MIB),
    "memory.high": str(60 * MIB),
    "cpu.max": "50000 100000",
    "pids.max": "40",
}


@pytest.mark.short
def case_the_service_is_ready_and_says_so(node: Node) -> None:
    assert node.property("ActiveState") == "active"
    wait_for(lambda: "kinds of worker ready" in node.property("StatusText"), "a status is told")
    status = node.runtime.Status(pb.StatusRequest(), timeout=20).status
    assert {c.type: c.status for c in status.conditions} == {"RuntimeReady": True, "NetworkReady": True}
    config = node.runtime.RuntimeConfig(pb.RuntimeConfigRequest(), timeout=20).linux
    assert pb.CgroupDriver.Name(config.cgroup_driver).lower() == node.driver


@pytest.mark.short
def case_workers_have_groups_of_their_own_with_their_limits(node: Node) -> None:
    _, container_id = node.running("", SLEEP)
    seen = set()
    for worker in node.workers():
        if worker.kind == "supervisor":
            assert cgroup_of(worker.pid) == f"{BASE}/supervisor"
        elif worker.kind == "monitor":
            assert cgroup_of(worker.pid) == MONITORS
        elif worker.pid and TABLE[worker.kind].is_worker:
            group = f"{BASE}/{worker.kind}"
            limits = TABLE[worker.kind].limits
            assert limits is not None
            assert cgroup_of(worker.pid) == group
            assert read(group, "memory.max") == str(limits.memory)
            assert read(group, "pids.max") == str(limits.pids)
            assert read(group, "cpu.weight") == str(limits.cpu_weight)
            seen.add(worker.kind)
    assert {"storage", "network", "cri"} <= seen
    assert not cgroup_of(node.pid(container_id)).startswith(BASE)


@pytest.mark.short
@both_runtimes
def case_limits_are_in_force_where_the_kubelet_looks_for_them(node: Node, handler: str) -> None:
    parent, place = node.parent(pids_max="100", memory_max=str(512 * MIB))
    pod_id, container_id = node.running(parent, SLEEP, limits(), handler=handler)
    group = node.group(place, container_id)
    assert cgroup_of(node.pid(container_id)) == group
    assert {name: read(group, name) for name in LIMIT_FILES} == LIMIT_FILES
    assert 1 < int(read(group, "cpu.weight")) < 100  # of 512 shares; runtimes round differently
    assert (read(place, "pids.max"), read(place, "memory.max")) == ("100", str(512 * MIB))
    assert int(read(group, "memory.current")) > 0
    assert "usage_usec" in read(group, "cpu.stat")
    assert int(read(group, "pids.current")) == 1
    seen_inside = node.execute(container_id, "cat", "/proc/self/cgroup", "/sys/fs/cgroup/memory.max")
    assert seen_inside.split() == ["0::/", LIMIT_FILES["memory.max"]]
    run("systemctl", "daemon-reload")
    assert {name: read(group, name) for name in LIMIT_FILES} == LIMIT_FILES
    node.remove_pod(pod_id)
    assert children(place) == []
    node.remove_parent(place)


@both_runtimes
def case_an_update_of_limits_holds_and_outlives_a_reload_of_systemd(node: Node, handler: str) -> None:
    parent, place = node.parent()
    _, container_id = node.running(parent, SLEEP, limits(), handler=handler)
    group = node.group(place, container_id)
    asked = pb.LinuxContainerResources(
        cpu_quota=80_000,
        cpu_period=100_000,
        memory_limit_in_bytes=128 * MIB,
        memory_swap_limit_in_bytes=160 * MIB,
        unified={"memory.high": str(120 * MIB), "pids.max": "50"},
    )
    request = pb.UpdateContainerResourcesRequest(container_id=container_id, linux=asked)
    node.runtime.UpdateContainerResources(request, timeout=60)
    expected = {
        "memory.max": str(128 * MIB),
        "memory.swap.max": str(32 * MIB),
        "memory.high": str(120 * MIB),
        "cpu.max": "80000 100000",
        "pids.max": "50",
    }
    assert {name: read(group, name) for name in expected} == expected
    run("systemctl", "daemon-reload")
    assert {name: read(group, name) for name in expected} == expected


@both_runtimes
def case_a_parent_in_the_other_drivers_spelling_is_understood(node: Node, handler: str) -> None:
    other = "cgroupfs" if node.driver == "systemd" else "systemd"
    parent, place = node.parent(spelling=other)
    if node.driver == "cgroupfs":  # a slice's name stands where systemd would have put it
        place = f"/kubepods.slice/kubepods-burstable.slice/{parent}"
    _, container_id = node.running(parent, SLEEP, limits(), handler=handler)
    group = node.group(place, container_id)
    assert cgroup_of(node.pid(container_id)) == group
    assert read(group, "memory.max") == LIMIT_FILES["memory.max"]


@both_runtimes
def case_a_parent_that_nobody_made_goes_with_its_last_pod(node: Node, handler: str) -> None:
    systemd = node.driver == "systemd"
    top = "/unmade.slice" if systemd else "/unmade"
    parent = "unmade-one.slice" if systemd else "/unmade/one"
    pods = [node.running(parent, SLEEP, limits(), handler=handler, shared_pid=True)[0] for _ in range(2)]
    node.remove_pod(pods[0])
    assert children(top)
    node.remove_pod(pods[1])
    wait_for(lambda: not (CGROUPS / top.strip("/")).exists(), f"{top} is removed")
    if systemd:
        assert "unmade" not in run("systemctl", "list-units", "--all", "--plain", "unmade*")


@both_runtimes
def case_apparmor_profiles_are_enforced(node: Node, handler: str) -> None:
    """Ours by default (loaded by the supervisor), one of the node's by name, none if none is asked for."""
    profile = Path("/run/bhtest-profile")
    profile.write_text("profile bhtest { file, capability, signal, deny /forbidden w, }\n")
    run("apparmor_parser", "--replace", "--skip-cache", str(profile))
    sandbox = node.pod_config()
    pod_id = node.run_pod(sandbox, handler)
    kinds = pb.SecurityProfile.ProfileType
    script = "cat /proc/self/attr/current; touch /forbidden; ls /forbidden; mount -t tmpfs x /mnt; echo end"
    seen = {}
    for kind, name in ((kinds.RuntimeDefault, ""), (kinds.Localhost, "bhtest"), (kinds.Unconfined, "")):
        chosen = pb.SecurityProfile(profile_type=kind, localhost_ref=name)
        container_id = node.start_container(pod_id, sandbox, [*SHELL, script], apparmor=chosen)
        node.ended(container_id)
        seen[kind] = node.log(container_id)
    assert seen[kinds.RuntimeDefault][:2] == ["bulkhead-default (enforce)", "/forbidden"]
    assert seen[kinds.Localhost][0] == "bhtest (enforce)"
    assert "/forbidden: Permission denied" in seen[kinds.Localhost][1]
    assert seen[kinds.Unconfined][:2] == ["unconfined", "/forbidden"]
    missing = pb.SecurityProfile(profile_type=kinds.Localhost, localhost_ref="never-loaded")
    with pytest.raises(grpc.RpcError, match="'never-loaded' is not loaded on this node"):
        node.start_container(pod_id, sandbox, SLEEP, apparmor=missing)
    run("apparmor_parser", "--remove", str(profile))


@pytest.mark.short
@both_runtimes
def case_an_out_of_memory_kill_is_recorded(node: Node, handler: str) -> None:
    parent, _ = node.parent()
    resources = pb.LinuxContainerResources(
        memory_limit_in_bytes=24 * MIB, memory_swap_limit_in_bytes=24 * MIB
    )
    command = [*SHELL, "sleep 0.3; tail /dev/zero; exit 4"]
    sandbox = node.pod_config(parent)
    pod_id = node.run_pod(sandbox, handler)
    survivor = node.ended(node.start_container(pod_id, sandbox, command, resources))
    assert survivor.reason == "OOMKilled"
    # As short as a life can be: the group's only process is the one that is killed, at once.
    for _ in range(2):
        status = node.ended(node.start_container(pod_id, sandbox, ["tail", "/dev/zero"], resources))
        assert (status.reason, status.exit_code) == ("OOMKilled", 137)
    other = node.start_container(pod_id, sandbox, SLEEP, resources)
    os.kill(node.pid(other), signal.SIGKILL)
    status = node.ended(other)
    assert (status.reason, status.exit_code) == ("Error", 137)


def started_counter(node: Node, handler: str) -> tuple[str, int]:
    parent, _ = node.parent()
    _, container_id = node.running(parent, COUNTER, limits(), handler=handler)
    wait_for(lambda: len(node.log(container_id)) > 2, "it logs")
    return container_id, node.pid(container_id)


def check_it_ran_on(node: Node, container_id: str, pid: int) -> None:
    """It is the same process with its limits, still counting; its log has every line, its end is seen."""
    node.wait_answering()
    assert node.status(container_id).state == pb.ContainerState.CONTAINER_RUNNING
    assert node.pid(container_id) == pid
    assert read(cgroup_of(pid), "memory.max") == LIMIT_FILES["memory.max"]
    had = len(node.log(container_id))
    wait_for(lambda: len(node.log(container_id)) > had + 2, "it logs on")
    assert node.execute(container_id, "echo", "hi") == "hi\n"
    node.stop_container(container_id)
    assert node.ended(container_id).exit_code == 137
    lines = node.log(container_id)
    assert lines == [str(n) for n in range(len(lines))]


@pytest.mark.short
@both_runtimes
def case_a_restart_of_the_service_leaves_containers_running(node: Node, handler: str) -> None:
    container_id, pid = started_counter(node, handler)
    before = node.property("MainPID")
    run("systemctl", "restart", "bulkhead")
    assert node.property("ActiveState") == "active"
    assert node.property("MainPID") != before
    check_it_ran_on(node, container_id, pid)


@pytest.mark.short
@both_runtimes
def case_a_kill_of_everything_in_the_service_leaves_containers_running(node: Node, handler: str) -> None:
    container_id, pid = started_counter(node, handler)
    before = node.property("MainPID")
    run("systemctl", "kill", "-s", "KILL", "bulkhead")
    wait_for(
        lambda: node.property("ActiveState") == "active" and node.property("MainPID") not in (before, "0"),
        "systemd starts it again",
    )
    check_it_ran_on(node, container_id, pid)


@pytest.mark.short
def case_a_pod_has_a_network_and_host_ports(node: Node) -> None:
    sandbox = node.pod_config(
        port_mappings=[pb.PortMapping(protocol=pb.Protocol.TCP, container_port=80, host_port=8080)]
    )
    pod_id = node.run_pod(sandbox)
    page = [*SHELL, "mkdir /www; echo served > /www/index.html; exec httpd -f -p 80 -h /www"]
    node.start_container(pod_id, sandbox, page)
    address = node.address(pod_id)
    wait_for(lambda: _listens(address, 80), "the server listens")
    # a host port is redirected for what comes in, so it is asked from another pod
    _, other = node.running("", SLEEP)
    assert node.execute(other, "wget", "-qO-", f"http://{address}/") == "served\n"
    assert node.execute(other, "wget", "-qO-", "http://10.215.0.1:8080/") == "served\n"


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), 1):
            return True
    except OSError:
        return False


def case_a_pods_init_is_counted_with_its_pod(node: Node) -> None:
    parent, place = node.parent()
    pod_id, container_id = node.running(parent, SLEEP, shared_pid=True)
    inits = [worker for worker in node.workers() if worker.kind == "init"]
    assert [cgroup_of(init.pid) for init in inits] == [f"{place}/bulkhead-init-{pod_id[:12]}"]
    assert "sleep 1000" in node.execute(container_id, "ps", "-o", "args")
    run("systemctl", "restart", "bulkhead")
    assert [w.pid for w in node.workers() if w.kind == "init"] == [inits[0].pid]
    node.remove_pod(pod_id)
    assert children(place) == []
    node.remove_parent(place)


def case_a_pod_that_names_no_parent_has_a_place_and_leaves_none(node: Node) -> None:
    pod_id, container_id = node.running("", SLEEP)
    expected = "/bulkhead.slice" if node.driver == "systemd" else "/bulkhead.pods"
    assert cgroup_of(node.pid(container_id)) == node.group(expected, container_id)
    node.remove_pod(pod_id)
    assert children(expected) == []


def case_what_a_container_has_started_ends_with_it(node: Node) -> None:
    """Processes that it leaves are dead when it is known to have stopped; its group is gone with the pod."""
    parent, place = node.parent()
    forks = [*SHELL, "(trap '' TERM; while true; do sleep 0.5; done) & exec sleep 1000"]
    pod_id, container_id = node.running(parent, forks, limits())
    group = node.group(place, container_id)
    wait_for(lambda: len(processes(group)) > 1, "it has children")
    began = time.monotonic()
    node.stop_container(container_id, 5)
    assert time.monotonic() - began < 20
    assert processes(group) == []
    node.remove_pod(pod_id)
    assert children(place) == []


def case_the_end_of_a_slice_is_the_end_of_its_containers(node: Node) -> None:
    """Whoever ends the pod's group by itself is seen to have killed its containers."""
    parent, place = node.parent()
    _, container_id = node.running(parent, SLEEP)
    if node.driver == "systemd":
        run("systemctl", "stop", place.rsplit("/", 1)[1])
    else:
        (CGROUPS / place[1:] / "cgroup.kill").write_text("1")
    assert node.ended(container_id).exit_code in (137, 143)


def case_a_frozen_container_can_be_stopped(node: Node) -> None:
    parent, place = node.parent()
    _, container_id = node.running(parent, SLEEP)
    group = node.group(place, container_id)
    (CGROUPS / group[1:] / "cgroup.freeze").write_text("1")
    node.stop_container(container_id, 1)
    assert node.ended(container_id).exit_code == 137


def case_nothing_of_the_service_is_left_in_its_group_when_it_stops(node: Node) -> None:
    _, container_id = node.running("", SLEEP)
    pid = node.pid(container_id)
    run("systemctl", "stop", "bulkhead")
    assert not (CGROUPS / BASE[1:]).exists()
    assert Path(f"/proc/{pid}").exists()
    run("systemctl", "start", "bulkhead")
    assert node.pid(container_id) == pid
