"""Runs in: image. Sans-IO.

What goes wrong between us and a registry, as one class: a RemoteError that also knows whether trying again
may help. Texts name hosts and references, never a query string (signed URLs) or a credential.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from ipc.errors import Code, RemoteError

REGISTRY_UNAVAILABLE = "RegistryUnavailable"  # the word that kubelets know
#: Longer than this we do not wait for a registry that says when to come again.
PATIENCE = 60.0
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 15.0


class Failure(RemoteError):
    """A registry (or a blob store, or a token server) did not do what it was asked.

    `transient`: trying again may help. `retries`: how often at most, None for what is configured.
    `retry_after`: seconds that the peer asked for. `answered`: it spoke HTTP to us.
    """

    def __init__(
        self,
        code: Code,
        text: str,
        *,
        transient: bool = False,
        retries: int | None = None,
        retry_after: float | None = None,
        answered: bool = True,
    ) -> None:
        super().__init__(code, text, reason=REGISTRY_UNAVAILABLE if code is Code.UNAVAILABLE else "")
        self.transient = transient and (retry_after is None or retry_after <= PATIENCE)
        self.retries = retries
        self.retry_after = retry_after
        self.answered = answered

    def delay(self, attempt: int) -> float:
        """Seconds to wait before attempt `attempt` (1 is the first repetition)."""
        backoff = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** (attempt - 1)) * random.uniform(0.75, 1.25)  # noqa: S311 - jitter, not a secret
        return max(backoff, self.retry_after or 0.0)


def unreachable(host: str, why: str, *, transient: bool = True, retries: int | None = None) -> Failure:
    """No HTTP came back at all."""
    return Failure(Code.UNAVAILABLE, f"{host}: {why}", transient=transient, retries=retries, answered=False)


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    """distribution-spec, "Error Codes"."""

    errors: list[_Error] = []


def said(body: bytes) -> str:
    """What a registry's error body says, cleaned for a log line; "" if it says nothing we can read."""
    try:
        errors = msgspec.json.decode(body, type=_Errors).errors
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return ""
    texts = [": ".join(part for part in (e.code, e.message) if part) for e in errors[:3]]
    return "".join(c for c in "; ".join(texts) if c.isprintable())[:300]


_STATUS_CODES = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    408: Code.UNAVAILABLE,
    410: Code.NOT_FOUND,
    429: Code.RESOURCE_EXHAUSTED,
}
_STATUS_WORDS = {
    401: "it wants other credentials (or there is no such repository)",
    403: "access is denied",
    404: "not found",
    410: "not found",
    429: "too many requests",
}


def refused(host: str, status: int, body: bytes, retry_after: str) -> Failure:
    """The failure that an HTTP status other than success means."""
    words = [_STATUS_WORDS.get(status, "it cannot serve the request"), f"HTTP {status}", said(body)]
    return Failure(
        _STATUS_CODES.get(status, Code.UNAVAILABLE),
        f"{host}: " + ", ".join(word for word in words if word),
        transient=status >= 500 or status in {408, 429},
        retry_after=_seconds(retry_after),
    )


def _seconds(retry_after: str) -> float | None:
    """Retry-After in seconds; a date is not worth a calendar here: the usual back-off serves."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None


def combine(what: str, failures: Sequence[RemoteError]) -> RemoteError:
    """One error for all places that were tried; the last one, the registry itself, gives the code."""
    last = failures[-1]
    text = f"{what}: " + "; ".join(failure.text for failure in failures)
    return RemoteError(last.code, text, reason=last.reason)
