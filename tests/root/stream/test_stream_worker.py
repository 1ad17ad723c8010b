"""Runs in: the tests, as root. The stream worker in its real sandbox, with raw clients and real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipc.messages.cri import Redeemed
from tests.support import sandboxed, stream_worker
from tests.support.certificates import certificate
from tests.support.sandboxed import Host
from tests.support.stream_clients import Spdy, WebSocket, control, data_frame, head, read_head
from tests.support.stream_worker import Job, Worker

SUCCESS = {"status": "Success"}


@pytest.fixture
def host() -> Iterator[Host]:
    with sandboxed.host() as here:
        yield here


@pytest.fixture
def worker(host: Host) -> Iterator[Worker]:
    with stream_worker.started(host) as here:
        yield here


def job(script: str, kind: str = "exec", *, tty: bool = False, error: str = "") -> Job:
    redeemed = Redeemed(
        session="s", pod_id="pod", container_id="c", stdin=True, stdout=True, stderr=not tty, tty=tty
    )
    return Job(kind, redeemed, ["/bin/sh", "-c", script], error=error)


def eventually(what: Callable[[], object], timeout: float = 10.0) -> None:
    until = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < until, "it never became true"
        time.sleep(0.02)


# -- exec and attach --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [f"v{n}.channel.k8s.io" for n in (4, 3, 2)] + ["channel.k8s.io"])
def test_spdy_exec_carries_stdin_its_end_both_outputs_and_the_exit_code(
    worker: Worker, protocol: str
) -> None:
    path = worker.cri.token(job("cat; echo wrong >&2; exit 7"))
    with worker.dial() as sock:
        client = Spdy.connect(sock, path, protocol)
        client.open("error", "stdin", "stdout", "stderr")
        client.send("stdin", b"hello ")
        client.send("stdin", b"there", fin=True)
        client.to_end()
    assert client.text("stdout") == b"hello there"
    assert client.text("stderr") == b"wrong\n"
    if protocol.startswith("v4"):
        assert json.loads(client.text("error"))["details"]["causes"][0]["message"] == "7"
    else:
        assert b"exit code: 7" in client.text("error")
    assert client.replies == {1, 3, 5, 7}


def test_the_command_starts_only_when_all_streams_are_there(worker: Worker) -> None:
    with worker.dial() as sock:
        client = Spdy.connect(sock, worker.cri.token(job("true")))
        client.open("error", "stdin", "stdout", "nonsense")
        time.sleep(0.3)
        assert worker.cri.opened == 0
        client.open("stderr")
        client.to_end()
    assert json.loads(client.text("error")) == SUCCESS


@pytest.mark.parametrize(
    "protocol",
    ["", "channel.k8s.io", "base64.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"],
)
def test_websocket_exec_over_every_subprotocol(worker: Worker, protocol: str) -> None:
    path = worker.cri.token(job("read line; echo got $line; echo wrong >&2; exit 3"))
    with worker.dial() as sock:
        client = WebSocket.connect(sock, path, protocol)
        client.send(0, b"words\n")
        client.to_end()
    assert client.messages[0] in {b"\x01", b"1"}
    assert client.channels[1] == b"got words\n"
    assert client.channels[2] == b"wrong\n"
    assert b"exit code: 3" in client.channels[3]


def test_websocket_v5_half_closes_stdin(worker: Worker) -> None:
    with worker.dial() as sock:
        client = WebSocket.connect(sock, worker.cri.token(job("cat; echo end")), "v5.channel.k8s.io")
        client.send(0, b"data ")
        client.end(0)
        client.to_end()
    assert client.channels[1] == b"data end\n"
    assert client.ended == set()  # clients know no half-close of the server
    assert json.loads(client.channels[3]) == SUCCESS


def test_a_terminal_has_the_size_that_the_client_says(worker: Worker) -> None:
    path = worker.cri.token(job("while read x; do stty size; [ $x = q ] && exit 0; done", tty=True))
    with worker.dial() as sock:
        client = Spdy.connect(sock, path)
        client.open("error", "stdin", "stdout", "resize")
        client.send("resize", b'{"Width":100,"Hei')
        client.send("resize", b'ght":30}\n')
        eventually(lambda: worker.cri.opened)
        time.sleep(0.2)
        client.send("stdin", b"q\n")
        client.to_end()
    assert b"30 100\r\n" in client.text("stdout")
    assert json.loads(client.text("error")) == SUCCESS


def test_attach_ends_with_success_whatever_the_exit_code(worker: Worker) -> None:
    with worker.dial() as sock:
        client = Spdy.connect(sock, worker.cri.token(job("echo hi; exit 9", "attach")))
        client.open("error", "stdin", "stdout", "stderr")
        client.to_end()
    assert client.text("stdout") == b"hi\n"
    assert json.loads(client.text("error")) == SUCCESS


def test_what_cannot_be_started_is_told_on_the_error_stream(worker: Worker) -> None:
    with worker.dial() as sock:
        client = Spdy.connect(sock, worker.cri.token(job("true", error="the container is not running")))
        client.open("error", "stdin", "stdout", "stderr")
        client.to_end()
    told = json.loads(client.text("error"))
    assert told["code"] == 500
    assert told["message"].endswith("error executing command in container: the container is not running")


def test_the_command_ends_when_its_client_goes(worker: Worker) -> None:
    with worker.dial() as sock:
        client = Spdy.connect(sock, worker.cri.token(job("exec sleep 1000")))
        client.open("error", "stdin", "stdout", "stderr")
        eventually(lambda: worker.info().sessions == 1)
        row = worker.info().table[0]
        assert (row.kind, row.transport, row.protocol, row.pod_id) == (
            "exec",
            "spdy",
            "v4.channel.k8s.io",
            "pod",
        )
        eventually(lambda: worker.cri.processes)
    eventually(lambda: worker.info().connections == 0)
    eventually(lambda: worker.cri.processes[0].poll() is not None)


def test_a_client_that_fills_stdin_and_goes_is_noticed(worker: Worker) -> None:
    with worker.dial() as sock:
        client = Spdy.connect(sock, worker.cri.token(job("exec sleep 1000")))
        client.open("error", "stdin", "stdout", "stderr")
        sock.settimeout(1)
        with pytest.raises(TimeoutError):
            while True:
                client.send("stdin", bytes(65536))
    eventually(lambda: worker.cri.processes[0].poll() is not None)
    assert worker.info().connections == 0


def test_much_output_to_a_slow_client_costs_little_and_is_whole(worker: Worker) -> None:
    with worker.dial() as sock, worker.dial() as other:
        client = Spdy.connect(sock, worker.cri.token(job("head -c 50000000 /dev/zero")))
        client.open("error", "stdin", "stdout", "stderr")
        time.sleep(0.5)
        second = Spdy.connect(other, worker.cri.token(job("echo quick")))
        second.open("error", "stdin", "stdout", "stderr")
        second.to_end()
        assert second.text("stdout") == b"quick\n"
        resident = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1]) * 4096
        assert resident < 100 << 20
        seen = 0
        while not client.gone:
            client.frame()
            seen += len(client.received.pop(client.names["stdout"], b""))
    assert seen == 50_000_000
    assert json.loads(client.text("error")) == SUCCESS


def test_a_session_goes_on_without_cri(worker: Worker) -> None:
    with worker.dial() as sock:
        client = Spdy.connect(sock, worker.cri.token(job("cat; exit 4")))
        client.open("error", "stdin", "stdout", "stderr")
        eventually(lambda: worker.cri.opened)
        worker.cri.vanish()
        client.send("stdin", b"still here", fin=True)
        client.to_end()
    assert client.text("stdout") == b"still here"
    assert json.loads(client.text("error"))["details"]["causes"][0]["message"] == "4"


def test_a_background_child_that_keeps_the_pipes_does_not_keep_the_session(worker: Worker) -> None:
    started = time.monotonic()
    with worker.dial() as sock:
        client = Spdy.connect(sock, worker.cri.token(job("sleep 5 & echo done")))
        client.open("error", "stdin", "stdout", "stderr")
        client.to_end()
    assert client.text("stdout") == b"done\n"
    assert time.monotonic() - started < 4


# -- port-forward -----------------------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what comes, until the end, then says bye."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(sock: socket.socket) -> None:
        with sock:
            while data := sock.recv(65536):
                sock.sendall(data)
            sock.sendall(b"bye")

    def accept() -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(10)


def forward(port: int, ports: list[int] | None = None) -> Job:
    redeemed = Redeemed(session="s", pod_id="pod", pod_uid="uid", ports=ports or [])
    return Job("portforward", redeemed, port=port)


def open_pair(client: Spdy, stream: int, request: int) -> None:
    for offset, kind in enumerate(("error", "data")):
        headers = {"streamtype": kind, "port": "80", "requestid": str(request)}
        client.sock.sendall(client.headers.syn_stream(stream + 2 * offset, headers))


@pytest.mark.parametrize("tunnelled", [False, True])
def test_many_half_closed_connections_go_through_one_spdy_connection(
    worker: Worker, echo: int, tunnelled: bool
) -> None:
    with worker.dial() as sock:
        path = worker.cri.token(forward(echo))
        client = Spdy.tunnelled(sock, path) if tunnelled else Spdy.connect(sock, path, "portforward.k8s.io")
        for number in range(20):
            open_pair(client, 4 * number + 1, number)
            client.sock.sendall(data_frame(4 * number + 3, b"hello %d " % number, fin=True))
        while len(client.ended) < 40:
            client.frame()
        for number in range(20):
            assert client.received[4 * number + 3] == b"hello %d bye" % number
        assert worker.info().table[0].kind == "portforward"
    eventually(lambda: worker.info().connections == 0)


def test_a_refused_port_is_told_and_both_streams_are_reset(worker: Worker, echo: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = unused.getsockname()[1]
    with worker.dial() as sock:
        client = Spdy.connect(sock, worker.cri.token(forward(closed)), "portforward.k8s.io")
        open_pair(client, 1, 0)
        while len(client.resets) < 2:
            client.frame()
        assert client.received[1].startswith(b"error forwarding port 80 to pod pod, uid uid: dial:")
        sock.sendall(client.headers.syn_stream(5, {"streamtype": "data", "port": "99999"}))
        while 5 not in client.resets:
            client.frame()


def test_websocket_port_forward_says_its_port_on_both_channels(worker: Worker, echo: int) -> None:
    with worker.dial() as sock:
        client = WebSocket.connect(sock, worker.cri.token(forward(echo, [80, 81])), "v4.channel.k8s.io")
        client.send(0, b"zero")
        client.send(2, b"two")
        while len(client.channels[2]) < 5 or len(client.channels[0]) < 6:
            client.frame()
    assert client.channels[0] == struct.pack("<H", 80) + b"zero"
    assert client.channels[2] == struct.pack("<H", 81) + b"two"
    assert client.channels[1] == struct.pack("<H", 80)


def test_a_connection_that_takes_nothing_is_given_up_for_the_others(host: Host, echo: int) -> None:
    with (
        stream_worker.started(host, stall_timeout=0.5) as worker,
        socket.create_server(("127.0.0.1", 0)) as deaf,
        worker.dial() as sock,
    ):
        work = forward(deaf.getsockname()[1])
        client = Spdy.connect(sock, worker.cri.token(work), "portforward.k8s.io")
        open_pair(client, 1, 0)
        eventually(lambda: worker.cri.opened == 1)
        work.port = echo
        open_pair(client, 5, 1)
        for _ in range(200):
            sock.sendall(data_frame(3, bytes(65536)))
        sock.sendall(data_frame(7, b"alive ", fin=True))
        while client.received[7] != b"alive bye":
            client.frame()
        assert b"nothing was taken" in client.received[1]


# -- limits and strangers ---------------------------------------------------------------------------------


def refusal(worker: Worker, raw: bytes) -> int:
    with worker.dial() as sock:
        sock.sendall(raw)
        return read_head(sock)[0]


def test_tokens_are_used_once_and_strangers_get_their_status(worker: Worker) -> None:
    fields = ["Connection: Upgrade", "Upgrade: SPDY/3.1", "X-Stream-Protocol-Version: v4.channel.k8s.io"]
    path = worker.cri.token(job("true"))
    with worker.dial() as sock:
        Spdy.connect(sock, path)
        assert refusal(worker, head(path, *fields)) == 404
    assert refusal(worker, head("/exec/none", *fields)) == 404
    assert refusal(worker, head("/attach/token0", *fields)) == 404
    assert refusal(worker, head(worker.cri.token(job("true")), *fields[:2])) == 400
    assert refusal(worker, head("/metrics", *fields)) == 404
    assert refusal(worker, b"\x00\xff\r\n\r\n") == 400
    assert refusal(worker, b"GET /" + b"x" * 30000) == 431


def test_silence_slowness_and_missing_streams_end_in_time(host: Host) -> None:
    with stream_worker.started(host, head_timeout=0.5, creation_timeout=0.5, idle_timeout=1.0) as worker:
        with worker.dial() as silent:
            assert silent.recv(1) == b""
        with worker.dial() as slow:
            slow.sendall(b"GET / HT")
            assert slow.recv(1) == b""
        with worker.dial() as sock:
            Spdy.connect(sock, worker.cri.token(job("true"))).open("error")
            sock.settimeout(5)
            while sock.recv(4096):
                pass
        with worker.dial() as sock:
            client = Spdy.connect(sock, worker.cri.token(job("exec sleep 1000")))
            client.open("error", "stdin", "stdout", "stderr")
            while sock.recv(4096):
                pass
        eventually(lambda: worker.info().connections == 0)


@pytest.mark.parametrize(
    "garbage", [os.urandom(5000), control(99, b""), control(1, b"x" * 20), b"\x80\x03" * 999]
)
def test_garbage_after_the_upgrade_ends_only_that_connection(worker: Worker, garbage: bytes) -> None:
    worker.info()  # it has started
    before = worker.descriptors()
    with worker.dial() as sock:
        Spdy.connect(sock, worker.cri.token(job("true")))
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        try:
            while sock.recv(4096):
                pass
        except ConnectionResetError:
            pass
    eventually(lambda: worker.info().connections == 0)
    eventually(lambda: worker.descriptors() <= before + 2)  # the connection to cri, and to this asker


def test_idle_sessions_are_cheap_and_end_when_the_worker_is_told_to(worker: Worker) -> None:
    clients = []
    before = 0
    for number in range(60):
        sock = worker.dial()
        client = Spdy.connect(sock, worker.cri.token(job("exec sleep 1000")))
        client.open("error", "stdin", "stdout", "stderr")
        clients.append(sock)
        if number == 9:
            eventually(lambda: worker.info().sessions == 10)
            before = resident(worker)
    eventually(lambda: worker.cri.opened == 60)
    assert (resident(worker) - before) / 50 < 100_000
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.wait() == 0
    for sock in clients:
        sock.close()


def resident(worker: Worker) -> int:
    return int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1]) * 4096


def test_it_leaves_when_idle_but_not_while_there_is_a_session(host: Host) -> None:
    with stream_worker.started(host, idle_exit=0.5) as worker:
        with worker.dial() as sock:
            client = Spdy.connect(sock, worker.cri.token(job("sleep 1.5; echo still")))
            client.open("error", "stdin", "stdout", "stderr")
            client.to_end()
            assert client.text("stdout") == b"still\n"
        assert worker.wait() == 0


# -- TLS --------------------------------------------------------------------------------------------------


def refused_later(sock: ssl.SSLSocket) -> bool:
    """In TLS 1.3 a client learns with its first read that its certificate is missing."""
    try:
        sock.sendall(head("/exec/t"))
        return sock.recv(100) == b""
    except (ssl.SSLError, ConnectionError):
        return True


def test_mutual_tls_with_a_minimum_version(host: Host) -> None:
    cert, key = certificate(host.base, "node")
    settings = {"tls_cert": cert, "tls_key": key, "tls_client_ca": cert, "tls_min_version": "1.3"}
    with stream_worker.started(host, **settings) as worker:
        context = ssl.create_default_context(cafile=cert)
        context.check_hostname = False
        context.load_cert_chain(cert, key)
        with worker.dial() as raw, context.wrap_socket(raw) as sock:
            client = Spdy.connect(sock, worker.cri.token(job("cat; head -c 3000000 /dev/zero")))
            client.open("error", "stdin", "stdout", "stderr")
            client.send("stdin", b"secret", fin=True)
            client.to_end()
            assert client.text("stdout") == b"secret" + bytes(3_000_000)
            assert sock.version() == "TLSv1.3"
        stranger = ssl.create_default_context(cafile=cert)
        stranger.check_hostname = False
        with worker.dial() as raw, stranger.wrap_socket(raw) as sock:
            assert refused_later(sock)
        old = ssl.create_default_context(cafile=cert)
        old.check_hostname = False
        old.load_cert_chain(cert, key)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with worker.dial() as raw, pytest.raises((ssl.SSLError, ConnectionError)):
            old.wrap_socket(raw)
        with worker.dial() as plain:
            plain.sendall(head("/exec/t"))
            assert b"HTTP" not in plain.recv(100)
