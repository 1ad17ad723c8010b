"""The directory of what is of this boot is full to the last byte: nothing begins, everything can be ended."""

from __future__ import annotations

import os
from collections.abc import Iterator

import grpc
import pytest

from ipc import kernel
from tests.support import machine
from tests.support.cri_client import Client
from tests.support.daemon import Node, wait_for
from tests.support.images import served

CHUNK = 1 << 16


@pytest.fixture
def client() -> Iterator[Client]:
    machine.enter()
    with (
        served() as images,
        Node(registries=images.registries_conf, bridge="bhfull0", run_in_memory=True) as node,
    ):
        made = Client(node, images)
        made.pull()
        yield made


def fill(node: Node) -> None:
    """No page more than there are."""
    status = os.statvfs(node.run_root)
    used = (status.f_blocks - status.f_bfree) * status.f_frsize
    kernel.mount("run", str(node.run_root), "tmpfs", kernel.MS_REMOUNT, f"size={used + CHUNK}")
    with (
        pytest.raises(OSError, match="No space"),
        (node.run_root / "ballast").open("wb", buffering=0) as file,
    ):
        while True:
            file.write(bytes(4096))


def test_nothing_begins_and_everything_can_be_ended(client: Client) -> None:
    node = client.node
    pod, container = client.running("sleep", "1000")
    sandbox = client.pod_config()
    fill(node)
    with pytest.raises(grpc.RpcError) as caught:
        client.run(sandbox)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    client.stop(container)
    client.remove(container)
    client.remove_pod(pod)
    (node.run_root / "ballast").unlink()
    client.remove_pod(client.run(sandbox))
    wait_for(lambda: not node.leftovers(), "nothing is left")
