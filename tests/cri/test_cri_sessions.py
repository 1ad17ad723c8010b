"""Exec, attach and port-forward through the whole daemon, over both transports, and what they survive."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from ipc.cri import api_pb2 as pb
from ipc.messages.supervisor import WorkerState
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

    def __init__(self, kubelet: Kubelet, pod: str, *, tunnelled: bool = False) -> None:
        request = pb.PortForwardRequest(pod_sandbox_id=pod)
        to = dial(kubelet.node.runtime.PortForward(request, timeout=10).url)
        self.client = Spdy.tunnelled(*to) if tunnelled else Spdy.connect(*to, protocol="portforward.k8s.io")
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
    tunnel = Forwarding(kubelet, pod, tunnelled=True)
    for text in (b"as kubectl", b"over WebSocket"):
        tunnel.echo(tunnel.open(7000)[1], text)
    tunnel.client.sock.close()


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


# -- exec -----------------------------------------------------------------------------------------------


def exec_url(kubelet: Kubelet, container: str, script: str, *, tty: bool = False) -> str:
    request = pb.ExecRequest(
        container_id=container, cmd=[*SHELL, script], stdin=True, stdout=True, stderr=not tty, tty=tty
    )
    return kubelet.node.runtime.Exec(request, timeout=10).url


def names(*, tty: bool) -> list[str]:
    return ["error", "stdin", "stdout", *(["resize"] if tty else ["stderr"])]


def exit_of(status: bytes) -> int:
    told = json.loads(status)
    if told["status"] == "Success":
        return 0
    return int(told["details"]["causes"][0]["message"])


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_exec_carries_everything_over_both_transports(kubelet: Kubelet, handler: str) -> None:
    container = kubelet.running(handler)
    spdy = Spdy.connect(*dial(exec_url(kubelet, container, "cat; echo wrong >&2; exit 7")))
    spdy.open(*names(tty=False))
    spdy.send("stdin", b"in and ", fin=False)
    spdy.send("stdin", b"out", fin=True)
    spdy.to_end()
    assert (spdy.text("stdout"), spdy.text("stderr")) == (b"in and out", b"wrong\n")
    assert exit_of(spdy.text("error")) == 7
    url = exec_url(kubelet, container, "stty size; read x; stty size; tty; exit 3", tty=True)
    web = WebSocket.connect(*dial(url), protocol="v5.channel.k8s.io")
    web.send(4, b'{"Width":90,"Height":30}')
    web.send(0, b"go on\n")
    web.to_end()
    assert b"30 90" in web.channels[1]
    assert b"/dev/pts/" in web.channels[1]
    assert exit_of(web.channels[3]) == 3
    url = exec_url(kubelet, container, "true").replace("exec", "attach")
    with pytest.raises(AssertionError, match="404"):
        Spdy.connect(*dial(url))


def test_an_exec_that_cannot_start_is_told(kubelet: Kubelet) -> None:
    container = kubelet.running("")
    for tty in (False, True):
        request = pb.ExecRequest(container_id=container, cmd=["/none"], stdout=True, tty=tty)
        web = WebSocket.connect(*dial(kubelet.node.runtime.Exec(request, timeout=10).url))
        web.to_end()
        assert b"error executing command in container" in web.channels[3]
        assert b"/none" in web.channels[3]


@pytest.mark.parametrize("tty", [False, True])
def test_an_exec_ends_with_its_client_and_its_children_too(kubelet: Kubelet, tty: bool) -> None:
    container = kubelet.running("")
    script = "trap '' HUP TERM; sleep 777 & sleep 778 & echo ready; wait"
    client = Spdy.connect(*dial(exec_url(kubelet, container, script, tty=tty)))
    client.open(*names(tty=tty))
    while b"ready" not in client.text("stdout"):
        client.frame()
    assert len(sleepers(kubelet, container)) == 2
    client.sock.close()
    wait_for(lambda: not sleepers(kubelet, container), "everything of the exec ends")
    assert kubelet.status(container).state == pb.CONTAINER_RUNNING


def sleepers(kubelet: Kubelet, container: str) -> list[str]:
    """Processes of the container that sleep as an exec of these tests does."""
    request = pb.ExecSyncRequest(container_id=container, cmd=["ps", "-o", "args"], timeout=20)
    listing = kubelet.node.runtime.ExecSync(request, timeout=30).stdout.decode()
    return [line for line in listing.splitlines() if line.startswith("sleep 77")]


def test_an_exec_ends_with_its_container(kubelet: Kubelet) -> None:
    container = kubelet.running("")
    client = Spdy.connect(*dial(exec_url(kubelet, container, "echo ready; sleep 1000")))
    client.open(*names(tty=False))
    while b"ready" not in client.text("stdout"):
        client.frame()
    kubelet.node.runtime.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0), timeout=30)
    client.to_end()
    assert exit_of(client.text("error")) == 137


# -- attach ---------------------------------------------------------------------------------------------


def attached(kubelet: Kubelet, container: str, *, stdin: bool = False, tty: bool = False) -> Spdy:
    request = pb.AttachRequest(container_id=container, stdin=stdin, stdout=True, stderr=not tty, tty=tty)
    client = Spdy.connect(*dial(kubelet.node.runtime.Attach(request, timeout=10).url))
    client.open(*[name for name in names(tty=tty) if stdin or name != "stdin"])
    while len(client.replies) < len(client.names):
        client.frame()
    return client


def start(kubelet: Kubelet, container: str) -> None:
    kubelet.node.runtime.StartContainer(pb.StartContainerRequest(container_id=container), timeout=30)


def heard(client: Spdy, text: bytes, name: str = "stdout") -> None:
    while text not in client.text(name):
        client.frame()


def test_many_attach_hear_the_same_and_type_into_one_container(kubelet: Kubelet) -> None:
    script = "while read x; do echo got $x; echo err $x >&2; done; echo end; exit 4"
    container = kubelet.created("", *SHELL, script, stdin=True, stdin_once=True)
    first = attached(kubelet, container, stdin=True)
    second = attached(kubelet, container)
    start(kubelet, container)
    for client in (first, second):
        while b"err one\n" not in client.text("stderr") or b"got one\n" not in client.text("stdout"):
            if select.select([client.sock], [], [], 0.2)[0]:
                client.frame()
            else:  # it may have joined only after what was said last
                first.send("stdin", b"one\n")
    first.send("stdin", b"", fin=True)  # and so the container's own ends, and with it the loop
    for client in (first, second):
        client.to_end()
        assert client.text("stdout").endswith(b"end\n")
        assert json.loads(client.text("error")) == {"status": "Success"}
    assert kubelet.ended(container).exit_code == 4


def test_a_terminal_is_attached_resized_and_left(kubelet: Kubelet) -> None:
    script = "while read x; do stty size; done"
    container = kubelet.running("", *SHELL, script, stdin=True, tty=True)
    client = attached(kubelet, container, stdin=True, tty=True)
    client.send("resize", b'{"Width":99,"Height":33}')
    client.send("stdin", b"x\n")
    heard(client, b"33 99")
    client.sock.close()
    request = pb.AttachRequest(container_id=container, stdin=True, stdout=True, tty=True)
    url = kubelet.node.runtime.Attach(request, timeout=10).url
    again = WebSocket.connect(*dial(url), protocol="v5.channel.k8s.io")
    again.send(4, b'{"Width":88,"Height":22}')
    again.send(0, b"x\n")
    while b"22 88" not in again.channels[1]:
        again.frame()
    again.sock.close()
    assert kubelet.status(container).state == pb.CONTAINER_RUNNING


def lagging(node: Node) -> list[WorkerState]:
    return [worker for worker in node.workers() if worker.lagged]


def test_one_who_does_not_listen_is_let_go_and_nobody_waits(kubelet: Kubelet) -> None:
    flood = "head -c 25000000 /dev/zero; echo done >&2; sleep 100"
    script = f"until [ -e /go ]; do echo tick; sleep 0.1; done; {flood}"
    container = kubelet.running("", *SHELL, script)
    deaf = attached(kubelet, container)
    heard(deaf, b"tick")
    request = pb.ExecSyncRequest(container_id=container, cmd=["touch", "/go"], timeout=20)
    kubelet.node.runtime.ExecSync(request, timeout=30)
    wait_for(lambda: "done" in kubelet.log(container), "the log has all of it", 60)
    with contextlib.suppress(EOFError):
        deaf.to_end()
    assert b"did not keep up" in deaf.text("error")
    assert len(deaf.text("stdout")) < 25000000
    assert [one.kind for one in wait_for(lambda: lagging(kubelet.node), "it is counted", 10)] == ["stream"]


def test_sessions_of_both_kinds_survive_the_others(kubelet: Kubelet) -> None:
    node = kubelet.node
    container = kubelet.running("", *SHELL, "while sleep 0.1; do echo tick; done")
    client = Spdy.connect(*dial(exec_url(kubelet, container, "cat; exit 5")))
    client.open(*names(tty=False))
    listener = attached(kubelet, container)
    heard(listener, b"tick")
    for kind in ("cri", "storage", "network", "image", "ops"):
        node.kill_worker(kind)
    node.stop()
    node.start()
    node.kill()
    node.start()
    listener.received[listener.names["stdout"]] = b""
    heard(listener, b"tick")
    client.send("stdin", b"still here", fin=True)
    client.to_end()
    assert client.text("stdout") == b"still here"
    assert exit_of(client.text("error")) == 5
    listener.sock.close()
    wait_for(lambda: not draining(node), "the worker ends with its last session")


def test_sessions_end_with_a_word_when_their_monitor_dies_and_new_ones_begin_at_once(
    kubelet: Kubelet,
) -> None:
    container = kubelet.running("", *SHELL, "while sleep 0.1; do echo tick; done")
    client = Spdy.connect(*dial(exec_url(kubelet, container, "echo ready; cat")))
    client.open(*names(tty=False))
    heard(client, b"ready")
    listener = attached(kubelet, container)
    heard(listener, b"tick")
    lock = kubelet.node.run_root / "monitors" / container / "lock"
    before = lock.read_text()
    os.kill(int(before.split()[0]), signal.SIGKILL)
    for one in (client, listener):
        with contextlib.suppress(EOFError):
            one.to_end()
        told = json.loads(one.text("error"))
        assert told["status"] == "Failure", told
    wait_for(lambda: lock.read_text() != before, "a successor")
    again = attached(kubelet, container)
    heard(again, b"tick")
    again.sock.close()
    after = Spdy.connect(*dial(exec_url(kubelet, container, "exit 5")))
    after.open(*names(tty=False))
    after.to_end()
    assert exit_of(after.text("error")) == 5
