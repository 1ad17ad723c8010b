"""Runs in: image.

Whose password goes where. Credentials come with the request (CRI AuthConfig) or from an auth file (the
config.json of docker and kubelet). Those of the request are for the registry that the reference names,
also where registries.conf moved it; a mirror gets them only if it is on the same host or named by
`server_address`. It refuses to run credential helpers.
"""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec

from ipc.errors import invalid, precondition
from ipc.messages.image import Auth
from ipc.reference import DEFAULT_DOMAIN
from workers.image.registries import Endpoint

#: What `docker login` writes for an identity token in place of a user name.
TOKEN_USER = "<token>"  # noqa: S105 - a marker, no secret
MAX_FILE = 4 << 20
_DOCKER_KEYS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True)
class Credentials:
    """What one registry is told about us. Which fields are set says how."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:  # secrets never reach a log
        return f"Credentials(username={self.username!r}, ...)"

    @property
    def basic(self) -> str:
        """The value of a basic Authorization header, "" without user name."""
        if not self.username:
            return ""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


def of_auth(auth: Auth) -> Credentials | None:
    """The credentials of a request, None if it has none. Raises RemoteError(INVALID_ARGUMENT)."""
    username, password = auth.username, auth.password
    if auth.auth and not username:
        username, password = _decode_pair(auth.auth)
    identity = auth.identity_token
    if username == TOKEN_USER:
        username, password, identity = "", "", identity or password
    found = Credentials(username, password, identity, auth.registry_token)
    return None if found == Credentials() else found


def _decode_pair(encoded: str) -> tuple[str, str]:
    try:
        username, colon, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise invalid("the registry credentials' `auth` is not base64 of user:password") from None
    if not colon:
        raise invalid("the registry credentials' `auth` is not base64 of user:password")
    return username, password.rstrip("\0")


def host_of(key: str) -> str:
    """The registry that a key of an auth file or a server_address means: host[:port][/namespace]."""
    name = key.removeprefix("https://").removeprefix("http://").rstrip("/")
    host, slash, path = name.partition("/")
    if path in {"v1", "v2"}:  # https://index.docker.io/v1/
        slash = path = ""
    return (DEFAULT_DOMAIN if host in _DOCKER_KEYS else host.lower()) + slash + path


def applies(auth: Auth, domain: str, endpoint: Endpoint) -> bool:
    """Whether the credentials of a request for a reference on `domain` may go to an endpoint."""
    host = host_of(endpoint.host)
    if auth.server_address:
        named = host_of(auth.server_address).partition("/")[0]
        if fnmatchcase(host, named):
            return True
        return not endpoint.mirror and fnmatchcase(domain.lower(), named)
    return not endpoint.mirror or host == domain.lower()


class _Entry(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


class _File(msgspec.Struct):
    auths: dict[str, _Entry] = {}


class AuthFile:
    """An auth file, read again when it changed; one that is missing is empty. Safe for threads.

    Such files are often root's alone: it is opened when this is made, while we still are root, and read
    through that descriptor. A file that replaces it is the next worker's.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] = ()
        self._entries: Mapping[str, _Entry] = {}
        self._fd = self._open()

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC) if self._path else -1
        except OSError:
            return -1  # looked for again when it is needed

    def find(self, endpoint: Endpoint) -> Credentials | None:
        """The entry with the longest key that covers the endpoint's repository.

        Raises RemoteError: FAILED_PRECONDITION for a file that is none, INVALID_ARGUMENT for a bad entry.
        """
        entries = self._load()
        for key in _keys(endpoint):
            entry = entries.get(key)
            if entry is not None:
                return of_auth(_auth_of(entry))
        return None

    def _load(self) -> Mapping[str, _Entry]:
        with self._lock:
            status = self._look()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns) if status else ()
            if stamp != self._stamp:
                self._entries = self._parse(self._read(stamp[1])) if stamp else {}
                self._stamp = stamp
            return self._entries

    @property
    def replaced(self) -> bool:
        """Whether what we read has lost its name, and we cannot see its successor."""
        return self._fd >= 0 and os.fstat(self._fd).st_nlink == 0

    def _look(self) -> os.stat_result | None:
        """The file as it is now; a replaced one serves until its successor can be opened."""
        if self._fd < 0 or self.replaced:
            successor = self._open()
            if successor >= 0:
                if self._fd >= 0:
                    os.close(self._fd)
                self._fd = successor
        return os.fstat(self._fd) if self._fd >= 0 else None

    def _read(self, size: int) -> bytes:
        if size > MAX_FILE:
            raise precondition(f"the auth file {self._path} has {size} bytes, which is too many")
        return os.pread(self._fd, size, 0)

    def _parse(self, data: bytes) -> Mapping[str, _Entry]:
        try:
            auths = msgspec.json.decode(data, type=_File).auths
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            # The error would quote what stands there.
            raise precondition(
                f"the auth file {self._path} is not JSON of the docker config.json form"
            ) from None
        return {host_of(key): entry for key, entry in auths.items()}


def _auth_of(entry: _Entry) -> Auth:
    return Auth(
        username=entry.username,
        password=entry.password,
        auth=entry.auth,
        identity_token=entry.identitytoken,
        registry_token=entry.registrytoken,
    )


def _keys(endpoint: Endpoint) -> Iterator[str]:
    name = f"{host_of(endpoint.host)}/{endpoint.repository}"
    while name:
        yield name
        name = name.rpartition("/")[0]


def select(auth: Auth | None, domain: str, endpoint: Endpoint, file: AuthFile) -> Credentials | None:
    """What to tell an endpoint: the request's credentials if they are for it, else the auth file's."""
    if auth is not None and applies(auth, domain, endpoint):
        found = of_auth(auth)
        if found is not None:
            return found
    return file.find(endpoint)
