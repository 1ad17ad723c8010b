"""Runs in: the tests, as root. ops and stream, whole and in their real sandboxes."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from ipc.blocking import Client
from ipc.errors import RemoteError
from ipc.messages.stream import InfoGet
from ipc.settings import Common, OpsSettings, StreamSettings
from tests.support import demand_worker, sandboxed
from tests.support.demand_worker import Worker
from tests.support.sandboxed import Host


@pytest.fixture
def host() -> Iterator[Host]:
    with sandboxed.host() as here:
        yield here


def ops_settings(idle_exit: float = 60.0) -> Callable[[Common], Common]:
    return lambda common: OpsSettings(
        root=common.root, run_root=common.run_root, uids=common.uids, idle_exit=idle_exit
    )


@pytest.fixture
def ops(host: Host) -> Iterator[Worker]:
    with demand_worker.started("ops", ops_settings(), host) as worker:
        yield worker


def ask(worker: Worker, raw: bytes) -> bytes:
    """All that comes back until the worker ends the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(15)
        client.connect(worker.http)
        client.sendall(raw)
        return b"".join(iter(lambda: client.recv(65536), b""))


def get(worker: Worker, path: str) -> tuple[int, bytes]:
    head, _, body = ask(worker, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_metrics_come_from_the_supervisor_cri_and_proc(ops: Worker) -> None:
    status, body = get(ops, "/metrics")
    lines = body.decode().splitlines()
    assert status == 200
    assert 'bulkhead_source_up{source="cri"} 1.0' in lines
    assert 'bulkhead_pods{state="ready"} 2.0' in lines
    assert 'bulkhead_worker_restarts_total{kind="ops"} 1.0' in lines
    resident = [
        line for line in lines if line.startswith('bulkhead_process_resident_memory_bytes{kind="ops"}')
    ]
    assert float(resident[0].split()[1]) > 1 << 20


def test_workers_and_info_are_json(ops: Worker) -> None:
    status, body = get(ops, "/workers")
    workers = json.loads(body)
    assert status == 200
    assert workers["workers"][0]["kind"] == "ops"
    assert workers["processes"][str(ops.pid)]["threads"] >= 1
    status, body = get(ops, "/info")
    info = json.loads(body)
    assert status == 200
    assert info["host"]["kernel"] == "6.1"
    assert info["cri"]["containers"] == {"running": 3}
    assert info["version"]


def test_healthz_says_ok(ops: Worker) -> None:
    assert get(ops, "/healthz") == (200, b"ok\n")


def test_a_cri_that_does_not_answer_is_told_and_the_rest_still_comes(host: Host) -> None:
    with demand_worker.started("ops", ops_settings(), host, cri=False) as ops:
        status, body = get(ops, "/healthz")
        assert status == 503
        assert body.startswith(b"cri: ")
        status, body = get(ops, "/metrics")
        assert status == 200
        assert b'bulkhead_source_up{source="cri"} 0.0' in body
        assert b'bulkhead_worker_up{kind="ops"} 1.0' in body


def test_other_paths_methods_and_garbage_get_their_status(ops: Worker) -> None:
    assert get(ops, "/etc/passwd")[0] == 404
    assert b"405 Method Not Allowed" in ask(ops, b"POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"400 Bad Request" in ask(ops, b"\x16\x03\x01\r\n\r\n")
    assert b"431 " in ask(ops, b"GET / HTTP/1.1\r\nA: " + b"x" * 9000 + b"\r\n\r\n")
    assert get(ops, "/healthz")[0] == 200


def test_a_client_that_says_nothing_or_goes_away_harms_nobody(ops: Worker) -> None:
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    silent.connect(ops.http)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hasty:
        hasty.connect(ops.http)
        hasty.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert get(ops, "/healthz")[0] == 200
    silent.settimeout(10)
    assert silent.recv(1) == b""  # the time to ask is over
    silent.close()


def test_more_clients_than_fit_are_told_so(ops: Worker) -> None:
    silent = []
    try:
        for _ in range(32):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.connect(ops.http)
            silent.append(client)
        assert get(ops, "/healthz")[0] == 503
    finally:
        for client in silent:
            client.close()
    until = time.monotonic() + 5
    while get(ops, "/healthz")[0] != 200:
        assert time.monotonic() < until


def test_it_leaves_when_nobody_asks_and_stays_while_somebody_does(host: Host) -> None:
    with demand_worker.started("ops", ops_settings(1.0), host) as ops:
        for _ in range(8):
            assert get(ops, "/healthz")[0] == 200
            time.sleep(0.25)
        assert ops.wait() == 0


def test_sigterm_ends_it_in_order(ops: Worker) -> None:
    assert get(ops, "/healthz")[0] == 200
    os.kill(ops.pid, signal.SIGTERM)
    assert ops.wait() == 0


def test_it_leaves_with_its_supervisor(ops: Worker) -> None:
    assert get(ops, "/healthz")[0] == 200
    ops.lose_surroundings()
    assert ops.wait() == 0


def stream_settings(idle_exit: float) -> Callable[[Common], Common]:
    return lambda common: StreamSettings(
        root=common.root, run_root=common.run_root, uids=common.uids, idle_exit=idle_exit
    )


def test_stream_tells_its_sessions_and_leaves_when_nobody_asks(host: Host) -> None:
    with demand_worker.started("stream", stream_settings(1.0), host) as stream:
        with Client(stream.ipc, timeout=10) as client:
            assert client.call(InfoGet()).sessions == 0
        assert stream.wait() == 0


def test_stream_answers_root_only(host: Host) -> None:
    with demand_worker.started("stream", stream_settings(60.0), host) as stream:
        os.chmod(host.base, 0o711)
        os.chmod(stream.ipc, 0o666)
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setuid(61099)
            try:
                with Client(stream.ipc, timeout=5) as client:
                    client.call(InfoGet())
            except RemoteError as error:
                os.write(write_fd, error.code.encode())
            finally:
                os._exit(0)
        os.close(write_fd)
        os.waitpid(pid, 0)
        with os.fdopen(read_fd) as pipe:
            assert pipe.read() == "permission_denied"
