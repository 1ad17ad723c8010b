"""Runs in: the tests.

Real registries on loopback (Debian's docker-registry: plain, TLS, client certificates, htpasswd, token
server), and small images made and pushed without any network beyond it.

    with Registry(tmp_path) as registry:
        image = make_image([make_layer({"etc/hello": b"hello\\n"})])
        push(registry, "test/hello", "1", image)
        ... pull f"{registry.address}/test/hello:1" with an `insecure` entry in registries.conf
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import platform
import secrets
import signal
import socket
import ssl
import subprocess
import tarfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import urllib3
import zstandard

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
ARCHITECTURE = ARCHITECTURES.get(platform.machine(), platform.machine())
START_TIMEOUT = 20.0


def digest_of(data: bytes) -> str:
    """`sha256:hex` of the bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# -- images -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer as it travels; `compression` is "", "gzip" or "zstd"."""

    data: bytes
    diff_id: str
    compression: str = "gzip"

    @property
    def digest(self) -> str:
        return digest_of(self.data)


@dataclass(frozen=True)
class Image:
    """A manifest or an index, with everything it needs to be pushed."""

    manifest: bytes
    media_type: str
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    children: Sequence[Image] = ()
    config: bytes = b""
    layers: Sequence[Layer] = ()

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    @property
    def image_id(self) -> str:
        """The config's digest."""
        return digest_of(self.config)


def make_tar(files: Mapping[str, bytes | tarfile.TarInfo], *, mode: int = 0o644) -> bytes:
    """A tar archive: path -> content (a path that ends in "/" is a directory), or a ready TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(path.rstrip("/"))
            info.mtime = 1_700_000_000
            if path.endswith("/"):
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            else:
                info.size, info.mode = len(content), mode
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def make_layer(
    files: Mapping[str, bytes | tarfile.TarInfo], *, compression: str = "gzip", mode: int = 0o644
) -> Layer:
    """A layer of files."""
    return layer_of_tar(make_tar(files, mode=mode), compression)


def layer_of_tar(tar: bytes, compression: str = "gzip") -> Layer:
    """A layer of a tar archive."""
    packed = {
        "": lambda: tar,
        "gzip": lambda: gzip.compress(tar, 1, mtime=0),
        "zstd": lambda: zstandard.compress(tar),
    }[compression]()
    return Layer(packed, digest_of(tar), compression)


def make_image(
    layers: Sequence[Layer],
    *,
    docker: bool = False,
    config: Mapping[str, Any] | None = None,
    architecture: str = ARCHITECTURE,
    os: str = "linux",
    manifest_extra: Mapping[str, Any] | None = None,
) -> Image:
    """An image manifest; `config` is its `config` member (Cmd, Env, User, ...)."""
    config_bytes = json.dumps(
        {
            "architecture": architecture,
            "os": os,
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created_by": "tests"} for _ in layers],
        }
    ).encode()
    media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": _descriptor(config_bytes, DOCKER_CONFIG if docker else OCI_CONFIG),
        "layers": [_descriptor(layer.data, _layer_type(layer, docker=docker)) for layer in layers],
    } | dict(manifest_extra or {})
    blobs = {digest_of(config_bytes): config_bytes} | {layer.digest: layer.data for layer in layers}
    return Image(json.dumps(manifest).encode(), media_type, blobs, (), config_bytes, tuple(layers))


def make_index(images: Mapping[tuple[str, str, str], Image], *, docker: bool = False) -> Image:
    """An index of images by (os, architecture, variant)."""
    media_type = DOCKER_LIST if docker else OCI_INDEX
    entries = []
    for (os, architecture, variant), image in images.items():
        made_for = {"os": os, "architecture": architecture} | ({"variant": variant} if variant else {})
        entries.append(_descriptor(image.manifest, image.media_type) | {"platform": made_for})
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}
    return Image(json.dumps(document).encode(), media_type, {}, tuple(images.values()))


def busybox_image(*, config: Mapping[str, Any] | None = None) -> Image:
    """A runnable image: Debian's static busybox, its usual applets, users, /tmp."""
    binary = Path("/bin/busybox").read_bytes()
    directories = ("bin/", "etc/", "tmp/", "proc/", "sys/", "dev/", "root/", "var/", "home/")
    files: dict[str, bytes | tarfile.TarInfo] = dict.fromkeys(directories, b"")
    base = layer_of_tar(make_tar(files | {"bin/busybox": binary}, mode=0o755))
    links: dict[str, bytes | tarfile.TarInfo] = {}
    applets = (
        "sh cat echo ls sleep true false id env mkdir rm touch stat kill ps mount hostname wc head tail"
        " grep seq yes dd ip ping nc httpd wget printf test sync chmod chown ln cp mv date awk sed tr od"
        " readlink uname trap time timeout nslookup sha256sum df du find xargs vi top getopt su telnet"
    )
    for applet in applets.split():
        link = tarfile.TarInfo(f"bin/{applet}")
        link.type, link.linkname, link.mode = tarfile.SYMTYPE, "busybox", 0o777
        links[link.name] = link
    links["etc/passwd"] = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n"
    links["etc/group"] = b"root:x:0:\nnobody:x:65534:\n"
    defaults = {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}
    return make_image([base, make_layer(links)], config=defaults | dict(config or {}))


