"""Requests that go through a proxy: forwarded, tunnelled, with a password, and not for loopback."""

from __future__ import annotations

import contextlib
import http.server
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import RemoteError
from tests.support.fault_registry import FaultRegistry
from tests.support.image_client import blob_request, download, make_settings, pull, tools_of
from tests.support.registry import Authority, basic, insecure_registries, make_image, make_layer
from workers.image.client import Tools
from workers.image.proxies import from_environment

IMAGE = make_image([make_layer({"hello": b"hello"})])


class Tunnel:
    """A CONNECT proxy that leads everything to one place."""

    def __init__(self, target: str) -> None:
        self.asked: list[tuple[str, str]] = []
        tunnel = self
        host, _, port = target.partition(":")

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_CONNECT(self) -> None:
                tunnel.asked.append((self.path, self.headers.get("Proxy-Authorization", "")))
                with socket.create_connection((host, int(port))) as far:
                    self.send_response(200)
                    self.end_headers()
                    _copy(self.connection, far)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"127.0.0.1:{self._http.server_address[1]}"
        finally:
            self._http.shutdown()
            self._http.server_close()


def _copy(near: socket.socket, far: socket.socket) -> None:
    ends = {near: far, far: near}
    while True:
        for end in select.select(list(ends), [], [])[0]:
            data = end.recv(65536)
            if not data:
                return
            ends[end].sendall(data)


def tools_behind(tmp_path: Path, **environment: str) -> Tools:
    return tools_of(make_settings(tmp_path, retries=0), from_environment(environment))


def test_plain_http_is_forwarded_with_the_proxys_password(tmp_path: Path) -> None:
    insecure_registries(tmp_path / "registries.conf", "registry.invalid")
    with FaultRegistry(IMAGE) as proxy:
        tools = tools_behind(tmp_path, HTTP_PROXY=f"http://us%40er:pass@{proxy.address}")
        found = pull(tools, "registry.invalid/test/image:1")
        assert download(tools, blob_request(found, found.layers[0])) == IMAGE.layers[0].data
        assert proxy.paths()[0] == "http://registry.invalid/v2/test/image/manifests/1"
        assert {seen.headers["Proxy-Authorization"] for seen in proxy.seen} == {basic("us@er", "pass")}


def test_https_goes_through_a_tunnel_and_is_still_verified(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    tls = authority.issue("server", "DNS:registry.invalid")
    directory = tmp_path / "certs.d" / "registry.invalid"
    directory.mkdir(parents=True)
    with FaultRegistry(IMAGE, tls=tls) as server:
        tunnel = Tunnel(server.address)
        with tunnel.running() as proxy:
            tools = tools_behind(tmp_path, https_proxy=f"http://user:pass@{proxy}")
            with pytest.raises(RemoteError, match="TLS failed"):
                pull(tools, "registry.invalid/test/image:1")
            (directory / "ca.crt").write_bytes(authority.certificate.read_bytes())
            assert pull(tools, "registry.invalid/test/image:1").config == IMAGE.config
        assert set(tunnel.asked) == {("registry.invalid:443", basic("user", "pass"))}
        assert all("Proxy-Authorization" not in seen.headers for seen in server.seen)


def test_a_dead_proxy_is_named_as_the_cause_without_its_password(tmp_path: Path) -> None:
    tools = tools_behind(tmp_path, https_proxy="http://user:s3cret@127.0.0.1:1")
    with pytest.raises(RemoteError, match="the proxy failed: Connection refused") as caught:
        pull(tools, "registry.invalid/test/image:1")
    assert caught.value.reason == "RegistryUnavailable"
    assert "s3cret" not in caught.value.text


def test_loopback_is_not_proxied(tmp_path: Path) -> None:
    with FaultRegistry(IMAGE) as server:
        insecure_registries(tmp_path / "registries.conf", server.address)
        tools = tools_behind(tmp_path, http_proxy="http://127.0.0.1:1", https_proxy="http://127.0.0.1:1")
        assert pull(tools, f"{server.address}/test/image:1").config == IMAGE.config
