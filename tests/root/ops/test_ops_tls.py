"""Runs in: the tests, as root. What ops answers on TCP, whole and in its real sandbox: TLS, and to whom."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.settings import Common, OpsSettings
from tests.support import demand_worker, sandboxed
from tests.support.certificates import certificate
from tests.support.demand_worker import Worker
from tests.support.sandboxed import Host
from workers.ops import server

NAME = "node.example"
REFUSED = (ConnectionError, EOFError, ssl.SSLError)


class Site:
    """A worker whose certificate lies where it may look, and whose key is root's; and its clients."""

    def __init__(self, host: Host, listener: socket.socket) -> None:
        self.host = host
        self.tls = host.base / "ops-tls"
        self.tls.mkdir()
        host.base.chmod(0o755)
        self.cert, self.key = certificate(self.tls, NAME)
        self.mine = certificate(host.base, "scraper")
        self.others = certificate(host.base, "stranger")
        self.listener = listener
        self.place = listener.getsockname()

    def settings(self, common: Common, *, client_ca: str) -> OpsSettings:
        """What the worker is told."""
        return OpsSettings(
            root=common.root,
            run_root=common.run_root,
            uids=common.uids,
            tls_cert=self.cert,
            tls_key=self.key,
            tls_client_ca=client_ca,
        )

    @contextlib.contextmanager
    def worker(self, *, client_ca: str = "") -> Iterator[Worker]:
        """The worker, with an authority of clients or without."""

        def settings(common: Common) -> Common:
            return self.settings(common, client_ca=client_ca)

        with demand_worker.started("ops", settings, self.host, https=self.listener) as worker:
            yield worker

    def plain(self) -> socket.socket:
        """A connection without TLS as yet."""
        return socket.create_connection(self.place, timeout=10)

    def connect(self, mine: tuple[str, str] | None = None) -> ssl.SSLSocket:
        """A connection that trusts the certificate of now."""
        context = ssl.create_default_context(cafile=self.cert)
        if mine is not None:
            context.load_cert_chain(*mine)
        return context.wrap_socket(self.plain(), server_hostname=NAME)

    def get(self, path: str, mine: tuple[str, str] | None = None) -> int:
        """The status of a GET; the whole response has to come."""
        with self.connect(mine) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: {NAME}\r\n\r\n".encode())
            answer = everything(client)
        if not answer:
            raise EOFError("ended without a word")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        return int(head.split()[1])


def everything(client: socket.socket) -> bytes:
    """What comes until the end, which TLS tells."""
    return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.fixture
def site() -> Iterator[Site]:
    with sandboxed.host() as host, socket.create_server(("127.0.0.1", 0)) as listener:
        yield Site(host, listener)


def test_clients_with_a_certificate_get_everything_and_nobody_else_anything(site: Site) -> None:
    with site.worker(client_ca=site.mine[0]) as ops:
        assert site.get("/metrics", site.mine) == 200
        assert site.get("/workers", site.mine) == 200
        for stranger in (None, site.others):
            with pytest.raises(REFUSED):
                site.get("/metrics", stranger)
        with site.plain() as plain:
            plain.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert b"HTTP" not in everything(plain)
        assert site.get("/metrics", site.mine) == 200
        assert Path(f"/proc/{ops.pid}/net/tcp").read_text().count("\n") == 1  # its network is empty


def test_without_an_authority_only_what_a_scraper_needs_is_told(site: Site) -> None:
    with site.worker():
        assert [site.get(path) for path in ("/metrics", "/healthz", "/readyz")] == [200, 200, 200]
        assert [site.get(path) for path in ("/workers", "/info", "/config", "/containers/a")] == [403] * 4


def test_old_protocols_large_requests_and_other_methods_are_refused(site: Site) -> None:
    with site.worker():
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(site.cert)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with site.plain() as plain, pytest.raises(REFUSED):
            old.wrap_socket(plain, server_hostname=NAME)
        with site.connect() as client:
            client.sendall(b"GET / HTTP/1.1\r\nA: " + b"x" * 9000 + b"\r\n\r\n")
            assert b" 431 " in everything(client)
        with site.connect() as client:
            client.sendall(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
            assert b" 405 " in everything(client)


def test_who_is_slow_is_dropped_and_a_crowd_on_tcp_keeps_nobody_from_the_unix_socket(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT", 1.0)
    monkeypatch.setattr(server, "ASK_TIMEOUT", 1.0)
    with site.worker() as ops, contextlib.ExitStack() as clients:
        assert site.get("/healthz") == 200  # it is there
        half = clients.enter_context(site.connect())
        half.sendall(b"GET /metrics HTTP/1.1\r\n")
        silent = [clients.enter_context(site.plain()) for _ in range(server.MAX_CONNECTIONS)]
        with socket.socket(socket.AF_UNIX) as local:
            local.connect(ops.http)
            local.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert b" 200 OK" in everything(local)
        with pytest.raises(REFUSED):
            site.get("/healthz")  # as many are here as may be
        for client in (half, *silent):
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        assert site.get("/healthz") == 200


def test_a_key_that_only_root_may_read_is_read_by_the_next_worker(site: Site) -> None:
    with site.worker() as ops:
        assert site.get("/healthz") == 200
        new, new_key = certificate(site.host.base, NAME)
        os.rename(new_key, site.key)
        os.rename(new, site.cert)
        with contextlib.suppress(*REFUSED):
            site.get("/healthz")  # seen, and given a moment
        time.sleep(1.2)
        with site.plain():
            assert ops.wait() == 0
    with site.worker():
        assert site.get("/healthz") == 200
