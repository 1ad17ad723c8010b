"""Runs in: image.

Whom we trust and who we are, by host: the system's certificate authorities, and certs.d
(`<host[:port]>/*.crt` are authorities, `*.cert` with `*.key` client certificates;
containers-certs.d(5)). It owns the TLS contexts, made again when a directory changed. A client certificate
is in the context of its own host only, so that a redirect cannot show it to another.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Sequence

from ipc.errors import RemoteError, precondition

Stamp = tuple[tuple[str, int, int, int], ...]


class Certificates:
    """TLS contexts by host and port. Safe for threads."""

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = directories
        self._lock = threading.Lock()
        self._contexts: dict[tuple[str, int, bool], tuple[Stamp, ssl.SSLContext]] = {}

    def context(self, host: str, port: int, *, insecure: bool = False) -> ssl.SSLContext:
        """The context for a host. Raises RemoteError(FAILED_PRECONDITION) naming the file that is wrong."""
        files = self._files(host, port)
        key = (host, port, insecure)
        with self._lock:
            stamp, context = self._contexts.get(key, (None, None))
            if context is None or stamp != _stamp(files):
                context = _make(files, insecure=insecure)
                self._contexts[key] = (_stamp(files), context)
            return context

    def clear(self) -> None:
        """Forget all contexts."""
        with self._lock:
            self._contexts.clear()

    def _files(self, host: str, port: int) -> list[str]:
        names = [f"{host}:{port}"] + ([host] if port == 443 else [])
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
    except OSError as error:  # ssl.SSLError is one
        raise _unusable(path, error) from None


def _load_pair(context: ssl.SSLContext, certificate: str, key: str, files: Sequence[str]) -> None:
    if key not in files:
        raise precondition(f"the certificate {certificate} has no key {key}")
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # never ask a terminal
    except (OSError, ValueError) as error:
        raise _unusable(f"{certificate} or {key}", error) from None


def _unusable(path: str, error: Exception) -> RemoteError:
    why = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    return precondition(f"cannot use {path}: {why or error}")
