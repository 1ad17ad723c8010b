"""Runs in: bulkheadctl, when something is streamed.

The connection to a streaming URL: TCP or TLS, the upgrade to SPDY/3.1 or WebSocket, and from then on bytes
that never block the caller. What the server refuses is a sentence.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from wsproto.connection import Connection as Frames
from wsproto.connection import ConnectionType
from wsproto.events import AcceptConnection, RejectConnection, RejectData, Request
from wsproto.handshake import H11Handshake
from wsproto.utilities import RemoteProtocolError

from supervisor.cli.ctl.connection import UNREACHABLE, CtlError

PIECE = 64 * 1024
PIECES = 16  # that are read at a time
HEAD_LIMIT = 64 * 1024
ENOUGH = 256 * 1024  # bytes that wait for the server before more are asked for
_WAIT = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass(frozen=True)
class Trust:
    """Files for TLS: the server's authority, our certificate and its key."""

    authority: str = ""
    certificate: str = ""
    key: str = ""

    def context(self) -> ssl.SSLContext:
        """What a connection is made with. Raises CtlError."""
        try:
            context = ssl.create_default_context(cafile=self.authority or None)
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key or None)
        except OSError as error:
            raise CtlError(f"certificates cannot be used: {error}") from error
        return context


class Link:
    """A connection. What is sent and does not fit waits here."""

    def __init__(self, url: str, trust: Trust, timeout: float) -> None:
        parts = urlsplit(url)
        self.path = parts.path
        self.host = parts.netloc
        self.ended = False
        self._out = bytearray()
        self._early = b""
        address = (parts.hostname or "", parts.port or 0)
        try:
            self._sock = socket.create_connection(address, timeout=timeout)
            if parts.scheme == "https":
                self._sock = trust.context().wrap_socket(self._sock, server_hostname=parts.hostname)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise CtlError(f"cannot connect to {parts.scheme}://{self.host}: {error}", UNREACHABLE) from error

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._sock.close()

    # -- the upgrade ----------------------------------------------------------------------------------

    def spdy(self, protocol: str) -> None:
        """Upgrade to SPDY/3.1. Raises CtlError."""
        lines = [
            f"POST {self.path} HTTP/1.1",
            f"Host: {self.host}",
            "Connection: Upgrade",
            "Upgrade: SPDY/3.1",
            f"X-Stream-Protocol-Version: {protocol}",
        ]
        head, rest = self._asked("\r\n".join([*lines, "", ""]).encode())
        if head.split(b" ", 2)[1:2] != [b"101"]:
            raise _refused(head.split(b"\r\n", 1)[0].decode("latin-1"), rest)
        self._upgraded(rest)

    def _asked(self, request: bytes) -> tuple[bytes, bytes]:
        """Send a request; return the head of the answer and what came after it."""
        answer = b""
        with self._told():
            self._sock.sendall(request)
            while b"\r\n\r\n" not in answer and len(answer) < HEAD_LIMIT:
                answer += self._more()
        head, _, rest = answer.partition(b"\r\n\r\n")
        return head, rest

    def websocket(self, protocol: str) -> Frames:
        """Upgrade to WebSocket. Raises CtlError."""
        handshake = H11Handshake(ConnectionType.CLIENT)
        request = Request(host=self.host, target=self.path, subprotocols=[protocol])
        with self._told():
            self._sock.sendall(handshake.send(request))
            why = b""
            status = 0
            while True:
                handshake.receive_data(self._more())
                for event in handshake.events():
                    if isinstance(event, AcceptConnection) and handshake.connection is not None:
                        self._upgraded(b"")
                        return handshake.connection
                    if isinstance(event, RejectConnection):
                        status = event.status_code
                    if isinstance(event, RejectData):
                        why += bytes(event.data)
                    if isinstance(event, RejectData) and event.body_finished:
                        raise _refused(f"HTTP {status}", why)

    def _more(self) -> bytes:
        data = self._sock.recv(PIECE)
        if not data:
            raise CtlError(f"{self.host} ended the connection before it answered")
        return data

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RemoteProtocolError) as error:
            raise CtlError(f"{self.host} does not answer as it should: {error}") from error

    def _upgraded(self, early: bytes) -> None:
        self._early = early
        self._sock.setblocking(False)

    # -- bytes ----------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """True while enough waits for the server."""
        return len(self._out) >= ENOUGH

    @property
    def waiting(self) -> bool:
        """True while anything waits for the server."""
        return bool(self._out)

    def send(self, pieces: list[bytes]) -> None:
        """Send now or later."""
        for piece in pieces:
            self._out += piece
        self.flush()

    def flush(self) -> None:
        """Send what fits now."""
        try:
            while self._out and not self.ended:
                del self._out[: self._sock.send(self._out[:PIECE])]
        except _WAIT:
            pass
        except OSError:
            self.ended = True

    def receive(self) -> bytes:
        """What has come. `ended` is set at the end of it."""
        found, self._early = [self._early], b""
        try:
            for _ in range(PIECES):
                data = self._sock.recv(PIECE)
                if not data:
                    self.ended = True
                    break
                found.append(data)
        except _WAIT:
            pass
        except OSError:
            self.ended = True
        return b"".join(found)

    @property
    def pending(self) -> bool:
        """True if something has come that the descriptor does not show."""
        return bool(self._early) or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0)


def _refused(status: str, body: bytes) -> CtlError:
    words = body.decode("utf-8", "replace").strip()
    return CtlError(f"the server refuses: {words or status}")
