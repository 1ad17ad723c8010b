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
from tests.support.images import Served
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


__all__ = [
    "LIBRARY",
    "SERVICE",
    "InstalledNode",
    "Served",
    "Survivor",
    "attempt",
    "restarted",
    "run",
    "wait_for",
]