def _descriptor(data: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def _layer_type(layer: Layer, *, docker: bool) -> str:
    if not layer.compression:
        return DOCKER_LAYER if docker else OCI_LAYER
    return f"{DOCKER_LAYER}.{layer.compression}" if docker else f"{OCI_LAYER}+{layer.compression}"


# -- certificates -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """Files of one certificate."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority of the test's own, in a directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.certificate = directory / f"{name}.crt"
        self._key = directory / f"{name}.key"
        _openssl(
            *["req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "30"],
            *("-subj", f"/CN={name}", "-keyout", self._key, "-out", self.certificate),
        )

    def issue(self, name: str, addresses: str = "IP:127.0.0.1,DNS:localhost") -> Certificate:
        """A certificate for a server on loopback, or for a client."""
        key, request = self._directory / f"{name}.key", self._directory / f"{name}.csr"
        certificate, extensions = self._directory / f"{name}.cert", self._directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={addresses}\n")
        _openssl(
            *["req", "-nodes", "-newkey", "rsa:2048"],
            *("-subj", f"/CN={name}", "-keyout", key, "-out", request),
        )
        _openssl(
            *("x509", "-req", "-days", "30", "-in", request, "-CA", self.certificate, "-CAkey", self._key),
            *("-CAcreateserial", "-extfile", extensions, "-out", certificate),
        )
        return Certificate(certificate, key)


def _openssl(*arguments: str | Path, data: bytes | None = None) -> bytes:
    done = subprocess.run(["openssl", *map(str, arguments)], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


# -- a token server ---------------------------------------------------------------------------------------


class TokenServer:
    """Issues bearer tokens that docker-registry accepts, for one user or anonymously; notes who asked how.

    `identity_token` is what it takes for a refresh token. `requests` are (method, parameters, authorization).
    """

    SERVICE = "registry.test"
    ISSUER = "bulkhead tests"

    def __init__(self, directory: Path, *, username: str = "", password: str = "") -> None:
        self._authority = Authority(directory, "token")
        self.certificate = self._authority.certificate
        self._key = directory / "token.key"
        self.username, self.password = username, password
        self.identity_token = secrets.token_hex(8)
        self.expires_in = 300
        self.requests: list[tuple[str, dict[str, str], str]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = urllib.parse.urlsplit(self.path).query
                server._answer(self, dict(urllib.parse.parse_qsl(query)))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                server._answer(self, dict(urllib.parse.parse_qsl(body)))

            def log_message(self, format: str, *args: Any) -> None: ...

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    @property
    def realm(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/token"

    def __enter__(self) -> TokenServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, handler: http.server.BaseHTTPRequestHandler, parameters: dict[str, str]) -> None:
        authorization = handler.headers.get("Authorization", "")
        self.requests.append((handler.command, parameters, authorization))
        allowed = self._allowed(handler.command, parameters, authorization)
        body = json.dumps(
            {"token": self.token(parameters.get("scope", "")), "expires_in": self.expires_in}
            if allowed
            else {"errors": [{"code": "UNAUTHORIZED", "message": "no such user"}]}
        ).encode()
        handler.send_response(200 if allowed else 401)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _allowed(self, method: str, parameters: dict[str, str], authorization: str) -> bool:
        if method == "POST":
            return secrets.compare_digest(parameters.get("refresh_token", ""), self.identity_token)
        return not self.username or authorization == basic(self.username, self.password)

    def token(self, scope: str) -> str:
        """A signed token for a scope ("repository:NAME:pull,push ...")."""
        access = []
        for part in scope.split():
            kind, name, actions = part.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        now = int(time.time())
        chain = "".join(self.certificate.read_text().splitlines()[1:-1])
        head = {"typ": "JWT", "alg": "RS256", "x5c": [chain]}
        claims = {
            "iss": self.ISSUER,
            "sub": self.username,
            "aud": self.SERVICE,
            "exp": now + self.expires_in,
            "nbf": now - 10,
            "iat": now - 10,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        signed = b".".join(_base64url(json.dumps(part).encode()) for part in (head, claims))
        signature = _openssl("dgst", "-sha256", "-sign", self._key, data=signed)
        return (signed + b"." + _base64url(signature)).decode()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def basic(username: str, password: str) -> str:
    """A basic Authorization header."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


# -- a registry -------------------------------------------------------------------------------------------


class Registry:
    """docker-registry on a loopback port, its files below `directory`. A context manager.

    `tls` is its certificate, `client_ca` makes it want client certificates, `users` are for htpasswd,
    `tokens` its token server. `address` is host:port, as in references.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tls: Certificate | None = None,
        client_ca: Path | None = None,
        users: Mapping[str, str] | None = None,
        tokens: TokenServer | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self._directory = directory
        self._tls, self._client_ca = tls, client_ca
        self._users, self._tokens = dict(users or {}), tokens
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self.address = f"{host}:{self._port}"

    @property
    def scheme(self) -> str:
        return "https" if self._tls else "http"

    def __enter__(self) -> Registry:
        self._directory.mkdir(parents=True, exist_ok=True)
        configuration = self._directory / "config.yml"
        configuration.write_text(json.dumps(self._configuration()))  # JSON is YAML
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", configuration], stdout=log, stderr=subprocess.STDOUT
            )
        self._await_start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _await_start(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
                return
            assert self._process.poll() is None, (self._directory / "log").read_text()
            time.sleep(0.02)
        self._process.kill()
        raise AssertionError("docker-registry does not listen: " + (self._directory / "log").read_text())

    def _configuration(self) -> dict[str, Any]:
        http_part: dict[str, Any] = {"addr": f"127.0.0.1:{self._port}", "secret": "s"}
        if self._tls is not None:
            http_part["tls"] = {"certificate": str(self._tls.certificate), "key": str(self._tls.key)}
            if self._client_ca is not None:
                http_part["tls"]["clientcas"] = [str(self._client_ca)]
        return {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self._directory / "data")},
                "delete": {"enabled": True},
            },
            "http": http_part,
            "validation": {"manifests": {"urls": {"allow": [".*"]}}},
        } | self._auth()

    def _auth(self) -> dict[str, Any]:
        if self._tokens is not None:
            server = self._tokens
            token = {
                "realm": server.realm,
                "service": server.SERVICE,
                "issuer": server.ISSUER,
                "rootcertbundle": str(server.certificate),
            }
            return {"auth": {"token": token}}
        if not self._users:
            return {}
        path = self._directory / "htpasswd"
        lines = [
            subprocess.run(["htpasswd", "-nbB", "-C", "4", *user], capture_output=True, check=True).stdout
            for user in self._users.items()
        ]
        path.write_bytes(b"".join(line.strip() + b"\n" for line in lines))
        return {"auth": {"htpasswd": {"realm": "tests", "path": str(path)}}}

    def authorization(self, repository: str) -> str:
        """An Authorization header that may push."""
        if self._tokens is not None:
            return f"Bearer {self._tokens.token(f'repository:{repository}:pull,push')}"
        for user in self._users.items():
            return basic(*user)
        return ""

    def delete_blob_data(self, digest: str) -> None:
        """Lose a blob, as a broken disk does."""
        algorithm, _, value = digest.partition(":")
        data = self._directory / "data/docker/registry/v2/blobs" / algorithm / value[:2] / value / "data"
        data.unlink()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- pushing ----------------------------------------------------------------------------------------------


def push(
    registry: Registry, repository: str, tag: str, image: Image, *, client: Certificate | None = None
) -> str:
    """Push an image (and an index's images) and return its digest."""
    pusher = _Pusher(registry, repository, client)
    for child in image.children:
        pusher.put(child, child.digest)
    pusher.put(image, tag)
    return image.digest


class _Pusher:
    def __init__(self, registry: Registry, repository: str, client: Certificate | None) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if client is not None:
            context.load_cert_chain(client.certificate, client.key)
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        self._pool = urllib3.PoolManager(ssl_context=context)
        self._base = f"{registry.scheme}://{registry.address}/v2/{repository}"
        authorization = registry.authorization(repository)
        self._headers = {"Authorization": authorization} if authorization else {}

    def put(self, image: Image, reference: str) -> None:
        for digest, data in image.blobs.items():
            self._put_blob(digest, data)
        self._ask("PUT", f"{self._base}/manifests/{reference}", image.manifest, image.media_type)

    def _put_blob(self, digest: str, data: bytes) -> None:
        place = self._ask("POST", f"{self._base}/blobs/uploads/").headers["Location"]
        place = urllib.parse.urljoin(self._base, place)
        separator = "&" if "?" in place else "?"
        self._ask("PUT", f"{place}{separator}digest={digest}", data, "application/octet-stream")

    def _ask(
        self, method: str, url: str, body: bytes = b"", media_type: str = ""
    ) -> urllib3.BaseHTTPResponse:
        headers = self._headers | ({"Content-Type": media_type} if media_type else {})
        answer = self._pool.request(method, url, body=body, headers=headers, retries=False)
        assert answer.status in {200, 201, 202}, (method, url, answer.status, answer.data)
        return answer


def insecure_registries(path: Path, *addresses: str, more: str = "") -> Path:
    """Write a registries.conf that allows plain HTTP to these registries."""
    tables = "".join(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n' for address in addresses)
    path.write_text(f"{tables}{more}")
    return path


@contextlib.contextmanager
def pushed(directory: Path, images: Mapping[str, Image]) -> Iterator[Registry]:
    """A plain registry with images by "repository:tag"."""
    with Registry(directory) as registry:
        for name, image in images.items():
            repository, _, tag = name.rpartition(":")
            push(registry, repository, tag, image)
        yield registry
