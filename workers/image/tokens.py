"""Runs in: image. Sans-IO but for the clock.

Bearer tokens: what a registry's challenge asks for (RFC 9110, "WWW-Authenticate"; the distribution project's
token specification), what the token server answered, and the tokens that are still good. Tokens live in
memory only and are kept by endpoint, repository and credentials, so that nobody gets another's.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

import msgspec

from workers.image.credentials import Credentials

CLIENT_ID = "bulkhead"
#: The token specification: at least a minute, and that if nothing is said.
SHORTEST_LIFE = 60.0
LONGEST_LIFE = 3600.0
_MARGIN = 10.0
MAX_TOKENS = 1000

_PARAMETER = re.compile(r'\s*([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*(?:,|$)')
_SCHEME = re.compile(r"\s*,?\s*([A-Za-z][A-Za-z0-9-]*)(?:\s+|$|(?=,))")


@dataclass(frozen=True)
class Challenge:
    """One scheme of a WWW-Authenticate header, in lower case, with its parameters."""

    scheme: str
    parameters: tuple[tuple[str, str], ...] = ()

    def get(self, name: str) -> str:
        return dict(self.parameters).get(name, "")


def challenges(headers: Sequence[str]) -> list[Challenge]:
    """All challenges of all WWW-Authenticate headers; what cannot be read ends its header."""
    return [challenge for header in headers for challenge in _challenges(header)]


def _challenges(header: str) -> list[Challenge]:
    found: list[Challenge] = []
    position = 0
    while match := _SCHEME.match(header, position):
        position = match.end()
        parameters: list[tuple[str, str]] = []
        while part := _PARAMETER.match(header, position):
            value = part[3] if part[2] is None else re.sub(r"\\(.)", r"\1", part[2])
            parameters.append((part[1].lower(), value))
            position = part.end()
        found.append(Challenge(match[1].lower(), tuple(parameters)))
    return found


@dataclass(frozen=True)
class TokenRequest:
    """What to send to a token server: GET with a query, or POST with a form."""

    method: str
    query: str
    authorization: str
    form: str


def token_request(challenge: Challenge, repository: str, credentials: Credentials | None) -> TokenRequest:
    """The request that a Bearer challenge asks for. An identity token is traded by POST (OAuth2)."""
    scope = challenge.get("scope") or f"repository:{repository}:pull"
    fields = {"service": challenge.get("service"), "scope": scope}
    fields = {name: value for name, value in fields.items() if value}
    if credentials is not None and credentials.identity_token:
        form = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token} | fields
        return TokenRequest("POST", "", "", urlencode(form | {"client_id": CLIENT_ID}))
    if credentials is not None and credentials.username:
        query = urlencode(fields | {"account": credentials.username})
        return TokenRequest("GET", query, credentials.basic, "")
    return TokenRequest("GET", urlencode(fields), "", "")


class TokenAnswer(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


@dataclass(frozen=True)
class Authorization:
    """The value of an Authorization header, and when (monotonic) to stop using it."""

    header: str
    expires: float


def read_token(body: bytes) -> Authorization | None:
    """What a token server answered, None if there is no token in it."""
    try:
        answer = msgspec.json.decode(body, type=TokenAnswer)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    token = answer.token or answer.access_token
    if not token or not token.isascii() or not token.isprintable():
        return None
    life = min(LONGEST_LIFE, max(SHORTEST_LIFE, answer.expires_in or 0.0))
    return Authorization(f"Bearer {token}", time.monotonic() + life - _MARGIN)


@dataclass(frozen=True)
class TokenKey:
    """For whom and where an authorization is good."""

    origin: str
    repository: str
    credentials: Credentials | None


class TokenCache:
    """Authorizations that are still good. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[TokenKey, Authorization] = {}

    def get(self, key: TokenKey) -> str:
        """The header's value, "" if there is none or its time is over."""
        with self._lock:
            found = self._known.get(key)
            if found is not None and found.expires <= time.monotonic():
                del self._known[key]
                found = None
            return found.header if found else ""

    def put(self, key: TokenKey, authorization: Authorization) -> None:
        with self._lock:
            self._known.pop(key, None)
            while len(self._known) >= MAX_TOKENS:
                del self._known[next(iter(self._known))]
            self._known[key] = authorization

    def forget(self, key: TokenKey) -> None:
        with self._lock:
            self._known.pop(key, None)
