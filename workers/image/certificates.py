"""Runs in: image.

Whom we trust and who we are, by host: the system's certificate authorities, and certs.d
(`<host[:port]>/*.crt` are authorities, `*.cert` with `*.key` client certificates;
containers-certs.d(5)). It owns the TLS contexts, made again when a directory changed. A client certificate
is in the context of its own host only, so that a redirect cannot show it to another.
"""

from __future__ import annotations

import errno
import glob
import os
import ssl
import threading
from collections.abc import Sequence

from ipc.errors import RemoteError, precondition

HTTPS = 443
Stamp = tuple[tuple[str, int, int, int], ...]


class Certificates:
    """TLS contexts by host and port. Safe for threads.

    Keys are often root's alone: `preload` reads them while we still are root. `unreadable` says that a key
    came or changed since, which only the next worker can read.
    """

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = directories
        self._lock = threading.Lock()
        self._contexts: dict[tuple[str, int, bool], tuple[Stamp, ssl.SSLContext | RemoteError]] = {}
        self.unreadable = False

    def preload(self) -> None:
        """Make the contexts of all hosts that have client keys; what is wrong is told at its use."""
        for host, port in self._hosts_with_keys():
            for insecure in (False, True):
                self._cached(host, port, insecure=insecure)

    def context(self, host: str, port: int, *, insecure: bool = False) -> ssl.SSLContext:
        """The context for a host. Raises RemoteError(FAILED_PRECONDITION) naming the file that is wrong."""
        found = self._cached(host, port, insecure=insecure)
        if isinstance(found, RemoteError):
            raise found
        return found

    def _cached(self, host: str, port: int, *, insecure: bool) -> ssl.SSLContext | RemoteError:
        key = (host, port, insecure)
        with self._lock:
            files = self._files(host, port)
            stamp, found = self._contexts.get(key, (None, None))
            if found is None or stamp != _stamp(files):
                found = self._make(files, insecure=insecure)
                self._contexts[key] = (_stamp(files), found)
            return found

    def _make(self, files: Sequence[str], *, insecure: bool) -> ssl.SSLContext | RemoteError:
        try:
            return _make(files, insecure=insecure)
        except PermissionError as error:
            self.unreadable = True
            return precondition(f"cannot read the certificate or key {error.filename or 'in certs.d'}")
        except RemoteError as error:
            return error

    def _hosts_with_keys(self) -> list[tuple[str, int]]:
        names = {
            os.path.basename(os.path.dirname(path))
            for directory in self._directories
            for path in glob.glob(os.path.join(glob.escape(directory), "*", "*.key"))
        }
        return [_split_port(name) for name in sorted(names)]

    def _files(self, host: str, port: int) -> list[str]:
        names = [f"{host}:{port}"] + ([host] if port == HTTPS else [])
        for directory in self._directories:
            for name in names:
                path = os.path.join(directory, name)
                try:
                    return [os.path.join(path, file) for file in sorted(os.listdir(path))]
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    raise precondition(f"cannot read {path}: {error.strerror}") from None
        return []


def _split_port(name: str) -> tuple[str, int]:
    host, colon, port = name.rpartition(":")
    return (host, int(port)) if colon and port.isdecimal() else (name, HTTPS)


def _stamp(files: Sequence[str]) -> Stamp:
    found = []
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            continue  # loading it tells
        found.append((path, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _make(files: Sequence[str], *, insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for path in files:
        stem, suffix = os.path.splitext(path)
        if suffix == ".crt":
            _load_authority(context, path)
        elif suffix == ".cert":
            _load_pair(context, path, f"{stem}.key", files)
        elif suffix == ".key" and f"{stem}.cert" not in files:
            raise precondition(f"the key {path} has no certificate {stem}.cert")
    return context


def _load_authority(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except PermissionError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path) from None
    except OSError as error:  # ssl.SSLError is one
        raise _unusable(path, error) from None


def _load_pair(context: ssl.SSLContext, certificate: str, key: str, files: Sequence[str]) -> None:
    if key not in files:
        raise precondition(f"the certificate {certificate} has no key {key}")
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # never ask a terminal
    except PermissionError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), key) from None
    except (OSError, ValueError) as error:
        raise _unusable(f"{certificate} or {key}", error) from None


def _unusable(path: str, error: Exception) -> RemoteError:
    why = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    return precondition(f"cannot use {path}: {why or error}")
