"""The Debian package on a node with cgroup v2 and all limits, in the order of the file: pods with limits
through systemd, restart, kill, upgrade while pods come and go, removal.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from tests.packaging.inside.node import LIBRARY, InstalledNode, Survivor, attempt, restarted, run, wait_for
from tests.support import packages
from tests.support.images import served
from tests.vm.inside.node import MIB, cgroup_of, read

FIRST, SECOND = str(packages.package("deb1")), str(packages.package("deb2"))
LIMITS = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB, cpu_quota=50_000, cpu_period=100_000)


@pytest.fixture(scope="session")
def node() -> Iterator[InstalledNode]:
    with served(larger_files=1) as images:
        found = InstalledNode("systemd", images)
        found.configure(runtime="crun")
        run("dpkg", "--install", FIRST)
        found.pull()
        yield found


@pytest.fixture(scope="session")
def survivor(node: InstalledNode) -> Survivor:
    parent, _ = node.parent(memory_max=str(256 * MIB))
    return Survivor(node, parent, LIMITS)


def check(survivor: Survivor) -> None:
    """It runs on, with its limits."""
    survivor.check()
    group = cgroup_of(survivor.pid)
    assert group.endswith(f"/bulkhead-{survivor.container_id}.scope")
    assert (read(group, "memory.max"), read(group, "cpu.max")) == (str(64 * MIB), "50000 100000")


def case_pods_have_limits_through_systemd(node: InstalledNode, survivor: Survivor) -> None:
    assert node.active()
    assert node.property("StatusText")
    check(survivor)


def case_workers_have_limits_of_their_own(node: InstalledNode) -> None:
    cri = next(worker for worker in node.workers() if worker.kind == "cri")
    assert cgroup_of(cri.pid) == "/system.slice/bulkhead.service/cri"
    assert read(cgroup_of(cri.pid), "memory.max") != "max"
    assert read("/system.slice/bulkhead.service", "pids.max") == "max"


def case_a_restart_and_a_kill_leave_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    restarted(node, "systemctl", "restart", "bulkhead")
    check(survivor)
    restarted(node, "systemctl", "kill", "-s", "KILL", "bulkhead")
    check(survivor)


class Load:
    """Pods that come and go, one after the other, until told to stop; a kubelet tries again when nobody
    answers.
    """

    def __init__(self, node: InstalledNode) -> None:
        self.node = node
        self.done = 0
        self.interrupted = 0
        self.failures: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                pod_id, container_id = self.node.running("", ["true"])
                self.node.ended(container_id)
                self.node.remove_pod(pod_id)
                self.done += 1
            except grpc.RpcError as error:
                self._judge(error)

    def _judge(self, error: grpc.RpcError) -> None:
        assert isinstance(error, grpc.Call)
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            self.interrupted += 1
            self._ended.wait(0.2)
        else:
            self.failures.append(f"{error.code()}: {error.details()}")

    def __enter__(self) -> Load:
        self._thread.start()
        wait_for(lambda: self.done, "a pod has come and gone")
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def case_an_upgrade_under_load_leaves_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    before = node.property("MainPID")
    with Load(node) as load:
        run("dpkg", "--install", SECOND)
        done = load.done
        wait_for(lambda: load.done > done + 1, "pods come and go again", 120)
    assert (load.failures, load.interrupted) == ([], 0)
    assert node.property("MainPID") == before
    assert node.tree().endswith("-2")
    check(survivor)
    assert len(list(LIBRARY.iterdir())) == 2


def case_a_removal_leaves_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    done = attempt("dpkg", "--remove", "bulkhead")
    assert done.returncode == 0, done.stderr
    survivor.check_process()
    run("dpkg", "--install", SECOND)
    check(survivor)


def case_a_removal_of_everything_leaves_nothing(node: InstalledNode) -> None:
    node.wait_answering()
    node.remove_everything()
    assert node.settled_leftovers() == []
    run("dpkg", "--purge", "bulkhead")
    assert node.settled_leftovers() == []
