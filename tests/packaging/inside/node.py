"""Runs in: the tests, inside of a machine with systemd of its own.

A node that Bulkhead is installed on from its package, and one container that counts into its log while
everything around it is restarted, exchanged and removed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from ipc.cri import api_pb2 as pb
from ipc.cri import api_pb2_grpc
from tests.support.images import Served
from tests.support.load import Ask, Load
from tests.vm.inside.node import CONFLIST, SERVICE, Node, run, wait_for

LIBRARY = Path("/usr/lib/bulkhead")
COUNTER = ["/bin/sh", "-c", "i=0; while true; do echo $i; i=$((i+1)); sleep 0.1; done"]


def attempt(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that may fail, without anybody who could answer its questions."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", **environment},
        check=False,
    )


class InstalledNode(Node):
    """A node whose service is the package's."""

    def configure(self, runtime: str = "runc") -> None:
        """What an administrator does besides the package."""
        shutil.rmtree("/var/log/pods", ignore_errors=True)  # of another package's pods
        files = {
            "/etc/containers/registries.conf": self.images.registries_conf,
            "/etc/cni/net.d/10-test.conflist": json.dumps(CONFLIST),
            # crun before 1.9 raises the limit of locked memory, which takes CAP_SYS_RESOURCE
            "/etc/bulkhead/bulkhead.toml.d/10-test.toml": f'default_runtime = "{runtime}"\n',
        }
        for path, text in files.items():
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_text(text)

    def active(self) -> bool:
        """True if systemd says that the service is up."""
        return self.property("ActiveState") == "active"

    def tree(self) -> str:
        """The tree that the running supervisor has its modules from."""
        maps = Path(f"/proc/{self.property('MainPID')}/maps").read_text()
        found = {line.split()[-1].split("/")[4] for line in maps.splitlines() if f" {LIBRARY}/" in line}
        assert len(found) == 1, found
        return found.pop()


class Survivor:
    """A container that must live on, with the same process and without a gap in its log."""

    def __init__(
        self, node: InstalledNode, parent: str = "", resources: pb.LinuxContainerResources | None = None
    ) -> None:
        self.node = node
        self.pod_id, self.container_id = node.running(parent, COUNTER, resources)
        self.pid = node.pid(self.container_id)
        wait_for(lambda: len(node.log(self.container_id)) > 2, "it logs")
        self.log_path = Path(node.status(self.container_id).log_path)

    def check_process(self) -> None:
        """It runs, whoever else does."""
        had = self.lines()
        wait_for(lambda: len(self.lines()) > len(had) + 2, "it logs on")
        assert Path(f"/proc/{self.pid}").exists()
        assert self.lines() == [str(number) for number in range(len(self.lines()))]

    def check(self) -> None:
        """It runs, and the service knows it."""
        self.node.wait_answering()
        assert self.node.pid(self.container_id) == self.pid
        self.check_process()
        assert self.node.execute(self.container_id, "echo", "hi") == "hi\n"

    def lines(self) -> list[str]:
        """The messages of its log."""
        return [line.split(" ", 3)[3] for line in self.log_path.read_text().splitlines()]


def restarted(node: InstalledNode, *command: str) -> None:
    """Run something that restarts the service; return when another process serves."""
    before = node.property("MainPID")
    run(*command)
    wait_for(
        lambda: node.active() and node.property("MainPID") not in (before, "0"), "the service is up again"
    )


def clients(node: InstalledNode, survivor: Survivor) -> dict[str, Ask]:
    """What is asked of the node without end (tests/support/load.py)."""
    sandbox = node.pod_config()
    pod_id = node.run_pod(sandbox)

    def lists(runtime: api_pb2_grpc.RuntimeServiceStub, _turn: int) -> None:
        assert runtime.ListContainers(pb.ListContainersRequest(), timeout=60).containers

    def probes(runtime: api_pb2_grpc.RuntimeServiceStub, _turn: int) -> None:
        request = pb.ExecSyncRequest(container_id=survivor.container_id, cmd=["true"], timeout=30)
        assert runtime.ExecSync(request, timeout=60).exit_code == 0

    def creates(runtime: api_pb2_grpc.RuntimeServiceStub, turn: int) -> None:
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=f"load{turn}"),
            image=pb.ImageSpec(image=node.images.busybox),
            command=["sleep", "1000"],
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=sandbox)
        made = runtime.CreateContainer(request, timeout=60).container_id
        runtime.StartContainer(pb.StartContainerRequest(container_id=made), timeout=60)
        runtime.StopContainer(pb.StopContainerRequest(container_id=made, timeout=0), timeout=60)
        runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=made), timeout=60)

    return {"lists": lists, "probes": probes, "creates": creates}


def upgraded(node: InstalledNode, survivor: Survivor, *commands: tuple[str, ...]) -> None:
    """Run what upgrades the service in place, under a load that must not notice: the process stays the same,
    and all that it is made of is the tree that `current` names."""
    before = (node.property("MainPID"), node.property("NRestarts"))
    load = Load(node.connect)
    with load.running(**clients(node, survivor)):
        wait_for(lambda: len(load.counts) == 3, "every client has asked")
        for command in commands:
            run(*command)
        asked = load.counts["creates"]
        wait_for(lambda: load.counts["creates"] > asked + 1, "containers come and go")
    assert load.errors == [], load.errors
    assert (node.property("MainPID"), node.property("NRestarts")) == before
    tree = (LIBRARY / "current").readlink().name
    assert node.tree() == tree
    assert {worker.release for worker in node.workers() if worker.state == "ready" and worker.release} == {
        tree
    }
    survivor.check()


__all__ = [
    "LIBRARY",
    "SERVICE",
    "InstalledNode",
    "Served",
    "Survivor",
    "attempt",
    "restarted",
    "run",
    "upgraded",
    "wait_for",
]
