"""Correlation, sans-IO: every answer finds its question, whatever the order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from ipc import calls, wire
from ipc.calls import Answered, Asked, Calls, Cancelled, Failed, Refused, Updated
from ipc.errors import Code, RemoteError
from ipc.fds import FdSet
from ipc.messages import Empty, image, storage
from ipc.table import Handler, table

HANDLERS = table(
    Handler(storage.LayerAbort, print, {"cri"}),
    Handler(storage.ImageGet, print, {"cri"}),
    Handler(image.BlobFetch, print, {"cri"}),
)


def deliver(packet: calls.Packet | None, to: Calls) -> calls.Event | None:
    assert packet is not None
    fds = FdSet(packet.fds.take(i) for i in range(len(packet.fds)))
    return to.receive(packet.data, fds)


def ends(caller: str = "cri", **kwargs: Any) -> tuple[Calls, Calls]:
    return Calls({}, "server"), Calls(HANDLERS, caller, **kwargs)


class Correlation(RuleBasedStateMachine):
    """A client and a server exchange packets in any order; a model holds what must come out."""

    open_calls = Bundle("open_calls")

    def __init__(self) -> None:
        super().__init__()
        self.client, self.server = ends()
        self.expected: dict[int, str] = {}

    @rule(target=open_calls, reference=st.text(max_size=20))
    def ask(self, reference: str) -> int:
        number, packet = self.client.ask(storage.ImageGet(reference=reference), FdSet())
        event = deliver(packet, self.server)
        assert isinstance(event, Asked)
        assert event.body == storage.ImageGet(reference=reference)
        self.expected[number] = reference
        return number

    @rule(number=consumes(open_calls), size=st.sampled_from([0, 10, 70_000]))
    def answer(self, number: int, size: int) -> None:
        record = storage.ImageRecord(id=self.expected.pop(number), config=b"x" * size)
        reply = self.server.reply(number, storage.ImageFound(image=record), FdSet())
        event = deliver(reply, self.client)
        assert isinstance(event, Answered)
        assert event.number == number
        assert isinstance(event.body, storage.ImageFound)
        assert event.body.image == record

    @rule(number=consumes(open_calls), code=st.sampled_from(list(Code)))
    def fail(self, number: int, code: Code) -> None:
        del self.expected[number]
        event = deliver(self.server.fail(number, RemoteError(code, "no")), self.client)
        assert isinstance(event, Failed)
        assert (event.number, event.error.code) == (number, code)

    @rule(number=consumes(open_calls), crossing=st.booleans())
    def cancel(self, number: int, crossing: bool) -> None:
        del self.expected[number]
        packet = self.client.cancel(number)
        if crossing:  # the answer was on its way already
            late = self.server.reply(number, storage.ImageFound(image=None), FdSet())
            assert deliver(packet, self.server) is None
            assert deliver(late, self.client) is None
        else:
            event = deliver(packet, self.server)
            assert isinstance(event, Cancelled)
            assert self.server.reply(number, Empty(), FdSet()) is None

    @invariant()
    def both_sides_count_alike(self) -> None:
        assert self.client.waiting == self.server.serving == len(self.expected)


TestCorrelation = Correlation.TestCase
TestCorrelation.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def refusal(server: Calls, packet: calls.Packet, client: Calls) -> RemoteError:
    event = deliver(packet, server)
    assert isinstance(event, Refused)
    answer = deliver(event.packet, client)
    assert isinstance(answer, Failed)
    return answer.error


def test_an_unknown_type_is_answered_and_the_connection_lives() -> None:
    client, server = ends()
    _, packet = client.ask(storage.FsInfoGet(), FdSet())
    assert refusal(server, packet, client).code is Code.UNIMPLEMENTED
    _, packet = client.ask(storage.LayerAbort(chain_id="x"), FdSet())
    assert isinstance(deliver(packet, server), Asked)


def test_a_wrong_caller_is_refused_before_its_body_is_read() -> None:
    client, server = ends(caller="image")
    _, packet = client.ask(storage.LayerAbort(chain_id="x"), FdSet())
    packet.data = packet.data.replace(b"chain_id", b"chain_xx")
    assert refusal(server, packet, client).code is Code.PERMISSION_DENIED


def test_a_wrong_body_is_an_invalid_argument() -> None:
    client, server = ends()
    _, packet = client.ask(storage.LayerAbort(chain_id="x"), FdSet())
    packet.data = packet.data.replace(b"chain_id", b"chain_xx")
    assert refusal(server, packet, client).code is Code.INVALID_ARGUMENT


def test_more_requests_than_the_bound_are_answered_busy() -> None:
    client, server = ends(max_requests=2)
    for _ in range(2):
        deliver(client.ask(storage.LayerAbort(chain_id="x"), FdSet())[1], server)
    _, packet = client.ask(storage.LayerAbort(chain_id="x"), FdSet())
    error = refusal(server, packet, client)
    assert error.code is Code.RESOURCE_EXHAUSTED
    assert "busy" in error.text


def test_a_number_that_is_in_flight_cannot_be_used_again() -> None:
    client, server = ends()
    _, packet = client.ask(storage.LayerAbort(chain_id="x"), FdSet())
    server.receive(packet.data, FdSet())
    with pytest.raises(wire.ProtocolError):
        server.receive(packet.data, FdSet())


def test_progress_reaches_the_asker_and_ends_nothing() -> None:
    client, server = ends()
    number, packet = client.ask(image.BlobFetch(source="s", digest="d", size=1), FdSet())
    deliver(packet, server)
    event = deliver(server.update(number, image.Progress(bytes=7)), client)
    assert isinstance(event, Updated)
    assert event.body == image.Progress(bytes=7)
    assert client.waiting == 1


def test_progress_for_a_message_without_any_is_a_protocol_error() -> None:
    client, server = ends()
    number, packet = client.ask(storage.LayerAbort(chain_id="x"), FdSet())
    deliver(packet, server)
    with pytest.raises(wire.ProtocolError):
        deliver(server.update(number, image.Progress(bytes=7)), client)


def test_a_lost_connection_gives_back_every_open_number() -> None:
    client, _server = ends()
    numbers = [client.ask(storage.LayerAbort(chain_id="x"), FdSet())[0] for _ in range(3)]
    assert client.lost() == numbers
    assert client.waiting == 0


def test_deadlines_travel_on_the_monotonic_clock() -> None:
    client, server = ends()
    event = deliver(client.ask(storage.LayerAbort(chain_id="x"), FdSet(), 123_456)[1], server)
    assert isinstance(event, Asked)
    assert event.deadline_ns == 123_456
