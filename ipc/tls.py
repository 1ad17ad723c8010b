"""Runs in: stream, ops.

The TLS side of a listener: certificates are read again when their files change, for the next connection.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ipc.log import Log

SETTLE = 1.0  # seconds in which files that were seen to change may change again
BLIND_AGE = 300.0  # after which files that cannot be seen count as changed
BARREN_AGE = 30.0  # after which a worker that could not read them makes room for another
Seen = list[tuple[int, int, int]]
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class Settings(Protocol):
    """What is configured: paths of PEM files, "" for none; "1.2" or "1.3"; OpenSSL's names, of TLS 1.2."""

    @property
    def tls_cert(self) -> str: ...
    @property
    def tls_key(self) -> str: ...
    @property
    def tls_client_ca(self) -> str: ...
    @property
    def tls_min_version(self) -> str: ...
    @property
    def tls_ciphers(self) -> Sequence[str]: ...


class Certificates:
    """Makes the context for a connection; None without TLS."""

    def __init__(self, settings: Settings, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._log = log
        self._clock = clock
        self._loaded: Seen | None = None  # what the context is made of
        self._other: Seen | None = None  # what is there instead, since when
        self._since = clock()
        self._context: ssl.SSLContext | None = None
        self._trouble = ""

    def context(self) -> ssl.SSLContext | None:
        """The context of now. Raises OSError (also ssl.SSLError) if there never was one that can be read."""
        if not self._settings.tls_cert:
            return None
        try:
            seen = self._see()
            if seen != self._loaded:
                self._context, self._loaded = self._load(), seen
            self._trouble = ""
        except OSError as error:  # half replaced, or out of the sandbox's sight: the old ones still hold
            if self._context is None:
                raise
            self._warn(str(error))
        return self._context

    def outdated(self) -> bool:
        """True when a worker that starts now, as root, would have newer certificates than this one.

        Files that are only just being replaced are given a moment. Where the files cannot be seen, the
        certificates count as old after a while; where there never were any that could be read, too.
        """
        if not self._settings.tls_cert:
            return False
        now = self._clock()
        if self._context is None:
            return now - self._since > BARREN_AGE
        try:
            seen = self._see()
        except OSError:
            return now - self._since > BLIND_AGE
        if seen == self._loaded:
            return False
        if seen != self._other:
            self._other, self._since = seen, now
        return now - self._since >= SETTLE and not self._readable()

    def _readable(self) -> bool:
        return all(os.access(path, os.R_OK) for path in self._paths())

    def _see(self) -> Seen:
        return [_identity(path) for path in self._paths()]

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
        context.options |= ssl.OP_NO_RENEGOTIATION
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
