"""Runs in: pytest (a short run; HYPOTHESIS_PROFILE=fuzz makes it long). Every codec of the stream worker gets
anything: it answers with events or its own error, and keeps no more than its limit."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from ipc.streams import spdy, websocket
from ipc.streams.headers import BadHeaders, Compressor, Decompressor
from tests.support.stream_clients import Headers, control, data_frame, head
from workers.stream import upgrade
from workers.stream.remotecommand import BadSize, Sizes

STEPS = st.integers(1, 200)


@st.composite
def spdy_bytes(draw: st.DrawFn) -> bytes:
    headers, out = Headers(), b""
    for _ in range(draw(st.integers(0, 8))):
        match draw(st.integers(0, 3)):
            case 0:
                out += headers.syn_stream(draw(st.integers(0, 9)), {"streamtype": draw(st.text(max_size=5))})
            case 1:
                out += data_frame(
                    draw(st.integers(0, 9)), draw(st.binary(max_size=50)), fin=draw(st.booleans())
                )
            case 2:
                out += control(
                    draw(st.integers(0, 11)), draw(st.binary(max_size=20)), draw(st.integers(0, 255))
                )
            case _:
                out += draw(st.binary(max_size=10))
    return out


@given(spdy_bytes(), STEPS)
def test_spdy_takes_anything(data: bytes, step: int) -> None:
    connection = spdy.Connection(max_streams=4)
    with contextlib.suppress(spdy.ProtocolError):
        for at in range(0, len(data), step):
            for event in connection.receive(data[at : at + step]):
                if isinstance(event, spdy.Opened):
                    connection.accept(event.stream)
                    connection.send(event.stream, b"x")
            assert len(connection.streams) <= 4
    connection.close()
    assert connection.output()


@given(st.lists(st.binary(max_size=80), max_size=4), st.booleans())
def test_header_blocks_take_anything(blocks: list[bytes], primed: bool) -> None:
    here = Decompressor()
    if primed:
        here.headers(Compressor().block({}))
    with contextlib.suppress(BadHeaders):
        for block in blocks:
            here.headers(block)


@given(
    st.sampled_from(["", "v4.channel.k8s.io", "v5.channel.k8s.io", "base64.channel.k8s.io"]),
    st.lists(st.tuples(st.integers(0, 255), st.integers(0, 125), st.binary(max_size=150)), max_size=5),
    STEPS,
)
def test_websocket_takes_anything(protocol: str, frames: list[tuple[int, int, bytes]], step: int) -> None:
    data = b"".join(bytes([first, 0x80 | length]) + rest for first, length, rest in frames)
    connection = websocket.Connection(protocol)
    with contextlib.suppress(websocket.ProtocolError):
        for at in range(0, len(data), step):
            connection.receive(data[at : at + step])
            connection.send(1, b"x")
    connection.close()


@given(st.lists(st.binary(max_size=60)), st.booleans(), STEPS)
def test_upgrades_take_anything(parts: list[bytes], framed: bool, step: int) -> None:
    data = b"\r\n".join(parts) + b"\r\n\r\n"
    if framed:
        data = head("/exec/t").removesuffix(b"\r\n") + data
    request = upgrade.Upgrade()
    with contextlib.suppress(upgrade.Refused):
        for at in range(0, len(data), step):
            asked = request.receive(data[at : at + step])
            if asked is not None:
                request.switch(upgrade.negotiate(asked))
                return


@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b'{"Width":1,"Height":2}', b"{", b"}"]))))
def test_sizes_take_anything(pieces: list[bytes]) -> None:
    sizes = Sizes()
    with contextlib.suppress(BadSize):
        for piece in pieces:
            for width, height in sizes.receive(piece):
                assert 0 < width < 1 << 16
                assert 0 < height < 1 << 16
