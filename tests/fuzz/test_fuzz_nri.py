"""Runs in: pytest (a short run; HYPOTHESIS_PROFILE=fuzz makes it long). The codecs of the nri worker get
anything: they answer with events or their own errors, and keep no more than one message."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from workers.nri import mux, ttrpc

STEPS = st.integers(1, 100)


@st.composite
def trunk(draw: st.DrawFn) -> bytes:
    out = b""
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            inner = draw(st.binary(max_size=30))
            stream, kind = draw(st.integers(0, 9)), draw(st.integers(0, 4))
            out += mux.frames(draw(st.integers(0, 3)), ttrpc.message(stream, kind, inner))
        else:
            out += draw(st.binary(max_size=30))
    return out


@given(trunk(), STEPS)
def test_a_plugins_socket_may_bring_anything(data: bytes, step: int) -> None:
    demultiplexer, caller, answerer = mux.Demultiplexer(), ttrpc.Caller(), ttrpc.Answerer()
    caller.ask("s", "m", b"", 0)
    with contextlib.suppress(mux.MuxError, ttrpc.ProtocolError):
        for at in range(0, len(data), step):
            for number, piece in demultiplexer.feed(data[at : at + step]):
                if number == mux.PLUGIN_SERVICE:
                    list(caller.feed(piece))
                elif number == mux.RUNTIME_SERVICE:
                    for one in answerer.feed(piece):
                        assert len(list(ttrpc.Messages().feed(answerer.answer(one.stream, b"")))) == 1
