"""Runs in: every process. Sans-IO.

The core that every face shares: it correlates requests with answers on one connection, in both directions
(a connection may ask and answer at once), looks types up before it decodes bodies, checks callers,
bounds what is in flight. Bytes and descriptors in, events and packets out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipc import wire
from ipc.errors import Code, RemoteError
from ipc.fds import FdSet, read_sealed, sealed_memfd
from ipc.messages import Body, Request
from ipc.table import Handler


@dataclass
class Packet:
    """What goes out: bytes, and descriptors that are closed once they are sent (or never will be)."""

    data: bytes
    fds: FdSet


@dataclass
class Asked:
    """The peer asked: answer with Calls.reply(number, ...) or Calls.fail(number, ...), once."""

    number: int
    handler: Handler
    body: Request[Any]
    fds: FdSet
    deadline_ns: int


@dataclass
class Cancelled:
    """The peer does not want request `number` any more; answering it is allowed and ignored."""

    number: int


@dataclass
class Answered:
    number: int
    body: Body
    fds: FdSet


@dataclass
class Failed:
    number: int
    error: RemoteError


@dataclass
class Updated:
    number: int
    body: Body


@dataclass
class Refused:
    """A request was answered by the core itself (unknown type, wrong caller, busy, bad body)."""

    packet: Packet
    error: RemoteError
    type: str


Event = Asked | Cancelled | Answered | Failed | Updated | Refused


class Calls:
    """One connection's calls, both those asked by us and those asked by the peer.

    `caller` is the peer's kind (ipc.table); `max_requests` bounds the peer's requests in flight; `asked` is
    the number of the last request that was asked on this connection before.
    """

    def __init__(
        self, handlers: Mapping[str, Handler], caller: str, *, max_requests: int = 256, asked: int = 0
    ) -> None:
        self._handlers = handlers
        self._caller = caller
        self._max = max_requests
        self._next = asked
        self._asked: dict[int, type[Request[Any]]] = {}  # ours, waiting for an answer
        self._serving: set[int] = set()  # the peer's

    @property
    def waiting(self) -> int:
        """How many of our own requests have no answer yet."""
        return len(self._asked)

    @property
    def asked(self) -> int:
        """The number of our last request."""
        return self._next

    @property
    def serving(self) -> int:
        """How many of the peer's requests we have not answered yet."""
        return len(self._serving)

    # -- asking ---------------------------------------------------------------------------------------

    def ask(self, body: Request[Any], fds: FdSet, deadline_ns: int = 0) -> tuple[int, Packet]:
        """Return the request's number and its packet. Takes the descriptors over."""
        self._next += 1
        if len(fds) > body.FDS:
            raise ValueError(f"{body.NAME} carries at most {body.FDS} descriptors, not {len(fds)}")
        packet = _pack(wire.Kind.REQUEST, self._next, body, fds, type_=body.NAME, deadline_ns=deadline_ns)
        self._asked[self._next] = type(body)
        return self._next, packet

    def cancel(self, number: int) -> Packet | None:
        """Forget a request of ours; return the packet that tells the peer, None if it was answered."""
        if self._asked.pop(number, None) is None:
            return None
        return Packet(wire.encode_head(wire.Kind.CANCEL, number, body=b"\xc0"), FdSet())

    def lost(self) -> list[int]:
        """The connection is gone: forget and return the numbers of our unanswered requests."""
        numbers = list(self._asked)
        self._asked.clear()
        self._serving.clear()
        return numbers

    # -- answering ------------------------------------------------------------------------------------

    def reply(self, number: int, body: Body, fds: FdSet) -> Packet | None:
        """Return the answer's packet, None if the request is not in flight (and close the descriptors)."""
        if number not in self._serving:
            fds.close()
            return None
        packet = _pack(wire.Kind.REPLY, number, body, fds)
        self._serving.discard(number)
        return packet

    def fail(self, number: int, error: RemoteError) -> Packet | None:
        """Return the packet of a failure, None if the request is not in flight."""
        if number not in self._serving:
            return None
        self._serving.discard(number)
        return _error_packet(number, error)

    def update(self, number: int, body: Body) -> Packet | None:
        """Return the packet of a progress report, None if the request is not in flight."""
        if number not in self._serving:
            return None
        return _pack(wire.Kind.UPDATE, number, body, FdSet())

    # -- receiving ------------------------------------------------------------------------------------

    def receive(self, data: bytes, fds: FdSet) -> Event | None:
        """Take one packet in. Raises ProtocolError (close the connection). None: nothing to do."""
        try:
            head = wire.decode_head(data)
            if len(fds) != head.fds + head.memfd:
                raise wire.ProtocolError(
                    f"{len(fds)} descriptors came, {head.fds + head.memfd} were announced"
                )
            if head.kind == wire.Kind.REQUEST:
                return self._on_request(head, fds)
            if head.kind == wire.Kind.CANCEL:
                return self._on_cancel(head.id)
            return self._on_answer(head, fds)
        except BaseException:
            fds.close()
            raise

    def _on_request(self, head: wire.Envelope, fds: FdSet) -> Event:
        if head.id in self._serving:
            raise wire.ProtocolError(f"request {head.id} is in flight already")
        try:
            handler = self._admit(head)
            body = wire.decode_body(handler.request, _body_bytes(head, fds))
        except RemoteError as error:
            fds.close()
            return Refused(_error_packet(head.id, error), error, head.type[:80])
        self._serving.add(head.id)
        return Asked(head.id, handler, body, fds, head.deadline_ns)

    def _admit(self, head: wire.Envelope) -> Handler:
        handler = self._handlers.get(head.type)
        if handler is None:
            raise RemoteError(Code.UNIMPLEMENTED, f"unknown message {head.type[:80]!r}")
        if self._caller not in handler.callers:
            raise RemoteError(Code.PERMISSION_DENIED, f"{self._caller} may not send {head.type}")
        if len(self._serving) >= self._max:
            raise RemoteError(Code.RESOURCE_EXHAUSTED, f"busy: {len(self._serving)} requests in flight")
        if head.fds > handler.request.FDS:
            raise RemoteError(Code.INVALID_ARGUMENT, f"{head.type} came with {head.fds} descriptors")
        return handler

    def _on_cancel(self, number: int) -> Event | None:
        if number not in self._serving:
            return None  # our answer crossed it
        self._serving.discard(number)
        return Cancelled(number)

    def _on_answer(self, head: wire.Envelope, fds: FdSet) -> Event | None:
        asked = self._asked.get(head.id)
        if asked is None:
            fds.close()
            return None  # the answer crossed our cancel
        if head.kind == wire.Kind.UPDATE:
            return self._on_update(head, asked, fds)
        del self._asked[head.id]
        try:
            if head.kind == wire.Kind.ERROR:
                return Failed(head.id, wire.decode_error(_body_bytes(head, fds)))
            return Answered(head.id, wire.decode_body(asked.REPLY, _body_bytes(head, fds)), fds)
        except RemoteError as error:
            fds.close()
            return Failed(head.id, RemoteError(Code.INTERNAL, f"bad answer to {asked.NAME}: {error.text}"))

    def _on_update(self, head: wire.Envelope, asked: type[Request[Any]], fds: FdSet) -> Event | None:
        if asked.UPDATE is None:
            raise wire.ProtocolError(f"{asked.NAME} has no progress reports")
        try:
            return Updated(head.id, wire.decode_body(asked.UPDATE, _body_bytes(head, fds)))
        finally:
            fds.close()


