"""Runs in: the tests. The strict reading of a request, and the writing of a response."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.ops import http1


def head(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def status_of(raw: bytes) -> int:
    try:
        http1.parse(raw)
    except http1.Refused as refused:
        return refused.status.value
    return 200


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        (["GET /metrics HTTP/1.1", "Host: localhost"], "/metrics"),
        (["GET /metrics?name[]=x HTTP/1.1", "host:\t a \t", "Accept: text/plain;q=0.5, */*"], "/metrics"),
        (["GET / HTTP/1.0"], "/"),
        (["GET /workers HTTP/1.1", "Host:", "Content-Length: 0"], "/workers"),
    ],
)
def test_a_request_that_is_exactly_right_is_understood(lines: list[str], path: str) -> None:
    assert http1.parse(head(*lines)) == path


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["POST /metrics HTTP/1.1", "Host: x"], 405),
        (["get /metrics HTTP/1.1", "Host: x"], 405),
        (["GET /metrics HTTP/2.0", "Host: x"], 505),
        (["GET /metrics HTTP/1.1"], 400),
        (["GET /metrics HTTP/1.1", "Host: x", "Host: y"], 400),
        (["GET  /metrics HTTP/1.1", "Host: x"], 400),
        (["GET /metrics", "Host: x"], 400),
        (["GET http://x/metrics HTTP/1.1", "Host: x"], 400),
        (["GET * HTTP/1.1", "Host: x"], 400),
        (["GET /m\u00e9trics HTTP/1.1", "Host: x"], 400),
        (["GET /metrics HTTP/1.1", "Host : x"], 400),
        (["GET /metrics HTTP/1.1", "Host: x", " folded: y"], 400),
        (["GET /metrics HTTP/1.1", "Host: x", "A: b\x00c"], 400),
        (["GET /metrics HTTP/1.1", "Host: x", "A: b\nB: c"], 400),
        (["GET /metrics HTTP/1.1", "Host: x", "no colon"], 400),
        (["GET /metrics HTTP/1.1", "Host: x", "Content-Length: 5"], 413),
        (["GET /metrics HTTP/1.1", "Host: x", "Transfer-Encoding: chunked"], 413),
    ],
)
def test_everything_else_is_refused_with_a_status(lines: list[str], status: int) -> None:
    assert status_of(head(*lines)) == status


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(raw: bytes) -> None:
    status_of(raw + http1.HEAD_END)


def test_a_response_says_how_long_it_is_and_that_it_is_the_last() -> None:
    raw = http1.render(http1.Response(b"hello", "text/plain"))
    start, _, body = raw.partition(http1.HEAD_END)
    assert start.split(b"\r\n")[0] == b"HTTP/1.1 200 OK"
    assert b"Content-Length: 5" in start
    assert b"Connection: close" in start
    assert body == b"hello"


def test_who_may_not_post_is_told_what_he_may() -> None:
    refused = http1.Refused(HTTPStatus.METHOD_NOT_ALLOWED, "no")
    assert b"\r\nAllow: GET\r\n" in http1.render(http1.refusal(refused))
