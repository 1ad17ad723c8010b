"""Runs in: the tests, as root. What each worker must still be able to do inside its sandbox."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import urllib3

from tests.support import sandboxed
from tests.support.sandboxed import UIDS, Host, enter, inside

ECHO = "/bulkhead.Echo/Say"
CLIENT = """
import grpc, sys
with grpc.insecure_channel(sys.argv[1]) as channel:
    print(channel.unary_unary(sys.argv[2])(b"x", timeout=5))
"""


@pytest.fixture
def host() -> Iterator[Host]:
    with sandboxed.host() as here:
        yield here


# -- cri --------------------------------------------------------------------------------------------------


async def _serve_grpc(path: str, stop_fd: int) -> None:
    """A grpc.aio server with a pool of threads, until `stop_fd` ends."""

    async def say(request: bytes, _context: object) -> bytes:
        return await asyncio.to_thread(lambda: request + str(os.getuid()).encode())

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(say)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bulkhead.Echo", {"Say": handler}),)
    )
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_reader(stop_fd, stopped.set)
    await stopped.wait()
    await server.stop(None)


def test_cri_serves_grpc_with_threads_on_a_socket_that_root_renames(host: Host) -> None:
    stop_fd, hold_fd = os.pipe()
    bound = host.run_root / "bind" / "cri.sock"
    public = host.base / "public.sock"
    pid = os.fork()
    if pid == 0:
        os.close(hold_fd)
        try:
            enter("cri", host)
            asyncio.run(_serve_grpc(str(bound), stop_fd))
        finally:
            os._exit(1)
    os.close(stop_fd)
    try:
        wait_for(bound)
        bound.rename(public)
        # a client process of its own: gRPC in a process that forks is another story
        command = [sys.executable, "-c", CLIENT, f"unix:{public}", ECHO]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        assert f"x{UIDS['cri']}" in said.stdout, said.stderr
    finally:
        os.close(hold_fd)
        os.waitpid(pid, 0)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.01)


def test_cri_keeps_a_database_in_its_directory(host: Host) -> None:
    def work() -> int:
        with sqlite3.connect(f"{host.run_root}/cri/state.db") as db:
            assert db.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
            db.execute("CREATE TABLE pods (id TEXT PRIMARY KEY)")
            db.executemany("INSERT INTO pods VALUES (?)", [(str(i),) for i in range(2000)])
            db.commit()
            db.execute("VACUUM")
            return int(db.execute("SELECT count(*) FROM pods ORDER BY random()").fetchone()[0])

    assert inside("cri", work, host).value == 2000


def test_cri_reads_network_and_cgroup_statistics_of_other_processes(host: Host) -> None:
    other = subprocess.Popen(["/usr/bin/unshare", "-n", "sleep", "30"])

    def read() -> list[bool]:
        net = Path(f"/proc/{other.pid}/net/dev").read_text()
        controllers = os.listdir("/sys/fs/cgroup")
        return ["lo:" in net, bool(controllers), Path(f"/proc/{other.pid}/stat").exists()]

    try:
        assert inside("cri", read, host).value == [True, True, True]
    finally:
        other.kill()
        other.wait()


def test_cri_sees_what_appears_in_a_monitors_directory_later(host: Host) -> None:
    read_fd, write_fd = os.pipe()

    def wait_and_read() -> str:
        os.read(read_fd, 1)
        return Path(f"{host.run_root}/monitors/c1/exit.json").read_text()

    def appear() -> None:
        time.sleep(0.3)
        directory = host.run_root / "monitors" / "c1"
        directory.mkdir()
        (directory / "exit.json").write_text("{}")
        os.write(write_fd, b"x")

    pid_of_writer = os.fork()
    if pid_of_writer == 0:
        appear()
        os._exit(0)
    assert inside("cri", wait_and_read, host).value == "{}"
    os.waitpid(pid_of_writer, 0)


@pytest.mark.parametrize("kind", ["cri", "ops", "stream"])
def test_connects_to_the_sockets_of_those_it_may_call(kind: str, host: Host) -> None:
    path = host.run_root / "ipc" / "cri.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(path))
        os.chmod(path, 0o666)
        server.listen()

        def connect() -> str:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(str(path))
                client.send(b"hello")
            return "ok"

        assert inside(kind, connect, host).value == "ok"
        assert server.accept()[0].recv(16) == b"hello"


# -- image ------------------------------------------------------------------------------------------------


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of an HTTPS server on loopback, a process of its own, and its certificate authority."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = os.fork()
        if pid == 0:
            try:
                _answer_https(listener, key, certificate)
            finally:
                os._exit(1)
        yield listener.getsockname()[1], certificate
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def _answer_https(listener: socket.socket, key: Path, certificate: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    while True:
        plain, _ = listener.accept()
        with context.wrap_socket(plain, server_side=True) as connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")


def test_image_speaks_tls_to_a_name_from_etc_hosts(host: Host, tls_server: tuple[int, Path]) -> None:
    port, authority = tls_server
    (host.base / "certs.d" / "ca.crt").write_bytes(authority.read_bytes())

    def fetch() -> str:
        with urllib3.PoolManager(ca_certs=f"{host.base}/certs.d/ca.crt", retries=False) as pool:
            return pool.request("GET", f"https://localhost:{port}/", timeout=5).data.decode()

    assert inside("image", fetch, host).value == "hello"


def test_image_trusts_the_hosts_authorities_and_resolves_in_threads(host: Host) -> None:
    def work() -> list[int]:
        context = ssl.create_default_context()
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.append(len(socket.getaddrinfo("localhost", 443))))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [len(context.get_ca_certs()), len(found)]

    authorities, answers = inside("image", work, host).value
    assert authorities > 0
    assert answers == 8


def test_image_asks_a_name_server_and_names_that_do_not_exist_are_an_answer(host: Host) -> None:
    def resolve() -> str:
        try:
            socket.getaddrinfo("no-such-host.invalid", 443, family=socket.AF_INET)
        except socket.gaierror as error:
            return error.strerror or "?"
        return "ok"

    # whatever the host's resolver says, it is an answer of the resolver and not a crash of the sandbox
    assert inside("image", resolve, host).value != "ok"


def test_image_writes_blobs_into_a_pipe_that_it_was_given(host: Host) -> None:
    read_fd, write_fd = os.pipe()

    def write() -> int:
        os.close(read_fd)
        return os.write(write_fd, b"x" * 4096)

    assert inside("image", write, host).value == 4096
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        assert pipe.read() == b"x" * 4096


# -- storage and network ----------------------------------------------------------------------------------


def test_storage_mounts_overlays_makes_nodes_and_owners(host: Host) -> None:
    from ipc import kernel

    base = host.base / "lib"
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir(parents=True)
    (base / "lower" / "file").write_text("x")

    def work() -> str:
        options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        kernel.mount("overlay", f"{base}/merged", "overlay", 0, options)
        try:
            os.unlink(f"{base}/merged/file")
            os.mknod(f"{base}/lower/null", 0o020666, os.makedev(1, 3))
            os.chown(f"{base}/lower/file", 1234, 1234)
            os.chmod(f"{base}/lower/file", 0o4755)
            os.setxattr(
                f"{base}/lower/file", "security.capability", bytes.fromhex("0100000200040000") + bytes(12)
            )
        finally:
            kernel.umount(f"{base}/merged")
        return "ok"

    assert inside("storage", work, host).value == "ok"
