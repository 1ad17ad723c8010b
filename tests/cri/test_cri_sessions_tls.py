"""TLS of the streaming server and of ops: mutual, and with certificates that are replaced meanwhile."""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.certificates import certificate
from tests.support.daemon import Node, alive, wait_for
from tests.support.stream_clients import Spdy

REFUSED = (EOFError, ConnectionError, ssl.SSLError)


class Pki:
    """A server's certificate in a directory of its own, whose key only root may read, and a client's."""

    def __init__(self, base: Path) -> None:
        self.server = base / "server"
        self.server.mkdir(parents=True)
        self.base = base
        self.renew("localhost")
        self.client, self.client_key = certificate(base, "client")

    def renew(self, name: str) -> str:
        """Replace certificate and key; return the certificate's copy, for clients to trust."""
        cert, key = certificate(self.base, name)
        trusted = self.base / f"{name}.trusted"
        trusted.write_text(Path(cert).read_text())
        os.rename(key, self.server / "tls.key")
        os.rename(cert, self.server / "tls.crt")
        return str(trusted)

    def config(self, table: str = "stream") -> str:
        """What the node is told."""
        return (
            f'[{table}]\ntls_cert = "{self.server}/tls.crt"\ntls_key = "{self.server}/tls.key"\n'
            f'tls_client_ca = "{self.client}"\ntls_min_version = "1.3"\n'
        )

    def connect(self, url: str, name: str, *, mine: bool = True) -> ssl.SSLSocket:
        """A connection that trusts the certificate of this name only."""
        context = ssl.create_default_context(cafile=str(self.base / f"{name}.trusted"))
        if mine:
            context.load_cert_chain(self.client, self.client_key)
        plain = socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=10)
        return context.wrap_socket(plain, server_hostname=name)


def forward_url(node: Node, pod: str) -> str:
    request = pb.PortForwardRequest(pod_sandbox_id=pod, port=[80])
    return node.runtime.PortForward(request, timeout=10).url


@pytest.fixture
def pki() -> Iterator[Pki]:
    """In a directory that the worker's user may look into: only so it sees a change at once."""
    with tempfile.TemporaryDirectory(prefix="bh-tls-", dir="/tmp") as base:
        Path(base).chmod(0o755)
        yield Pki(Path(base))


def test_sessions_outlive_their_certificates_and_new_ones_need_no_restart(pki: Pki) -> None:
    machine.enter()
    with Node(config=pki.config(), bridge="bhcri10") as node:
        pod = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="p", namespace="n", uid="u"))
        pod_id = node.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=pod), timeout=60).pod_sandbox_id
        url = forward_url(node, pod_id)
        assert url.startswith("https://127.0.0.1:")
        with pki.connect(url, "localhost", mine=False) as bare, pytest.raises(REFUSED):
            Spdy.connect(bare, urlsplit(url).path, "portforward.k8s.io")
        with pki.connect(url, "localhost") as first:
            session = Spdy.connect(first, urlsplit(url).path, "portforward.k8s.io")
            (worker,) = node.pids("stream")
            pki.renew("renewed")
            wait_for(lambda: answers(pki, forward_url(node, pod_id)), "the next connection has the new one")
            assert alive(worker)
            session.open("nonsense")  # it still speaks
            while not session.resets:
                session.frame()
        wait_for(lambda: not alive(worker), "the old worker ends with its session")


def answers(pki: Pki, url: str) -> bool:
    """Say whether the renewed certificate is shown."""
    try:
        with pki.connect(url, "renewed") as sock:
            Spdy.connect(sock, urlsplit(url).path, "portforward.k8s.io")
            return True
    except ssl.SSLCertVerificationError:
        return False


# -- ops ------------------------------------------------------------------------------------------------

OPS = "https://127.0.0.1:19537"


def scraped(pki: Pki, path: str, name: str = "localhost", *, mine: bool = True) -> int:
    """The status of what ops answers on TCP."""
    with pki.connect(OPS, name, mine=mine) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    if not answer:
        raise EOFError("ended without a word")
    return int(answer.split()[1])


def taken(pki: Pki, name: str) -> bool:
    """Say whether ops shows this certificate."""
    try:
        return scraped(pki, "/healthz", name) == 200
    except REFUSED:
        return False


def test_ops_on_tcp_takes_certificates_and_settings_with_the_next_connection(pki: Pki) -> None:
    machine.enter()
    config = pki.config("ops") + 'address = "127.0.0.1"\nport = 19537\n'
    with Node(config=config, bridge="bhcri10") as node:
        assert [scraped(pki, path) for path in ("/metrics", "/config", "/workers")] == [200] * 3
        with pytest.raises(REFUSED):
            scraped(pki, "/metrics", mine=False)
        pki.renew("renewed")
        wait_for(lambda: taken(pki, "renewed"), "the next worker has read the new key")
        lines = node.config.read_text().splitlines(keepends=True)
        node.config.write_text("".join(line for line in lines if "tls_client_ca" not in line))
        node.ctl("reload")
        wait_for(lambda: scraped(pki, "/metrics", "renewed", mine=False) == 200, "nobody is asked any more")
        assert scraped(pki, "/config", "renewed", mine=False) == 403
