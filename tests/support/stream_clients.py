"""Runs in: the tests.

Raw clients of the stream worker: SPDY/3.1 and WebSocket over a plain or TLS socket, written from the
specifications and not from the worker's own codecs.
"""

from __future__ import annotations

import base64
import os
import socket
import struct
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

DICTIONARY = (Path(__file__).parents[2] / "ipc" / "streams" / "spdy3_dictionary.bin").read_bytes()
SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 9


def control(type_: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack(">HHI", 0x8003, type_, flags << 24 | len(payload)) + payload


def data_frame(stream: int, data: bytes, *, fin: bool = False) -> bytes:
    return struct.pack(">II", stream, fin << 24 | len(data)) + data


class Headers:
    """The client's half of the header compression."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 8, 0, DICTIONARY)

    def block(self, headers: dict[str, str]) -> bytes:
        raw = struct.pack(">I", len(headers))
        for pair in headers.items():
            raw += b"".join(struct.pack(">I", len(text)) + text.encode() for text in pair)
        return self._deflate.compress(raw) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def syn_stream(self, stream: int, headers: dict[str, str], *, fin: bool = False) -> bytes:
        return control(SYN_STREAM, struct.pack(">IIBB", stream, 0, 0, 0) + self.block(headers), int(fin))


def head(path: str, *fields: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: node", *fields, "", ""]).encode()


def receive(sock: socket.socket | Tunnel, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def read_head(sock: socket.socket) -> tuple[int, dict[str, str]]:
    raw = b""
    while not raw.endswith(b"\r\n\r\n"):
        raw += receive(sock, 1)
    lines = raw.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:] if line)


@dataclass
class Spdy:
    """A SPDY client after its upgrade."""

    sock: socket.socket | Tunnel
    headers: Headers = field(default_factory=Headers)
    received: dict[int, bytes] = field(default_factory=lambda: defaultdict(bytes))
    ended: set[int] = field(default_factory=set)
    resets: dict[int, int] = field(default_factory=dict)
    replies: set[int] = field(default_factory=set)
    gone: bool = False
    names: dict[str, int] = field(default_factory=dict)

    @classmethod
    def connect(cls, sock: socket.socket, path: str, protocol: str = "v4.channel.k8s.io") -> Spdy:
        fields = ["Connection: Upgrade", "Upgrade: SPDY/3.1", f"X-Stream-Protocol-Version: {protocol}"]
        sock.sendall(head(path, *fields))
        status, answer = read_head(sock)
        assert status == 101, status
        assert answer["X-Stream-Protocol-Version"] == protocol.split(",", maxsplit=1)[0].strip()
        return cls(sock)

    @classmethod
    def tunnelled(cls, sock: socket.socket, path: str) -> Spdy:
        """A port-forward whose SPDY is in the messages of a WebSocket, each cut in two."""
        return cls(Tunnel(WebSocket.connect(sock, path, "SPDY/3.1+portforward.k8s.io")))

    def open(self, *names: str) -> None:
        for name in names:
            stream = 2 * len(self.names) + 1
            self.names[name] = stream
            self.sock.sendall(self.headers.syn_stream(stream, {"streamtype": name}))

    def send(self, name: str, data: bytes, *, fin: bool = False) -> None:
        self.sock.sendall(data_frame(self.names[name], data, fin=fin))

    def frame(self) -> None:
        first, second = struct.unpack(">II", receive(self.sock, 8))
        payload = receive(self.sock, second & 0xFFFFFF)
        if not first >> 31:
            self.received[first] += payload
            if second >> 24 & 1:
                self.ended.add(first)
        elif first & 0xFFFF == RST_STREAM:
            stream, status = struct.unpack(">II", payload)
            self.resets[stream] = status
        elif first & 0xFFFF == SYN_REPLY:
            self.replies.add(struct.unpack_from(">I", payload)[0])
        elif first & 0xFFFF == GOAWAY:
            self.gone = True

    def to_end(self) -> None:
        """Read until the server says goodbye."""
        while not self.gone:
            self.frame()

    def text(self, name: str) -> bytes:
        return self.received[self.names[name]]


@dataclass
class WebSocket:
    """A WebSocket client after its upgrade."""

    sock: socket.socket
    protocol: str
    channels: dict[int, bytes] = field(default_factory=lambda: defaultdict(bytes))
    ended: set[int] = field(default_factory=set)
    messages: list[bytes] = field(default_factory=list)
    closed: bool = False

    @classmethod
    def connect(cls, sock: socket.socket, path: str, protocol: str = "v4.channel.k8s.io") -> WebSocket:
        fields = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        fields.append("Sec-WebSocket-Key: " + base64.b64encode(os.urandom(16)).decode())
        if protocol:
            fields.append(f"Sec-WebSocket-Protocol: {protocol}")
        sock.sendall(head(path, *fields).replace(b"POST", b"GET"))
        status, answer = read_head(sock)
        assert status == 101, status
        assert answer.get("Sec-WebSocket-Protocol", "") == protocol
        return cls(sock, protocol)

    def message(self, opcode: int, payload: bytes) -> None:
        mask = os.urandom(4)
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack(">H", size)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self.sock.sendall(bytes([0x80 | opcode]) + length + mask + masked)

    def send(self, channel: int, data: bytes) -> None:
        if "base64" in self.protocol:
            self.message(1, f"{channel}".encode() + base64.b64encode(data))
        else:
            self.message(2, bytes([channel]) + data)

    def end(self, channel: int) -> None:
        self.message(2, bytes([0xFF, channel]))

    def frame(self) -> None:
        first, length = receive(self.sock, 2)
        if length == 126:
            length = struct.unpack(">H", receive(self.sock, 2))[0]
        elif length == 127:
            length = struct.unpack(">Q", receive(self.sock, 8))[0]
        payload = receive(self.sock, length)
        if first & 15 == 8:
            self.closed = True
            return
        self.messages.append(payload)
        if "SPDY" in self.protocol:
            return
        if "base64" in self.protocol:
            self.channels[payload[0] - 48] += base64.b64decode(payload[1:])
        elif payload[0] == 0xFF:
            self.ended.add(payload[1])
        else:
            self.channels[payload[0]] += payload[1:]

    def to_end(self) -> None:
        """Read until the server says goodbye."""
        while not self.closed:
            self.frame()


class Tunnel:
    """As much of a socket as Spdy needs, inside a WebSocket."""

    def __init__(self, outer: WebSocket) -> None:
        self._outer = outer
        self._rest = b""

    def sendall(self, data: bytes) -> None:
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._outer.message(2, piece)

    def recv(self, size: int) -> bytes:
        while not self._rest and not self._outer.closed:
            self._outer.frame()
            self._rest = b"".join(self._outer.messages)
            self._outer.messages.clear()
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece

    def close(self) -> None:
        self._outer.sock.close()

    def fileno(self) -> int:
        return self._outer.sock.fileno()
