"""Runs in: the tests.

Those who sign images: gpg with keys of its own, openssl as cosign would use it, and a place on the web where
simple signatures lie.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.support.registry import OCI_MANIFEST, Image, digest_of

COSIGN_PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
LONG_AGO = "20200101T000000"


class Gpg:
    """A home of gpg; keys are named by what stands in their user id. A context manager."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="bh-gpg-"))  # short, for the agent's socket is in it

    def __enter__(self) -> Gpg:
        return self

    def __exit__(self, *_exception: object) -> None:
        subprocess.run(["gpgconf", "--homedir", self.home, "--kill", "all"], check=True)
        shutil.rmtree(self.home, ignore_errors=True)

    def run(self, *words: str, data: bytes = b"") -> bytes:
        """Call gpg; returns its output."""
        command = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--no-tty", *words]
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout

    def key(self, name: str, *, expired: bool = False, armor: bool = False) -> bytes:
        """Make a key and return its public half."""
        then = ("--faked-system-time", LONG_AGO) if expired else ()
        life = "1d" if expired else "never"
        self.run(
            *then,
            "--passphrase",
            "",
            "--quick-gen-key",
            f"{name} <{name}@example.org>",
            "ed25519",
            "sign",
            life,
        )
        return self.run(*(["--armor"] if armor else []), "--export", name)

    def sign(self, name: str, text: bytes, *, expired: bool = False) -> bytes:
        """The text as a message that the key signed."""
        then = ("--faked-system-time", LONG_AGO) if expired else ()
        return self.run(*then, "--local-user", name, "--compress-algo", "none", "--sign", data=text)


def claim(digest: str, reference: str, kind: str = "atomic container signature") -> bytes:
    """What is signed: that the manifest with this digest is the image of this name."""
    critical = {
        "type": kind,
        "image": {"docker-manifest-digest": digest},
        "identity": {"docker-reference": reference},
    }
    return json.dumps({"critical": critical, "optional": {"creator": "a test"}}).encode()


class EcKey:
    """A key as cosign makes them, in files of a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.private = directory / f"{name}.key"
        self.public = directory / f"{name}.pub"
        _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(self.private))
        _openssl("ec", "-in", str(self.private), "-pubout", "-out", str(self.public))

    def sign(self, payload: bytes) -> bytes:
        """The signature."""
        return _openssl("dgst", "-sha256", "-sign", str(self.private), data=payload)


def _openssl(*words: str, data: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *words], input=data, capture_output=True, check=True).stdout


def attachment(signed: list[tuple[bytes, bytes]]) -> Image:
    """The image that has the signatures of another one: payload and signature each."""
    config = b"{}"
    layers = [
        {
            "mediaType": COSIGN_PAYLOAD,
            "digest": digest_of(payload),
            "size": len(payload),
            "annotations": {"dev.cosignproject.cosign/signature": base64.b64encode(signature).decode()},
        }
        for payload, signature in signed
    ]
    head = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(config), "size": 2}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": head, "layers": layers}
    blobs = {digest_of(payload): payload for payload, _ in signed}
    return Image(json.dumps(manifest).encode(), OCI_MANIFEST, blobs | {digest_of(config): config})


def attachment_tag(digest: str) -> str:
    """Where the signatures of a manifest are."""
    return f"{digest.replace(':', '-')}.sig"


@contextlib.contextmanager
def lookaside(directory: Path) -> Iterator[str]:
    """Serve a directory over HTTP on loopback; its URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_words: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=os.fspath(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/signatures"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def put(directory: Path, repository: str, digest: str, *messages: bytes) -> None:
    """Lay simple signatures of a manifest down as containers-registries.d(5) says."""
    place = directory / f"{repository}@{digest.replace(':', '=')}"
    place.mkdir(parents=True, exist_ok=True)
    for number, message in enumerate(messages, 1):
        (place / f"signature-{number}").write_bytes(message)
