"""Frames: what goes in comes out, and nothing that comes in can do more than be refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import wire
from ipc.errors import GRPC_STATUS, Code, RemoteError
from ipc.messages import REGISTRY, storage

SMALL = st.integers(min_value=0, max_value=2**63 - 1)


@given(
    kind=st.sampled_from(list(wire.Kind)),
    number=SMALL,
    type_=st.text(max_size=60),
    deadline=SMALL,
    fds=st.integers(0, wire.FD_LIMIT),
    body=st.dictionaries(st.text(), st.integers(-(2**63), 2**63 - 1)),
)
def test_an_envelope_comes_out_as_it_went_in(
    kind: wire.Kind, number: int, type_: str, deadline: int, fds: int, body: dict[str, int]
) -> None:
    raw = msgspec.msgpack.encode(body)
    packet = wire.encode_head(kind, number, type_=type_, deadline_ns=deadline, fds=fds, body=raw)
    head = wire.decode_head(packet)
    assert (head.kind, head.id, head.type, head.deadline_ns, head.fds) == (kind, number, type_, deadline, fds)
    assert bytes(head.body) == raw
    assert not head.memfd


@given(st.binary(max_size=400))
def test_garbage_is_a_protocol_error_or_a_valid_envelope(data: bytes) -> None:
    try:
        head = wire.decode_head(data)
    except wire.ProtocolError:
        return
    assert head.version == wire.VERSION


@given(st.binary(max_size=400))
def test_a_garbage_body_is_an_invalid_argument(data: bytes) -> None:
    try:
        wire.decode_body(storage.LayerBegin, data)
    except RemoteError as error:
        assert error.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_refused_without_a_crash(depth: int) -> None:
    nested = b"\x91" * depth + b"\xc0"
    head = msgspec.msgpack.encode([1, 1, 7, "storage.layer.begin", 0, 0, False])
    with pytest.raises((wire.ProtocolError, RemoteError)):
        envelope = wire.decode_head(b"\x98" + head[1:] + nested)
        wire.decode_body(storage.LayerBegin, envelope.body)


@pytest.mark.parametrize(
    "fields",
    [[2, 1, 1, "", 0, 0, False, None], [1, 9, 1, "", 0, 0, False, None], [1, 1, 1, "", -1, 0, False, None]],
)
def test_other_versions_kinds_and_negative_deadlines_are_refused(fields: list[object]) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.decode_head(msgspec.msgpack.encode(fields))


@given(st.sampled_from(list(Code)), st.text(), st.text(max_size=30))
def test_an_error_keeps_code_text_and_reason(code: Code, text: str, reason: str) -> None:
    back = wire.decode_error(wire.encode_error(RemoteError(code, text[:16_000], reason=reason)))
    assert (back.code, back.text, back.reason) == (code, text[:16_000], reason)


def test_a_code_of_a_later_release_becomes_internal() -> None:
    body = wire.encode_body(wire.WireError(code="from_the_future", text="x"))
    assert wire.decode_error(body).code is Code.INTERNAL


def test_every_code_has_a_grpc_status() -> None:
    assert set(GRPC_STATUS) == set(Code)


def test_every_message_stands_with_its_owner_and_has_a_reply() -> None:
    for name, cls in REGISTRY.items():
        assert cls.__module__ == f"ipc.messages.{name.split('.')[0]}"
        msgspec.msgpack.Decoder(cls.REPLY)


def test_idempotent_requests_carry_no_descriptors() -> None:
    assert [name for name, cls in REGISTRY.items() if cls.IDEMPOTENT and cls.FDS] == []
