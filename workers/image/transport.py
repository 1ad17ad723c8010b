"""Runs in: image.

HTTP as a registry client needs it: TLS by host, proxies, redirects followed by hand. It owns one
operation's connections and ends them with it. It refuses redirects from HTTPS to HTTP, redirects to
anything but HTTP, more than MAX_REDIRECTS of them, and bodies that come too slowly to count as coming.
Authorization never follows a redirect to another origin; client certificates belong to one host's TLS
context. What a URL has after its path is never shown: signed URLs carry secrets there.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urljoin

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationValueError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.response import BaseHTTPResponse
from urllib3.util import Timeout, Url, make_headers, parse_url

from ipc.errors import Code, RemoteError
from ipc.settings import ImageSettings
from workers.image.certificates import Certificates
from workers.image.failures import Failure, unreachable
from workers.image.operation import Operation
from workers.image.proxies import Proxies

USER_AGENT = "bulkhead"
MAX_REDIRECTS = 10
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_DISCARD = 64 * 1024
CHUNK = 256 * 1024
#: A body must bring this much in each window of waiting for it, else it has stalled.
STALL_BYTES = 16 * 1024
STALL_WINDOWS = 2.0  # read timeouts
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Origin:
    """Scheme, host and port: what credentials are bound to."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"


def origin_of(url: str) -> Origin:
    """Parse a URL with the parser that connects by it. Raises Failure if it is none of HTTP."""
    try:
        parts: Url = parse_url(url)
    except LocationValueError:
        raise Failure(Code.UNAVAILABLE, "the URL is malformed") from None
    if parts.scheme not in _PORTS or not parts.host:
        raise Failure(Code.UNAVAILABLE, f"the URL is not of HTTP but {str(parts.scheme)[:20]!r}")
    if parts.auth is not None:
        raise Failure(Code.UNAVAILABLE, f"{parts.host}: the URL has a user name in it")
    return Origin(parts.scheme, parts.host, parts.port or _PORTS[parts.scheme])


class StallGuard:
    """Tells a body that comes slowly from one that stalls. Only time spent waiting for it counts."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._waited = 0.0
        self._got = 0

    def count(self, size: int, waited: float) -> bool:
        """Take note of one read; False if it has stalled."""
        self._waited += waited
        self._got += size
        if self._got >= STALL_BYTES:
            self._waited, self._got = 0.0, 0
        return self._waited < self._window


class Answer:
    """One HTTP answer with its body to come. Close it.

    `host` is whom it came from, for people; `foreign` says that a redirect left the origin that was asked.
    """

    def __init__(
        self, raw: BaseHTTPResponse, host: str, operation: Operation, window: float, *, foreign: bool
    ) -> None:
        self.status = raw.status
        self.host = host
        self.foreign = foreign
        self._raw = raw
        self._operation = operation
        self._guard = StallGuard(window)

    def header(self, name: str) -> str:
        return self._raw.headers.get(name, "")

    def headers(self, name: str) -> list[str]:
        return self._raw.headers.getlist(name)

    def read(self, amount: int = CHUNK) -> bytes:
        """What has come of the body, at most `amount` bytes; b"" at its end. Raises Failure."""
        before = time.monotonic()
        try:
            data = self._raw.read1(amount, decode_content=False) or b""
        except (HTTPError, OSError, ValueError) as error:
            self._operation.check()
            raise _failure(error, self.host) from None
        if not self._guard.count(len(data), time.monotonic() - before):
            raise unreachable(self.host, "the transfer has stalled")
        return data

    def read_all(self, limit: int, what: str) -> bytes:
        """The whole body. Raises Failure: INVALID_ARGUMENT if it is larger than `limit` bytes."""
        pieces, size = [], 0
        while data := self.read(limit - size + 1):
            self._operation.check()
            pieces.append(data)
            size += len(data)
            if size > limit:
                raise Failure(
                    Code.INVALID_ARGUMENT, f"{self.host}: {what} is larger than the limit of {limit} bytes"
                )
        return b"".join(pieces)

    def discard(self) -> None:
        """Read a short rest, so that the connection can be used again, and close."""
        _discard(self._raw)

    def close(self) -> None:
        """Give the connection back if the body was read, else end it."""
        self._raw.close()


class Transport:
    """One operation's connections."""

    def __init__(
        self, operation: Operation, settings: ImageSettings, certificates: Certificates, proxies: Proxies
    ) -> None:
        self.operation = operation
        self._settings = settings
        self._certificates = certificates
        self._proxies = proxies
        self._managers: dict[tuple[Origin, bool], urllib3.PoolManager] = {}
        self._pool_classes = _pool_classes(operation)

    def get(self, url: str, headers: dict[str, str], *, insecure: bool = False) -> Answer:
        """GET, redirects followed. Raises Failure, Cancelled."""
        asked = origin = origin_of(url)
        foreign = False
        for _ in range(MAX_REDIRECTS + 1):
            raw = self._get_once(url, origin, headers, insecure=insecure, redirected=origin != asked)
            location = raw.headers.get("location") if raw.status in REDIRECTS else None
            if location is None:
                return self._answer(raw, origin, foreign=foreign)
            _discard(raw)
            url, origin = _redirected(origin, url, location, insecure=insecure)
            if origin != asked and not foreign:
                # For good: a way back over another origin is not ours any more.
                foreign = True
                headers = {name: value for name, value in headers.items() if name != "Authorization"}
        raise Failure(Code.UNAVAILABLE, f"{asked}: more than {MAX_REDIRECTS} redirects")

    def _get_once(
        self, url: str, origin: Origin, headers: dict[str, str], *, insecure: bool, redirected: bool
    ) -> BaseHTTPResponse:
        try:
            return self._send("GET", url, origin, headers, insecure=insecure)
        except Failure as failure:
            failure.answered = failure.answered or redirected
            raise

    def post(self, url: str, headers: dict[str, str], body: str, *, insecure: bool = False) -> Answer:
        """POST a form; a redirect is not followed, for the form has a secret. Raises Failure, Cancelled."""
        origin = origin_of(url)
        headers = headers | {"Content-Type": "application/x-www-form-urlencoded"}
        return self._answer(
            self._send("POST", url, origin, headers, body=body, insecure=insecure), origin, foreign=False
        )

    def close(self) -> None:
        """End all connections."""
        for manager in self._managers.values():
            manager.clear()

    def _answer(self, raw: BaseHTTPResponse, origin: Origin, *, foreign: bool) -> Answer:
        window = self._settings.read_timeout * STALL_WINDOWS
        return Answer(raw, str(origin), self.operation, window, foreign=foreign)

    def _send(
        self,
        method: str,
        url: str,
        origin: Origin,
        headers: dict[str, str],
        *,
        insecure: bool,
        body: str | None = None,
    ) -> BaseHTTPResponse:
        self.operation.check()
        try:
            return self._manager(origin, insecure=insecure).urlopen(
                method,
                url,
                redirect=False,
                retries=False,
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"} | headers,
                body=body,
                preload_content=False,
                decode_content=False,
            )
        except (HTTPError, OSError) as error:
            self.operation.check()
            raise _failure(error, str(origin)) from None

    def _manager(self, origin: Origin, *, insecure: bool) -> urllib3.PoolManager:
        key = (origin, insecure)
        if key not in self._managers:
            manager = self._make_manager(origin, insecure=insecure)
            manager.pool_classes_by_scheme = self._pool_classes
            self._managers[key] = manager
        return self._managers[key]

    def _make_manager(self, origin: Origin, *, insecure: bool) -> urllib3.PoolManager:
        timeout = Timeout(connect=self._settings.connect_timeout, read=self._settings.read_timeout)
        options: dict[str, Any] = {"timeout": timeout, "maxsize": 1}
        if origin.scheme == "https":
            options["ssl_context"] = self._certificates.context(origin.host, origin.port, insecure=insecure)
        proxy = self._proxies.proxy_for(origin.scheme, origin.host, origin.port)
        if not proxy:
            return urllib3.PoolManager(**options)
        return urllib3.ProxyManager(proxy, proxy_headers=_proxy_headers(proxy), **options)


