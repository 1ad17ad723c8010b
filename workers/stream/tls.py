"""Runs in: stream.

The TLS side of the listener: certificates are read again when their files change, for the next connection.
"""

from __future__ import annotations

import os
import ssl

from ipc.log import Log
from ipc.settings import StreamSettings

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class Certificates:
    """Makes the context for a connection; None without TLS."""

    def __init__(self, settings: StreamSettings, log: Log) -> None:
        self._settings = settings
        self._log = log
        self._seen: list[tuple[int, int, int]] | None = None
        self._context: ssl.SSLContext | None = None
        self._trouble = ""

    def context(self) -> ssl.SSLContext | None:
        """The context of now. Raises OSError (also ssl.SSLError) if there never was one that can be read."""
        if not self._settings.tls_cert:
            return None
        try:
            seen = [_identity(path) for path in self._paths()]
            if seen != self._seen:
                self._context, self._seen = self._load(), seen
            self._trouble = ""
        except OSError as error:  # half replaced, or out of the sandbox's sight: the old ones still hold
            if self._context is None:
                raise
            self._warn(str(error))
        return self._context

    def _warn(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            self._log.warning("certificates not read again", why=trouble)

    def _paths(self) -> list[str]:
        settings = self._settings
        return [path for path in (settings.tls_cert, settings.tls_key, settings.tls_client_ca) if path]

    def _load(self) -> ssl.SSLContext:
        settings = self._settings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = VERSIONS[settings.tls_min_version]
        if settings.tls_ciphers:
            context.set_ciphers(":".join(settings.tls_ciphers))
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
        if settings.tls_client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(settings.tls_client_ca)
        return context


def _identity(path: str) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
