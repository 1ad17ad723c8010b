"""Runs in: the tests.

A registry that misbehaves on demand, for faults only: what works is tested against a real one. It serves one
image; `on` queues what shall happen to the next requests for a path instead.
"""

from __future__ import annotations

import contextlib
import http.server
import re
import socket
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.support.registry import Certificate, Image

Handler = http.server.BaseHTTPRequestHandler
#: What happens to one request; `data` is what would have been sent.
Behaviour = Callable[[Handler, bytes], None]


@dataclass(frozen=True)
class Seen:
    """One request that came; the names of headers as Words-Like-This."""

    method: str
    path: str
    headers: Mapping[str, str]


class FaultRegistry:
    """Serves `image` as any repository and tag. A context manager."""

    def __init__(self, image: Image, *, tls: Certificate | None = None, ranges: bool = True) -> None:
        self.image = image
        self.ranges = ranges
        self.seen: list[Seen] = []
        self.released = threading.Event()  # ends behaviours that hang
        self._queues: dict[str, deque[Behaviour]] = defaultdict(deque)
        self._always: dict[str, Behaviour] = {}
        server = self

        class Requests(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(OSError):  # the client may be gone
                    server._serve(self)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None: ...

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(
                self, request: Any, client_address: Any
            ) -> None: ...  # TLS refused by the client

        self._http = Server(("127.0.0.1", 0), Requests)
        self._tls = tls is not None
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.certificate, tls.key)
            self._http.socket = context.wrap_socket(
                self._http.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._http.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.address}"

    def __enter__(self) -> FaultRegistry:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def on(self, ending: str, *behaviours: Behaviour) -> None:
        """Queue behaviours for requests whose path (without query) ends so."""
        self._queues[ending].extend(behaviours)

    def always(self, ending: str, behaviour: Behaviour) -> None:
        """A behaviour for every request whose path ends so."""
        self._always[ending] = behaviour

    def paths(self) -> list[str]:
        """The paths asked for so far."""
        return [seen.path for seen in self.seen]

    def _serve(self, handler: Handler) -> None:
        headers = {name.title(): value for name, value in handler.headers.items()}
        self.seen.append(Seen(handler.command, handler.path, headers))
        path = handler.path.partition("?")[0]
        data = self._data(path)
        for ending, queue in self._queues.items():
            if queue and path.endswith(ending):
                queue.popleft()(handler, data)
                return
        for ending, behaviour in self._always.items():
            if path.endswith(ending):
                behaviour(handler, data)
                return
        self.well(handler, data)

    def _data(self, path: str) -> bytes:
        name = path.rpartition("/")[2]
        blobs = dict(self.image.blobs)
        for image in (self.image, *self.image.children):
            blobs |= dict(image.blobs) | {image.digest: image.manifest}
        return blobs.get(name, self.image.manifest if "/manifests/" in path else b"")

    def well(self, handler: Handler, data: bytes) -> None:
        """Answer as one should, ranges included."""
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if not data:
            send(handler, 404, b"")
        elif wanted and self.ranges:
            start = int(wanted[1])
            content_range = f"bytes {start}-{len(data) - 1}/{len(data)}"
            send(handler, 206, data[start:], {"Content-Range": content_range})
        else:
            send(handler, 200, data)

    def silent(self, _handler: Handler, _data: bytes) -> None:
        """Never answer."""
        self.released.wait(30)

    def breaking(self, after: int) -> Behaviour:
        """Answer well, but break the connection `after` bytes of the whole blob's body part."""

        def behave(handler: Handler, data: bytes) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
            start = int(wanted[1]) if wanted and self.ranges else 0
            head(handler, 206 if start else 200, len(data) - start, _content_range(start, data))
            handler.wfile.write(data[start : start + after])
            _break(handler)

        return behave

    def hanging(self, after: int = 0) -> Behaviour:
        """Send `after` bytes, then nothing until the test is over."""

        def behave(handler: Handler, data: bytes) -> None:
            head(handler, 200, len(data))
            handler.wfile.write(data[:after])
            handler.wfile.flush()
            self.released.wait(30)

        return behave

    def dripping(self, interval: float) -> Behaviour:
        """Send one byte at a time."""

        def behave(handler: Handler, data: bytes) -> None:
            head(handler, 200, len(data))
            for byte in data:
                if self.released.wait(interval):
                    return
                handler.wfile.write(bytes([byte]))

        return behave


def _content_range(start: int, data: bytes) -> dict[str, str]:
    return {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}


def _break(handler: Handler) -> None:
    handler.wfile.flush()
    time.sleep(0.02)  # let the client read what came before
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def head(handler: Handler, status: int, length: int | None, headers: Mapping[str, str] | None = None) -> None:
    """Send an answer's head."""
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()


def send(handler: Handler, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """Send a whole answer."""
    head(handler, status, len(body), headers)
    handler.wfile.write(body)


def answering(status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Behaviour:
    """Answer with a status and headers of the test's choice."""
    return lambda handler, _data: send(handler, status, body, headers)


def saying(body: bytes, headers: Mapping[str, str] | None = None) -> Behaviour:
    """Answer 200 with another body."""
    return answering(200, headers, body)


def redirecting(url: str, status: int = 307) -> Behaviour:
    """Redirect; "{path}" in the URL is the path that was asked for."""
    return lambda handler, _data: send(
        handler, status, b"moved", {"Location": url.replace("{path}", handler.path)}
    )


def chunked(change: Callable[[bytes], bytes] = bytes) -> Behaviour:
    """Send a body (after `change`) without saying how long it is."""

    def behave(handler: Handler, data: bytes) -> None:
        head(handler, 200, None, {"Transfer-Encoding": "chunked"})
        body = change(data)
        for start in range(0, len(body), 1000):
            piece = body[start : start + 1000]
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    return behave
