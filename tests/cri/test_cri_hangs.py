"""What hangs: a dead file system, a CNI plugin that never returns, a registry that trickles; a worker.

All of it at once on one node: each is named by `bulkheadctl status`, ends with a sentence that names the
culprit, and meanwhile other pods come and go as fast as ever. When the dead come back nothing is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipc import kernel
from ipc.cri import api_pb2 as pb
from ipc.messages.supervisor import JobState
from tests.support import machine
from tests.support.cri_client import Client
from tests.support.daemon import Node, wait_for
from tests.support.dead_mount import DeadMount
from tests.support.fault_registry import FaultRegistry
from tests.support.images import Served, served
from tests.support.registry import make_image, make_layer

TIMEOUTS = """
[timeouts]
mount_source = 4.0
network_setup = 8.0
network_teardown = 6.0
registry_read = 4.0
ping = 0.5

[image]
retries = 0
"""
PLUGIN = """#!/bin/sh
config=$(cat)
case "$CNI_COMMAND $CNI_ARGS" in
ADD*K8S_POD_NAME=hangs*) sleep 600 ;;
VERSION*) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}' ;;
ADD*) printf %s "$config" | sed 's/.*"prevResult"://; s/}$//' ;;
esac
"""


class HangingNode(Node):
    """A node whose network has a plugin that never returns for pods of some names."""

    def conflist(self, bridge: str) -> dict[str, Any]:
        found = super().conflist(bridge)
        plugins = self.root / "plugins"
        plugins.mkdir()
        (plugins / "moon").write_text(PLUGIN)
        (plugins / "moon").chmod(0o755)
        found["plugins"].append({"type": "moon"})
        return found

    def command(self) -> list[str]:
        return [*super().command(), "--cni-bin-dir", str(self.root / "plugins")]


@pytest.fixture(scope="module")
def images() -> Iterator[Served]:
    machine.enter()
    with served(larger_files=2) as found:
        yield found


@pytest.fixture(scope="module")
def trickling() -> Iterator[FaultRegistry]:
    image = make_image([make_layer({"data": bytes(range(256)) * 400})])
    with FaultRegistry(image) as registry:
        registry.always(image.layers[0].digest, registry.dripping(0.5))
        yield registry


@pytest.fixture(scope="module")
def node(images: Served, trickling: FaultRegistry) -> Iterator[Node]:
    registries = images.registries_conf + f'[[registry]]\nlocation = "{trickling.address}"\ninsecure = true\n'
    found = HangingNode(registries=registries, bridge="bhhang0")
    (found.root / "bulkhead.toml.d" / "10-times.toml").write_text(TIMEOUTS)
    with found:
        yield found


@pytest.fixture(scope="module")
def client(node: Node, images: Served) -> Client:
    client = Client(node, images)
    client.pull()
    return client


def refusal(future: Future[Any]) -> str:
    """The sentence that a call fails with."""
    with pytest.raises(grpc.RpcError) as caught:
        future.result(60)
    assert isinstance(caught.value, grpc.Call)
    return f"{caught.value.code().name}: {caught.value.details()}"


def seconds(function: Callable[[], object]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


def jobs(node: Node) -> list[JobState]:
    return [job for worker in node.workers() for job in worker.jobs]


def all_shown(node: Node, culprits: list[str]) -> bool:
    shown = node.ctl("status", check=False).stdout
    return all(culprit in shown for culprit in culprits)


def come_and_go(client: Client) -> None:
    pod, container = client.running("sleep", "1000")
    client.stop(container)
    client.remove_pod(pod)


def test_others_are_served_while_things_hang_and_status_names_the_culprits(
    node: Node, client: Client, trickling: FaultRegistry
) -> None:
    come_and_go(client)
    usual = min(seconds(lambda: come_and_go(client)) for _ in range(3))
    sandbox = client.pod_config()
    pod = client.run(sandbox)
    with DeadMount(node.root / "dead") as dead, ThreadPoolExecutor() as pool:
        path = dead.directory / "volume"
        mount = pb.Mount(host_path=str(path), container_path="/v")
        created = pool.submit(client.create, pod, sandbox, client.container_config(["true"], mounts=[mount]))
        stuck_pod = client.pod_config()
        stuck_pod.metadata.name = "hangs-for-ever"
        run = pool.submit(client.run, stuck_pod)
        reference = f"{trickling.address}/test/image:1"
        pulled = pool.submit(node.images.PullImage, pb.PullImageRequest(image=pb.ImageSpec(image=reference)))
        assert dead.asked.wait(5)
        meanwhile = min(seconds(lambda: come_and_go(client)) for _ in range(3))
        assert meanwhile < usual * 2 + 0.2, (meanwhile, usual)

        said = refusal(created)
        assert said.startswith("DEADLINE_EXCEEDED"), said
        assert f"{dead.directory}" in said
        assert "no answer within 4 s" in said
        culprits = [f"storage: create container: {path} for", "plugin moon for", "image: fetching sha256:"]
        wait_for(lambda: all_shown(node, [*culprits, "s, killed, hangs in the kernel"]), "status names them")
        log = node.root / "daemon.log"
        wait_for(lambda: 'msg="a child hangs in the kernel"' in log.read_text(), "it is let go")
        said = refusal(run)
        assert said.startswith("DEADLINE_EXCEEDED"), said
        assert 'CNI plugin "moon", ADD' in said
        said = refusal(pulled)
        assert "the transfer has stalled" in said, said
        wait_for(lambda: sum(job.killed for job in jobs(node)) == 1, "who can be killed has ended")
        (stuck,) = [job for job in jobs(node) if job.killed]
        assert stuck.doing.startswith(str(dead.directory))
        assert Path(f"/proc/{stuck.pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"
        come_and_go(client)
    wait_for(lambda: not jobs(node), "the child that hung has ended")
    assert not Path(f"/proc/{stuck.pid}").exists()
    client.remove_pod(pod)
    wait_for(lambda: not node.leftovers(), "nothing is left")


def test_a_worker_that_no_signal_ends_is_replaced(node: Node, client: Client) -> None:
    """Its disk hangs: the call that it is in is broken off by nothing. Another takes its place."""
    (node.root / "bulkhead.toml.d" / "20-lease.toml").write_text("[timeouts]\nworker_answer = 1.0\n")
    node.ctl("reload")
    (stuck,) = node.pids("storage")
    with DeadMount(node.state) as dead:
        with pytest.raises(grpc.RpcError):
            node.images.ImageFsInfo(pb.ImageFsInfoRequest(), timeout=0.5)
        assert dead.asked.is_set()
        kernel.umount(str(dead.directory), kernel.MNT_DETACH)  # for others the disk is back
        (other,) = wait_for(lambda: [pid for pid in node.pids("storage") if pid != stuck], "there is another")
        come_and_go(client)
        states = {worker.pid: worker for worker in node.workers() if worker.kind == "storage"}
        assert (states[stuck].state, states[other].state) == ("stuck", "ready")
        assert states[stuck].doing.startswith("in an uninterruptible sleep")
        log = (node.root / "daemon.log").read_text()
        assert 'msg="worker hangs in the kernel and is left behind" kind=storage' in log
    wait_for(lambda: not Path(f"/proc/{stuck}").exists(), "the kernel lets it go")
    wait_for(lambda: [w.pid for w in node.workers() if w.kind == "storage"] == [other], "nobody is stuck")
    come_and_go(client)
    wait_for(lambda: not node.leftovers(), "nothing is left")
