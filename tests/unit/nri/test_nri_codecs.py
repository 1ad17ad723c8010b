"""The multiplexer and ttrpc: what is framed is what comes out, however it is cut; liars are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.nri import ttrpc_pb2
from workers.nri import mux, ttrpc

CUTS = st.integers(1, 5000)


def demultiplexed(data: bytes, step: int) -> dict[int, bytes]:
    demultiplexer, found = mux.Demultiplexer(), dict[int, bytes]()
    for at in range(0, len(data), step):
        for number, piece in demultiplexer.feed(data[at : at + step]):
            found[number] = found.get(number, b"") + piece
    return found


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=9000)), max_size=6), CUTS)
def test_logical_connections_come_out_as_they_went_in(parts: list[tuple[int, bytes]], step: int) -> None:
    expected: dict[int, bytes] = {}
    for number, data in parts:
        if data:
            expected[number] = expected.get(number, b"") + data
    assert demultiplexed(b"".join(mux.frames(number, data) for number, data in parts), step) == expected


def test_a_message_is_two_frames_at_most_and_the_first_fits_a_buffer_of_bufio() -> None:
    data = mux.frames(1, bytes(mux.MAX_PAYLOAD))
    assert data[:8] == b"\0\0\0\1" + mux.FIRST_FRAME.to_bytes(4, "big")
    assert len(data) == mux.MAX_PAYLOAD + 2 * mux.HEADER_SIZE


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    head = b"\0\0\0\1" + (mux.MAX_PAYLOAD + 1).to_bytes(4, "big")
    with pytest.raises(mux.MuxError):
        list(mux.Demultiplexer().feed(head))
    with pytest.raises(ValueError, match="a frame of"):
        mux.frame(1, bytes(mux.MAX_PAYLOAD + 1))


@given(
    st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=300), st.booleans()), max_size=8),
    st.integers(1, 64),
)
def test_calls_come_back_with_their_answers(asked: list[tuple[str, bytes, bool]], step: int) -> None:
    caller, answerer = ttrpc.Caller(), ttrpc.Answerer()
    there = b"".join(caller.ask("s", method, payload, 7)[1] for method, payload, _ in asked)
    back = b""
    for at in range(0, len(there), step):
        for one in answerer.feed(there[at : at + step]):
            method, payload, good = asked[one.stream // 2]
            assert (one.service, one.method, one.payload) == ("s", method, payload)
            back += answerer.answer(one.stream, payload) if good else answerer.refuse(one.stream, 9, "no")
    answers = list(caller.feed(back))
    assert [(a.code, a.text, a.payload) for a in answers] == [
        (0, "", payload) if good else (9, "no", b"") for _, payload, good in asked
    ]
    assert list(caller.feed(back)) == [], "an answer counts once"


def test_streams_that_are_even_or_fall_are_refused() -> None:
    request = ttrpc_pb2.Request(service="s", method="m").SerializeToString()
    for streams in ([2], [3, 3], [5, 3]):
        answerer = ttrpc.Answerer()
        with pytest.raises(ttrpc.ProtocolError, match="a request on stream"):
            for stream in streams:
                list(answerer.feed(ttrpc.message(stream, ttrpc.REQUEST, request)))


def test_too_many_open_requests_and_too_long_messages_are_refused() -> None:
    answerer = ttrpc.Answerer()
    with pytest.raises(ttrpc.ProtocolError, match="more than 64 requests"):
        for number in range(ttrpc.MAX_OPEN + 1):
            list(answerer.feed(ttrpc.message(2 * number + 1, ttrpc.REQUEST, b"")))
    with pytest.raises(ttrpc.ProtocolError, match="a message of"):
        list(ttrpc.Messages().feed((ttrpc.MAX_MESSAGE + 1).to_bytes(4, "big") + bytes(6)))
    with pytest.raises(ValueError, match="4194304 is the most"):
        ttrpc.Caller().ask("s", "m", bytes(ttrpc.MAX_MESSAGE), 0)


def test_unknown_types_and_answers_nobody_waits_for_are_skipped() -> None:
    assert list(ttrpc.Answerer().feed(ttrpc.message(1, 9, b"x"))) == []
    assert list(ttrpc.Caller().feed(ttrpc.message(1, ttrpc.RESPONSE, b""))) == []