def _discard(raw: BaseHTTPResponse) -> None:
    with contextlib.suppress(HTTPError, OSError):
        left = MAX_DISCARD
        while left > 0 and (data := raw.read1(left, decode_content=False)):
            left -= len(data)
    raw.close()


def _proxy_headers(proxy: str) -> dict[str, str]:
    login = parse_url(proxy).auth
    return dict(make_headers(proxy_basic_auth=unquote(login))) if login else {}


def _pool_classes(operation: Operation) -> dict[str, Any]:
    """urllib3's pools with connections that the operation can shut."""

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            operation.adopt(self.sock)

    class Tls(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            operation.adopt(self.sock)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    return {"http": PlainPool, "https": TlsPool}


def _redirected(origin: Origin, url: str, location: str, *, insecure: bool) -> tuple[str, Origin]:
    """Where a redirect leads. Raises Failure if it may not be followed."""
    try:
        url = urljoin(url, location)
        target = origin_of(url)
    except ValueError:
        raise Failure(Code.UNAVAILABLE, f"{origin} redirects, but the URL is malformed") from None
    except Failure as failure:
        raise Failure(failure.code, f"{origin} redirects, but {failure.text}") from None
    if origin.scheme == "https" and target.scheme == "http" and not insecure:
        raise Failure(Code.UNAVAILABLE, f"{origin} redirects to plain HTTP at {target}, which is refused")
    return url, target


#: What urllib3 raised -> sentence, whether trying again may help, how often at most. The first that fits.
_KINDS: tuple[tuple[type[HTTPError], str, bool, int | None], ...] = (
    (ProxyError, "the proxy failed: {}", True, None),
    (NameResolutionError, "cannot resolve the name: {}", True, 1),
    (NewConnectionError, "cannot connect: {}", True, 1),
    (ConnectTimeoutError, "no connection in time", True, 1),
    (ReadTimeoutError, "no answer in time", True, None),
    (SSLError, "TLS failed: {}", False, None),
    (ProtocolError, "the connection broke: {}", True, None),
)


def _failure(error: Exception, host: str) -> Failure:
    """A sentence for what urllib3 raised."""
    for kind, sentence, transient, retries in _KINDS:
        if isinstance(error, kind):
            text = sentence.format(_cause(error))
            return unreachable(host, text, transient=transient, retries=retries)
    return unreachable(host, f"cannot be asked: {_cause(error)}", transient=False)


def _cause(error: BaseException) -> str:
    """The innermost reason in few words; urllib3's own texts show objects and URLs."""
    seen = {id(error)}
    while (inner := _inner(error)) is not None and id(inner) not in seen:
        seen.add(id(inner))
        error = inner
    if isinstance(error, RemoteError):
        return error.text
    reason = getattr(error, "verify_message", "") or getattr(error, "reason", "")
    if isinstance(reason, str) and reason:
        return reason.replace("_", " ").lower() if reason.isupper() else reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__ if isinstance(error, HTTPError) else str(error)[:200] or type(error).__name__


def _inner(error: BaseException) -> BaseException | None:
    original = getattr(error, "original_error", None)
    if isinstance(original, BaseException):
        return original
    nested = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
    return nested or error.__cause__ or error.__context__
