"""Runs in: the tests. The sans-IO codecs of the stream worker."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.streams import spdy, websocket
from ipc.streams.headers import BLOCK_LIMIT, DICTIONARY, BadHeaders, Compressor, Decompressor
from tests.support.stream_clients import (
    PING,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Headers,
    control,
    data_frame,
    head,
)
from workers.stream import remotecommand, upgrade
from workers.stream.portforward import BadStream, Pairs
from workers.stream.remotecommand import BadSize, Outcome, Sizes, Wanted

FIELDS = ["Connection: Upgrade", "Upgrade: SPDY/3.1"]
V4 = "X-Stream-Protocol-Version: v4.channel.k8s.io"


def asked(raw: bytes) -> upgrade.Asked:
    found = upgrade.Upgrade().receive(raw)
    assert found is not None
    return found


def refusal(raw: bytes) -> upgrade.Refused:
    with pytest.raises(upgrade.Refused) as caught:
        upgrade.negotiate(asked(raw))
    return caught.value


# -- upgrade ----------------------------------------------------------------------------------------------


def test_spdy_takes_the_first_client_protocol_that_is_known() -> None:
    wanted = "X-Stream-Protocol-Version: v9.channel.k8s.io, v3.channel.k8s.io"
    request = asked(head("/exec/tok", *FIELDS, wanted, V4))
    agreed = upgrade.negotiate(request)
    assert (request.kind, request.token, agreed.transport, agreed.protocol) == (
        "exec", "tok", "spdy", "v3.channel.k8s.io",
    )  # fmt: skip


def test_refusals_have_the_statuses_that_clients_know() -> None:
    assert refusal(head("/exec/t", *FIELDS)).status == 400
    none = refusal(head("/exec/t", *FIELDS, "X-Stream-Protocol-Version: v9.channel.k8s.io"))
    assert none.status == 403
    rendered = upgrade.render(none).decode()
    assert rendered.count("X-Accepted-Stream-Protocol-Versions: ") == 4
    assert refusal(head("/exec/t", V4)).status == 400
    assert refusal(head("/nothing/t", *FIELDS, V4)).status == 404
    assert refusal(head("/exec/t/u", *FIELDS, V4)).status == 404
    assert refusal(head("/exec/t", *FIELDS, V4).replace(b"POST", b"PUT")).status == 405
    assert refusal(head("/exec/t", *FIELDS, V4, "Content-Length: 5")).status == 413
    assert refusal(head("/exec/t", *FIELDS, V4, "A: " + "x" * 20000)).status == 431
    assert refusal(b"\x16\x03\x01\r\n\r\n").status == 400


def test_a_head_without_a_line_end_is_bounded() -> None:
    request = upgrade.Upgrade()
    with pytest.raises(upgrade.Refused) as caught:
        for _ in range(100):
            request.receive(b"x" * 1000)
    assert caught.value.status in {400, 431}


def test_bytes_after_the_head_belong_to_the_upgraded_connection() -> None:
    request = upgrade.Upgrade()
    found = request.receive(head("/attach/t", *FIELDS, V4) + b"\x80\x03rest")
    assert found is not None
    answer, trailing = request.switch(upgrade.negotiate(found))
    assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\n" in answer
    assert trailing == b"\x80\x03rest"


def test_websocket_handshake_of_rfc_6455() -> None:
    fields = ["Connection: keep-alive, Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Version: 13"]
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    raw = head("/portforward/t?port=80,81&port=0&port=82", *fields, key)
    agreed = upgrade.negotiate(asked(raw))
    assert ("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") in agreed.fields
    assert agreed.protocol == ""
    assert asked(raw).ports == [80, 81, 82]
    assert refusal(head("/exec/t", *fields, key, "Sec-WebSocket-Protocol: no.such")).status == 403
    assert refusal(head("/exec/t", *fields)).status == 400
    v5 = head("/exec/t", *fields, key, "Sec-WebSocket-Protocol: x, v5.channel.k8s.io")
    assert upgrade.negotiate(asked(v5)).protocol == "v5.channel.k8s.io"


# -- header blocks ----------------------------------------------------------------------------------------


def test_the_dictionary_and_the_check_value_are_those_of_the_specification() -> None:
    digest = "51d27341373f923f3cd88e1eb7162aeaa3723d7585ff2399201dc06498407f02"
    assert hashlib.sha256(DICTIONARY).hexdigest() == digest
    assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2
    assert Compressor().block({}).hex() == "78f9e3c6a7c202a6230600000000ffff"


NAMES = st.text("abcdefgh-", min_size=1, max_size=20)
VALUES = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=200)


@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=8), max_size=6))
def test_blocks_of_one_connection_come_back(blocks: list[dict[str, str]]) -> None:
    there, here = Compressor(), Decompressor()
    assert [here.headers(there.block(headers)) for headers in blocks] == blocks


def test_a_block_that_inflates_without_end_is_refused() -> None:
    with pytest.raises(BadHeaders):
        Decompressor().headers(Compressor().block({"a": "x" * (BLOCK_LIMIT + 1)}))


# -- SPDY -------------------------------------------------------------------------------------------------


def conversation() -> bytes:
    headers = Headers()
    return b"".join(
        [
            control(SETTINGS, struct.pack(">III", 1, 7, 0xFFFFFFFF)),
            headers.syn_stream(1, {"streamtype": "error"}),
            headers.syn_stream(3, {"StreamType": "stdin"}),
            data_frame(3, b"hello" * 100),
            control(WINDOW_UPDATE, struct.pack(">II", 3, 0x80000000)),
            control(PING, struct.pack(">I", 1)),
            data_frame(99, b"nobody's"),
            data_frame(3, b"", fin=True),
            data_frame(3, b"after the end"),
            headers.syn_stream(5, {"streamtype": "stdout"}),
            control(RST_STREAM, struct.pack(">II", 5, 5)),
        ]
    )


def gathered(events: list[spdy.Event]) -> list[spdy.Event]:
    """Neighbouring pieces of data as one."""
    found: list[spdy.Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, spdy.Data) and isinstance(last, spdy.Data) and last.stream == event.stream:
            found[-1] = spdy.Data(event.stream, last.data + event.data)
        else:
            found.append(event)
    return found


@given(st.lists(st.integers(1, 60), max_size=40))
def test_any_chunking_gives_the_same_events(cuts: list[int]) -> None:
    raw, connection, events = conversation(), spdy.Connection(), list[spdy.Event]()
    for cut in [*cuts, len(raw)]:
        events += connection.receive(raw[:cut])
        raw = raw[cut:]
    assert gathered(events) == [
        spdy.Opened(1, {"streamtype": "error"}),
        spdy.Opened(3, {"streamtype": "stdin"}),
        spdy.Data(3, b"hello" * 100),
        spdy.Ended(3),
        spdy.Opened(5, {"streamtype": "stdout"}),
        spdy.WasReset(5, 5),
    ]
    assert connection.output() == [control(PING, struct.pack(">I", 1))]


def test_stream_ids_must_be_odd_and_rise() -> None:
    headers, connection = Headers(), spdy.Connection(max_streams=2)
    for stream in (3, 2, 3, 1, 5, 7):
        connection.receive(headers.syn_stream(stream, {}))
    resets = [struct.unpack(">II", out[8:]) for out in connection.output()]
    assert resets == [(2, 1), (3, 1), (1, 1), (7, 3)]
    assert connection.streams == [3, 5]


def test_both_halves_closed_frees_the_stream_and_close_resets_the_rest() -> None:
    headers, connection = Headers(), spdy.Connection()
    connection.receive(headers.syn_stream(1, {}, fin=True) + headers.syn_stream(3, {}))
    connection.accept(1)
    connection.send(1, b"x")
    connection.end(1)
    connection.send(1, b"too late")
    assert connection.streams == [3]
    assert connection.output()[1:] == [struct.pack(">II", 1, 1), b"x", data_frame(1, b"", fin=True)]
    connection.close()
    assert connection.output() == [
        control(RST_STREAM, struct.pack(">II", 3, 5)), control(7, struct.pack(">II", 3, 0)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">HHI", 0x8002, 1, 0),
        control(77, b""),
        control(1, b"short"),
        struct.pack(">HHI", 0x8003, 1, 0xFFFFFF),
        control(1, struct.pack(">IIBB", 1, 0, 0, 0) + b"no zlib"),
        control(RST_STREAM, b"x"),
    ],
)
def test_what_breaks_the_protocol_ends_the_connection(raw: bytes) -> None:
    with pytest.raises(spdy.ProtocolError):
        spdy.Connection().receive(raw)


# -- WebSocket --------------------------------------------------------------------------------------------


def frame(payload: bytes, opcode: int = 2, *, fin: bool = True) -> bytes:
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack(">H", size)
    return bytes([fin << 7 | opcode]) + length + bytes(4) + payload


@given(st.lists(st.integers(1, 30), max_size=20))
def test_channels_come_out_of_any_chunking(cuts: list[int]) -> None:
    raw = (
        frame(b"\x00one") + frame(b"") + frame(b"\x04{}", fin=False) + frame(b"rest", 0) + frame(b"\xff\x00")
    )
    connection, data, ended = websocket.Connection("v5.channel.k8s.io"), dict[int, bytes](), list[int]()
    for cut in [*cuts, len(raw)]:
        for event in connection.receive(raw[:cut]):
            if isinstance(event, websocket.Data):
                data[event.channel] = data.get(event.channel, b"") + event.data
            elif isinstance(event, websocket.Ended):
                ended.append(event.channel)
        raw = raw[cut:]
    assert data == {0: b"one", 4: b"{}rest"}
    assert ended == [0]


@given(st.binary(min_size=1, max_size=300), st.integers(1, 50))
def test_base64_channels_come_out_of_any_chunking(data: bytes, step: int) -> None:
    import base64

    connection, got = websocket.Connection("v4.base64.channel.k8s.io"), b""
    raw = frame(b"0" + base64.b64encode(data), 1)
    for at in range(0, len(raw), step):
        for event in connection.receive(raw[at : at + step]):
            assert isinstance(event, websocket.Data)
            got += event.data
    assert got == data
    connection.send(1, b"\x00\xff")
    assert connection.output()[0][2:] == b"1AP8="


def test_the_half_close_is_only_in_v5_and_bad_base64_ends_the_connection() -> None:
    assert websocket.Connection("v4.channel.k8s.io").receive(frame(b"\xff\x00")) == [
        websocket.Data(255, b"\x00")
    ]
    with pytest.raises(websocket.ProtocolError):
        websocket.Connection("base64.channel.k8s.io").receive(frame(b"0****", 1))
    with pytest.raises(websocket.ProtocolError):
        websocket.Connection("").receive(b"\xf2\x80" + bytes(4))


# -- remote command, port-forward -------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10), max_size=20))
def test_sizes_come_out_of_any_chunking(cuts: list[int]) -> None:
    raw = b'{"Width":80,"Height":24}\n{"Width":0,"Height":9} {"Width":132,"Height":43}'
    sizes, found = Sizes(), list[tuple[int, int]]()
    for cut in [*cuts, len(raw)]:
        found += sizes.receive(raw[:cut])
        raw = raw[cut:]
    assert found == [(80, 24), (132, 43)]


@pytest.mark.parametrize("raw", [b"[" * 5000, b'{"a":' * 3, b"x", b'{"Width":"y"}', b"{" + b" " * 2000])
def test_what_is_no_size_is_refused_early(raw: bytes) -> None:
    with pytest.raises(BadSize):
        Sizes().receive(raw)


def test_statuses_are_those_that_clients_parse() -> None:
    v4 = "v4.channel.k8s.io"
    assert remotecommand.status(Outcome(), v4) == b'{"status":"Success"}'
    failed = json.loads(remotecommand.status(Outcome(exit_code=137), "v5.channel.k8s.io"))
    assert failed["reason"] == "NonZeroExitCode"
    assert failed["details"] == {"causes": [{"reason": "ExitCode", "message": "137"}]}
    internal = json.loads(remotecommand.status(Outcome(error="error executing command"), v4))
    assert (internal["code"], internal["reason"]) == (500, "InternalError")
    assert remotecommand.status(Outcome(), "v2.channel.k8s.io") == b""
    assert b"non-zero exit code: 3" in remotecommand.status(Outcome(exit_code=3), "")


def test_resize_is_expected_from_v3_on_and_only_with_a_terminal() -> None:
    terminal = Wanted(stdin=True, stdout=True, tty=True)
    assert terminal.spdy_streams("v3.channel.k8s.io") == {"error", "stdin", "stdout", "resize"}
    assert terminal.spdy_streams("v2.channel.k8s.io") == {"error", "stdin", "stdout"}
    assert Wanted(stderr=True).spdy_streams("v4.channel.k8s.io") == {"error", "stderr"}


def test_streams_find_their_pair_with_and_without_request_ids() -> None:
    pairs = Pairs()
    assert not pairs.opened(1, {"streamtype": "error", "port": "80", "requestid": "7"}).whole
    assert pairs.opened(9, {"streamtype": "data", "port": "80", "requestid": "7"}).whole
    assert not pairs.opened(11, {"streamtype": "error", "port": "81"}).whole
    assert pairs.opened(13, {"streamtype": "data", "port": "81"}).streams == {"error": 11, "data": 13}
    for headers in ({}, {"streamtype": "data", "port": "0"}, {"streamtype": "x", "port": "80"},
                    {"streamtype": "data", "port": "80", "requestid": "7"}):  # fmt: skip
        with pytest.raises(BadStream):
            pairs.opened(15, headers)
