"""Runs in: ops. Sans-IO.

As much of HTTP/1.1 (RFC 9112) as a read-only endpoint needs: one GET request without a body, one response,
then the connection ends. What is not exactly that is refused, so that nothing has to be guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from http import HTTPStatus

HEAD_LIMIT = 8192  # bytes of request line and header fields together
HEAD_END = b"\r\n\r\n"

_REQUEST_LINE = re.compile(r"([A-Za-z]{1,32}) (\S{1,4096}) HTTP/([0-9])\.([0-9])\Z")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([ -~\t]*?)[ \t]*\Z")
_PATH = re.compile(r"/[!-~]*\Z")


class Refused(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True)
class Response:
    """What is answered."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


def parse(head: bytes) -> str:
    """The path, without a query, that the head of a request asks for. `head` ends with HEAD_END.

    Raises Refused.
    """
    try:
        lines = head[: -len(HEAD_END)].decode("ascii").split("\r\n")
    except UnicodeDecodeError:
        raise Refused(HTTPStatus.BAD_REQUEST, "the head of the request is not ASCII") from None
    path, minor = _request_line(lines[0])
    _check_fields([_field(line) for line in lines[1:]], host_required=minor > 0)
    return path


def _request_line(line: str) -> tuple[str, int]:
    match = _REQUEST_LINE.match(line)
    if match is None:
        raise Refused(HTTPStatus.BAD_REQUEST, "this is no request line")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "only HTTP/1.1 is spoken here")
    if method != "GET":
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is answered here")
    if not _PATH.match(target):
        raise Refused(HTTPStatus.BAD_REQUEST, "the target must be a path")
    return target.partition("?")[0], int(minor)


def _field(line: str) -> tuple[str, str]:
    match = _FIELD.match(line)
    if match is None:
        raise Refused(HTTPStatus.BAD_REQUEST, "this is no header field")
    return match[1].lower(), match[2]


def _check_fields(fields: list[tuple[str, str]], *, host_required: bool) -> None:
    hosts = sum(name == "host" for name, _ in fields)
    if hosts > 1 or (host_required and hosts == 0):
        raise Refused(HTTPStatus.BAD_REQUEST, "there must be one Host")
    for name, value in fields:
        if name == "transfer-encoding" or (name == "content-length" and value != "0"):
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a GET request has no body here")


def render(response: Response) -> bytes:
    """The bytes of a response."""
    status = response.status
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {response.content_type}",
        f"Content-Length: {len(response.body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET")
    return "\r\n".join(lines).encode() + HEAD_END + response.body


def refusal(refused: Refused) -> Response:
    """The response that says why."""
    return Response(f"{refused.text}\n".encode(), status=refused.status)