def _body_bytes(head: wire.Envelope, fds: FdSet) -> bytes:
    if not head.memfd:
        return bytes(head.body)
    with FdSet([fds.pop_last()]) as memfd:
        try:
            return read_sealed(memfd.get(), wire.BODY_LIMIT)
        except ValueError as error:
            raise wire.ProtocolError(str(error)) from error


def _pack(
    kind: wire.Kind, number: int, body: Body, fds: FdSet, *, type_: str = "", deadline_ns: int = 0
) -> Packet:
    data = wire.encode_body(body)
    count = len(fds)
    if count >= wire.FD_LIMIT:
        raise ValueError(f"{count} descriptors are too many for one message")
    inline = len(data) <= wire.INLINE_LIMIT
    if not inline:
        fds = FdSet([*_take_all(fds), sealed_memfd("bulkhead-body", data)])
    packet = wire.encode_head(
        kind, number, type_=type_, deadline_ns=deadline_ns, fds=count, body=data if inline else None
    )
    return Packet(packet, fds)


def _take_all(fds: FdSet) -> Sequence[int]:
    return [fds.take(index) for index in range(len(fds))]


def _error_packet(number: int, error: RemoteError) -> Packet:
    return Packet(wire.encode_head(wire.Kind.ERROR, number, body=wire.encode_error(error)), FdSet())
