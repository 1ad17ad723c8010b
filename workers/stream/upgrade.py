"""Runs in: stream. Sans-IO, over h11.

The HTTP/1.1 request that asks for an upgrade, and its negotiation: SPDY/3.1 or WebSocket (RFC 6455), and
which of the client's subprotocols. What is refused has its status here; what follows the request's head
belongs to the upgraded connection.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl

import h11
from wsproto.utilities import generate_accept_token

from ipc.streams.websocket import TUNNEL

HEAD_LIMIT = 16 * 1024  # bytes of request line and header fields together
STREAM_PROTOCOL = "x-stream-protocol-version"
ACCEPTED_PROTOCOLS = "X-Accepted-Stream-Protocol-Versions"
_TARGET = re.compile(r"/(exec|attach|portforward)/([A-Za-z0-9_-]{1,128})(?:\?([!-~]*))?\Z")

_PORT = re.compile(r"[1-9][0-9]{0,4}\Z", re.ASCII)

SPDY, WEBSOCKET = "spdy", "websocket"
_REMOTE_COMMAND_SPDY = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
_REMOTE_COMMAND_WEBSOCKET = (
    "",
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
)

#: (transport, kind of session) -> the subprotocols that are spoken; "" is none.
PROTOCOLS: dict[tuple[str, str], tuple[str, ...]] = {
    (SPDY, "exec"): _REMOTE_COMMAND_SPDY,
    (SPDY, "attach"): _REMOTE_COMMAND_SPDY,
    (SPDY, "portforward"): ("portforward.k8s.io",),
    (WEBSOCKET, "exec"): _REMOTE_COMMAND_WEBSOCKET,
    (WEBSOCKET, "attach"): _REMOTE_COMMAND_WEBSOCKET,
    (WEBSOCKET, "portforward"): ("", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", TUNNEL),
}

Fields = list[tuple[str, str]]


class Refused(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: HTTPStatus, text: str, fields: Fields | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.fields = fields or []


@dataclass(frozen=True)
class Asked:
    """A request: for which kind of session, with which token, and its header fields."""

    kind: str
    token: str = field(repr=False)
    query: str = field(repr=False)
    fields: Fields = field(repr=False)

    @property
    def ports(self) -> list[int]:
        """The ports of the query, for a port-forward over WebSocket."""
        texts = [text for name, value in parse_qsl(self.query) if name == "port" for text in value.split(",")]
        return [int(text) for text in texts if _PORT.match(text) and int(text) <= 0xFFFF]

    def values(self, name: str) -> list[str]:
        """The comma-separated values of a field, all its occurrences together."""
        joined = ",".join(value for key, value in self.fields if key == name)
        return [value for part in joined.split(",") if (value := part.strip())]


@dataclass(frozen=True)
class Agreed:
    """The outcome of a negotiation; `fields` are those of the 101 response."""

    transport: str
    protocol: str
    fields: Fields


class Upgrade:
    """Reads one request; `trailing` is what came after it."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
        self._request: Asked | None = None
        self._received = 0

    def receive(self, data: bytes) -> Asked | None:
        """The request as soon as it is whole. Raises Refused."""
        self._received += len(data)
        try:
            self._http.receive_data(data)
            event = self._http.next_event() if self._request is None else h11.NEED_DATA
        except h11.RemoteProtocolError as error:
            raise _unreadable(error) from None
        if self._received - len(self._http.trailing_data[0]) > HEAD_LIMIT:
            raise _too_large()
        if not isinstance(event, h11.Request):
            return None
        self._request = _asked(event)
        return self._request

    def switch(self, agreed: Agreed) -> tuple[bytes, bytes]:
        """The 101 response, and what the client has sent after its request."""
        self._http.next_event()  # the end of the request: it has no body
        response = h11.InformationalResponse(
            status_code=HTTPStatus.SWITCHING_PROTOCOLS,
            headers=list(agreed.fields),
            reason=b"Switching Protocols",
        )
        answer = self._http.send(response)
        return answer or b"", self._http.trailing_data[0]


