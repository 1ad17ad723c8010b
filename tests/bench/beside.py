"""Runs in: `make bench`. A node and, in the same namespaces, Debian's containerd with the same image."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench import containerd
from tests.bench.world import Pods, bench_cgroup, pause_image
from tests.support.daemon import Node
from tests.support.images import Served, served
from tests.support.registry import push

PARENT = "/bulkhead-bench"


@dataclass(frozen=True)
class Beside:
    """Both, and a directory for whoever works by hand."""

    node: Node
    peer: containerd.Containerd
    images: Served
    base: Path

    def ours(self, runtime: str) -> Pods:
        """Pods of Bulkhead."""
        return Pods(self.node, self.images.busybox, handler=runtime, parent=PARENT)

    def theirs(self, runtime: str) -> Pods:
        """Pods of containerd."""
        return Pods(self.peer, self.images.busybox, handler=runtime, parent=PARENT)


@contextmanager
def running() -> Iterator[Beside]:
    """Both with the image, their run directories in memory."""
    with ExitStack() as stack:
        images = stack.enter_context(served())
        push(images.registry, "bench/pause", "1", pause_image())
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bhbench-", dir="/tmp")))
        stack.enter_context(bench_cgroup(PARENT))
        node = stack.enter_context(
            Node(registries=images.registries_conf, bridge="bhbench0", run_in_memory=True)
        )
        peer = stack.enter_context(_peer(node, images, base / "containerd"))
        node.ctl("pull", images.busybox)
        peer.pull([images.busybox, f"{images.address}/bench/pause:1"])
        yield Beside(node, peer, images, base)


@contextmanager
def _peer(node: Node, images: Served, base: Path) -> Iterator[containerd.Containerd]:
    made = conflist(node, "bhbench1", "10.215.0.0/16", base / "addresses")
    with containerd.running(base, made, f"{images.address}/bench/pause:1") as peer:
        yield peer
    node.delete_link("bhbench1")


def conflist(node: Node, bridge: str, subnet: str, addresses: Path) -> dict[str, object]:
    """The node's CNI list with another bridge and other addresses."""
    made = node.conflist(bridge)
    ipam = made["plugins"][0]["ipam"]
    ipam["dataDir"], ipam["ranges"] = str(addresses), [[{"subnet": subnet}]]
    return made
