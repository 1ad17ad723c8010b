"""Exec, attach and port-forward through the whole daemon, over both transports, and what they survive."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.daemon import Node, alive, wait_for
from tests.support.images import served
from tests.support.kubelet import SHELL, Kubelet
from tests.support.stream_clients import Spdy, WebSocket, data_frame

ECHO = "nc -ll -p 7000 -e cat"  # a server that gives back what it gets


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    machine.enter()
    with served() as images, Node(registries=images.registries_conf, bridge="bhcri9") as node:
        found = Kubelet(node, images)
        found.pull("busybox")
        yield found


@pytest.fixture(autouse=True)
def clean(kubelet: Kubelet) -> Iterator[None]:
    """Whatever a test leaves running goes, and nothing of it stays."""
    yield
    kubelet.node.remove_everything()
    assert kubelet.node._settled_leftovers() == []


def dial(url: str) -> tuple[socket.socket, str]:
    """A connection to where a URL leads, and its path."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 0), timeout=20), parts.path


def pod_of(kubelet: Kubelet, container: str) -> str:
    request = pb.ListContainersRequest(filter=pb.ContainerFilter(id=container))
    return kubelet.node.runtime.ListContainers(request, timeout=10).containers[0].pod_sandbox_id


def draining(node: Node) -> list[int]:
    return [worker.pid for worker in node.workers() if worker.kind == "stream" and worker.state == "draining"]


# -- port-forward -------------------------------------------------------------------------------------


class Forwarding:
    """A SPDY client of a port-forward: a pair of streams for each connection."""

    def __init__(self, kubelet: Kubelet, pod: str) -> None:
        request = pb.PortForwardRequest(pod_sandbox_id=pod)
        url = kubelet.node.runtime.PortForward(request, timeout=10).url
        self.client = Spdy.connect(*dial(url), protocol="portforward.k8s.io")
        self.pairs = 0

    def open(self, port: int) -> tuple[int, int]:
        """Streams of a new connection: error, data."""
        error, data = 4 * self.pairs + 1, 4 * self.pairs + 3
        self.pairs += 1
        common = {"port": str(port), "requestid": str(self.pairs)}
        for stream, kind in ((error, "error"), (data, "data")):
            headers = {**common, "streamtype": kind}
            self.client.sock.sendall(self.client.headers.syn_stream(stream, headers))
        return error, data

    def echo(self, stream: int, text: bytes) -> None:
        """Send, and wait until it has come back."""
        self.client.received[stream] = b""
        self.client.sock.sendall(data_frame(stream, text))
        while self.client.received[stream] != text:
            self.client.frame()


def test_ports_are_forwarded_and_sessions_survive_everybody_but_their_worker(kubelet: Kubelet) -> None:
    node = kubelet.node
    pod = pod_of(kubelet, kubelet.running("", *SHELL, ECHO))
    forwarding = Forwarding(kubelet, pod)
    _error, first = forwarding.open(7000)
    forwarding.echo(first, b"one")
    error, _data = forwarding.open(7001)
    while error not in forwarding.client.resets:
        forwarding.client.frame()
    assert b"connection refused" in forwarding.client.received[error]
    (worker,) = node.pids("stream")
    for kind in ("cri", "storage", "network", "image", "ops"):
        node.kill_worker(kind)
    forwarding.echo(first, b"two")
    node.wait_ready()
    _error, second = forwarding.open(7000)  # cri and network are new, the session is not
    forwarding.echo(second, b"three")
    node.stop()
    forwarding.echo(first, b"four")
    node.start()
    assert draining(node) == [worker]
    _error, third = forwarding.open(7000)
    forwarding.echo(third, b"five")
    node.kill()
    forwarding.echo(third, b"six")
    node.start()
    other = Forwarding(kubelet, pod)
    _error, data = other.open(7000)
    other.echo(data, b"by the next worker")
    forwarding.echo(third, b"seven")
    assert draining(node) == [worker]
    forwarding.client.sock.close()
    wait_for(lambda: not alive(worker), "the worker ends with its last session")
    assert draining(node) == []
    other.client.sock.close()


def test_websocket_forwards_the_ports_of_the_request(kubelet: Kubelet) -> None:
    pod = pod_of(kubelet, kubelet.running("", *SHELL, ECHO))
    request = pb.PortForwardRequest(pod_sandbox_id=pod, port=[7000, 7001])
    url = kubelet.node.runtime.PortForward(request, timeout=10).url
    client = WebSocket.connect(*dial(url))
    while len(client.channels) < 4:
        client.frame()
    assert client.channels[0] == client.channels[1] == struct.pack("<H", 7000)
    client.send(0, b"there and back")
    while not client.channels[0].endswith(b"there and back") or b"refused" not in client.channels[3]:
        client.frame()
    client.sock.close()


def test_a_restart_of_the_worker_ends_no_session(kubelet: Kubelet) -> None:
    node = kubelet.node
    forwarding = Forwarding(kubelet, pod_of(kubelet, kubelet.running("", *SHELL, ECHO)))
    _error, data = forwarding.open(7000)
    forwarding.echo(data, b"before")
    (worker,) = node.pids("stream")
    node.ctl("restart", "stream")
    assert draining(node) == [worker]
    forwarding.echo(data, b"after")
    os.kill(worker, signal.SIGTERM)  # which ends it now
    with contextlib.suppress(EOFError, ConnectionError):
        forwarding.client.to_end()
    wait_for(lambda: not alive(worker), "a signal ends it")