def _too_large() -> Refused:
    return Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {HEAD_LIMIT} bytes of header")


def _unreadable(error: h11.RemoteProtocolError) -> Refused:
    if error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
        return _too_large()
    return Refused(HTTPStatus.BAD_REQUEST, f"this is no request: {error}")


def _asked(request: h11.Request) -> Asked:
    fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers]
    if request.method not in {b"GET", b"POST"}:
        raise Refused(
            HTTPStatus.METHOD_NOT_ALLOWED, "GET and POST are answered here", [("Allow", "GET, POST")]
        )
    for name, value in fields:
        if name == "transfer-encoding" or (name == "content-length" and value != "0"):
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a request has no body here")
    match = _TARGET.match(request.target.decode("latin-1"))
    if match is None:
        raise Refused(HTTPStatus.NOT_FOUND, "nothing is here")
    return Asked(match[1], match[2], match[3] or "", fields)


def negotiate(asked: Asked) -> Agreed:
    """What both sides speak. Raises Refused."""
    upgrades = [value.lower() for value in asked.values("upgrade")]
    if "websocket" in upgrades:
        return _websocket(asked)
    return _spdy(asked, upgrades)


def _spdy(asked: Asked, upgrades: list[str]) -> Agreed:
    wanted = asked.values(STREAM_PROTOCOL)
    known = PROTOCOLS[SPDY, asked.kind]
    if not wanted:
        raise Refused(
            HTTPStatus.BAD_REQUEST, "unable to upgrade: X-Stream-Protocol-Version header is required"
        )
    protocol = next((name for name in wanted if name in known), None)
    if protocol is None:
        raise Refused(
            HTTPStatus.FORBIDDEN,
            f"unable to upgrade: the client speaks {', '.join(wanted)}, the server {', '.join(known)}",
            [(ACCEPTED_PROTOCOLS, name) for name in known],
        )
    if "spdy/3.1" not in upgrades or not _wants_upgrade(asked):
        raise Refused(HTTPStatus.BAD_REQUEST, "unable to upgrade: missing upgrade headers in request")
    fields = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", protocol)]
    return Agreed(SPDY, protocol, fields)


def _wants_upgrade(asked: Asked) -> bool:
    return "upgrade" in (value.lower() for value in asked.values("connection"))


def _websocket(asked: Asked) -> Agreed:
    if not _wants_upgrade(asked):
        raise Refused(HTTPStatus.BAD_REQUEST, "unable to upgrade: missing upgrade headers in request")
    if asked.values("sec-websocket-version") != ["13"]:
        version = [("Sec-WebSocket-Version", "13")]
        raise Refused(HTTPStatus.UPGRADE_REQUIRED, "only version 13 of WebSocket is spoken here", version)
    wanted = asked.values("sec-websocket-protocol")
    known = PROTOCOLS[WEBSOCKET, asked.kind]
    protocol = next((name for name in wanted if name in known), None) if wanted else ""
    if protocol is None:
        raise Refused(HTTPStatus.FORBIDDEN, f"none of these subprotocols is spoken here: {', '.join(wanted)}")
    accept = generate_accept_token(_key(asked)).decode()
    fields = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", accept)]
    return Agreed(WEBSOCKET, protocol, fields + ([("Sec-WebSocket-Protocol", protocol)] if protocol else []))


def _key(asked: Asked) -> bytes:
    keys = asked.values("sec-websocket-key")
    try:
        if len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16:
            return keys[0].encode()
    except (binascii.Error, ValueError):
        pass  # refused just below
    raise Refused(HTTPStatus.BAD_REQUEST, "one Sec-WebSocket-Key of 16 bytes is needed")


def render(refused: Refused) -> bytes:
    """The response that says why; the connection ends with it."""
    body = f"{refused.text}\n".encode()
    lines = [
        f"HTTP/1.1 {refused.status.value} {refused.status.phrase}",
        *(f"{name}: {value}" for name, value in refused.fields),
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body
