"""Runs in: the tests.

The image worker's client without its process: settings that name only the test's own files, and a blob
read back from the pipe it was poured into.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import urllib3

from ipc.messages.image import Auth, BlobFetch, Layer, ManifestResolve, Resolved
from ipc.settings import ImageSettings
from workers.image.blobs import Sink, fetch
from workers.image.certificates import Certificates
from workers.image.client import Tools, make_tools
from workers.image.credentials import AuthFile
from workers.image.operation import Operation
from workers.image.proxies import Proxies
from workers.image.resolve import resolve


def make_settings(
    tmp_path: Path,
    *,
    auth_file: Path | None = None,
    retries: int = 3,
    read_timeout: float = 5.0,
    max_manifest_bytes: int = 1 << 20,
) -> ImageSettings:
    """Settings whose files are `registries.conf`, `registries.conf.d` and `certs.d` in tmp_path."""
    return ImageSettings(
        root=str(tmp_path),
        run_root=str(tmp_path),
        registries_conf=str(tmp_path / "registries.conf"),
        registries_conf_dir=str(tmp_path / "registries.conf.d"),
        certs_dirs=[str(tmp_path / "certs.d")],
        auth_file=str(auth_file or ""),
        connect_timeout=2.0,
        read_timeout=read_timeout,
        retries=retries,
        max_manifest_bytes=max_manifest_bytes,
    )


def tools_of(settings: ImageSettings, proxies: Proxies | None = None) -> Tools:
    """What the worker's requests share."""
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    certificates, auth_file = Certificates(settings.certs_dirs), AuthFile(settings.auth_file)
    return make_tools(settings, proxies or Proxies(), certificates, auth_file)


def pull(
    tools: Tools, reference: str, *, auth: Auth | None = None, architecture: str = "", variant: str = ""
) -> Resolved:
    """Resolve a reference."""
    request = ManifestResolve(reference=reference, auth=auth, architecture=architecture, variant=variant)
    return resolve(tools, Operation(), request)


def blob_request(resolved: Resolved, layer: Layer, auth: Auth | None = None) -> BlobFetch:
    """The request for a layer of what was resolved."""
    return BlobFetch(source=resolved.source, digest=layer.digest, size=layer.size, urls=layer.urls, auth=auth)


class Pipe:
    """A pipe whose read end is drained by a thread. `data` is what came, after `join`."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()
        self._pieces: list[bytes] = []
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while piece := os.read(self._read_fd, 1 << 20):
            self._pieces.append(piece)
        os.close(self._read_fd)

    def data(self) -> bytes:
        """Everything up to the end of the pipe."""
        self._thread.join(10)
        assert not self._thread.is_alive(), "the pipe was not closed"
        return b"".join(self._pieces)


def download(tools: Tools, request: BlobFetch, operation: Operation | None = None) -> bytes:
    """Fetch a blob and return its bytes; the pipe is closed whatever happens."""
    pipe = Pipe()
    null_fd = os.open(os.devnull, os.O_WRONLY)
    sink = Sink(pipe.write_fd, null_fd)
    try:
        size = fetch(tools, operation or Operation(), request, sink, lambda _bytes: None)
    finally:
        sink.close()
        os.close(null_fd)
    data = pipe.data()
    assert size == len(data)
    return data
