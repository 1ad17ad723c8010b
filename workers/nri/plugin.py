"""Runs in: nri. One plugin: who it is, what it subscribes to, and how it is asked.

It registers (one that was started by us has its name already), is configured, and then synchronized by the
registry (plugins.py). A plugin that is gone is never asked again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.message import Message

from ipc.nri import nri_pb2 as pb

from . import interface, ttrpc
from .connection import Connection, Gone, Refused, reply_of

_INDEX = re.compile(r"[0-9]{2}")
_NAME = re.compile(r"[A-Za-z0-9_.+-]+")
MAX_NAME = 255
#: Bytes of pods and containers in one Synchronize: a message of ttrpc has 4 MiB, its own head included.
SYNC_BYTES = 3 << 20
#: Answers what a plugin asks while it is connected.
GrantUpdates = Callable[["Plugin", pb.UpdateContainersRequest], Awaitable[pb.UpdateContainersResponse]]


@dataclass(frozen=True)
class Terms:
    """What every plugin is told when it is configured."""

    runtime_name: str
    runtime_version: str
    registration_timeout: float
    request_timeout: float


class Plugin:
    """One connected plugin. A pre-installed one has its index, name and configuration from the start."""

    def __init__(self, terms: Terms, grant: GrantUpdates, on_gone: Callable[[Plugin, str], object]) -> None:
        self.index = ""
        self.base = ""
        self.config = ""
        self.preinstalled = False
        self.expected = False  # somebody waits for it to join, or to fail
        self.events = 0
        self.configured = False
        self.connection: Connection
        self._terms = terms
        self._grant = grant
        self._on_gone = on_gone
        self._registered = asyncio.Event()
        #: Calls that the plugin answered with "unimplemented": StateChange from then on.
        self._old: set[str] = set()

    @property
    def name(self) -> str:
        """As logs and owners have it."""
        return f"{self.index}-{self.base}"

    @property
    def gone(self) -> bool:
        """Whether it is disconnected."""
        return self.connection.closed

    def is_gone(self, why: str) -> None:
        """The connection's word."""
        self._registered.set()  # nobody waits for it any more
        self._on_gone(self, why)

    # -- joining --------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Wait for its registration and configure it. Raises Gone, Refused."""
        limit = self._terms.registration_timeout
        try:
            await asyncio.wait_for(self._registered.wait(), limit)
        except TimeoutError:
            self.connection.close(f"it did not register within {limit:g} s")
        if self.connection.closed:
            raise Gone("it did not register")
        request = pb.ConfigureRequest(
            config=self.config,
            runtime_name=self._terms.runtime_name,
            runtime_version=self._terms.runtime_version,
            registration_timeout=int(limit * 1000),
            request_timeout=int(self._terms.request_timeout * 1000),
            NRI_version=interface.VERSION,
        )
        reply = await self._call("Configure", request)
        assert isinstance(reply, pb.ConfigureResponse)
        unknown = reply.events & ~interface.ALL_EVENTS
        if unknown:
            self.connection.close(f"it subscribes to events that do not exist: {unknown:#x}")
            raise Gone("it subscribes to events that do not exist")
        self.events = reply.events or interface.ALL_EVENTS
        self.configured = True

    async def serve(self, method: str, request: Message) -> Message:
        """Answer one of its own requests. Raises Refused."""
        if isinstance(request, pb.RegisterPluginRequest):
            return self._register(request)
        assert isinstance(request, pb.UpdateContainersRequest), method
        if not self.configured:
            raise Refused(ttrpc.Status.FAILED_PRECONDITION, "the plugin is not configured yet")
        return await self._grant(self, request)

    def _register(self, request: pb.RegisterPluginRequest) -> pb.Empty:
        if self._registered.is_set():
            raise Refused(ttrpc.Status.FAILED_PRECONDITION, "the plugin is registered already")
        if not self.preinstalled:
            if not _INDEX.fullmatch(request.plugin_idx):
                raise Refused(ttrpc.Status.INVALID_ARGUMENT, "the index of a plugin is two digits")
            if not _NAME.fullmatch(request.plugin_name) or len(request.plugin_name) > MAX_NAME:
                text = "the name of a plugin is letters, digits and any of _.+-"
                raise Refused(ttrpc.Status.INVALID_ARGUMENT, text)
            self.index, self.base = request.plugin_idx, request.plugin_name
        self._registered.set()
        return pb.Empty()

    # -- being asked ----------------------------------------------------------------------------------

    def wants(self, method: str) -> bool:
        """Whether it subscribes to the event."""
        return not self.gone and interface.subscribes(self.events, interface.PLUGIN_CALLS[method].event)

    async def tell(self, method: str, request: Message) -> Message:
        """Relay an event. Raises Refused with its words, Gone."""
        if method in self._old:
            return await self._state_change(method, request)
        try:
            return await self._call(method, request)
        except Refused as error:
            if error.code != ttrpc.Status.UNIMPLEMENTED or not interface.PLUGIN_CALLS[method].state_change:
                raise
        self._old.add(method)
        return await self._state_change(method, request)

    async def _state_change(self, method: str, request: Message) -> Message:
        change = pb.StateChangeEvent(event=pb.Event.Name(interface.PLUGIN_CALLS[method].event))
        change.pod.CopyFrom(getattr(request, "pod"))  # noqa: B009 - every event has one, the base class not
        if "container" in request.DESCRIPTOR.fields_by_name:
            change.container.CopyFrom(getattr(request, "container"))  # noqa: B009
        return await self._call("StateChange", change)

    async def _call(self, method: str, request: Message, timeout: float | None = None) -> Message:
        return await self.connection.call(
            method, request, reply_of(method), timeout or self._terms.request_timeout
        )

    async def synchronize(
        self, pods: list[pb.PodSandbox], containers: list[pb.Container]
    ) -> list[pb.ContainerUpdate]:
        """Tell it all that exists, in as many pieces as that takes, within the time of a registration.

        Raises Refused, Gone.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._terms.registration_timeout
        updates: list[pb.ContainerUpdate] = []
        for request in pieces(pods, containers):
            reply = await self._call("Synchronize", request, max(end - loop.time(), 0.001))
            assert isinstance(reply, pb.SynchronizeResponse)
            if request.more and (reply.update or not reply.more):
                self.connection.close("it cannot be synchronized in pieces")
                raise Gone("it cannot be synchronized in pieces")
            updates = list(reply.update)
        return updates


def pieces(
    pods: Iterable[pb.PodSandbox], containers: Iterable[pb.Container]
) -> Iterator[pb.SynchronizeRequest]:
    """The state in requests that fit; one at least. What is too large for any message is left out."""
    request, size = pb.SynchronizeRequest(), 0
    for one in [*pods, *containers]:
        bytes_ = one.ByteSize()
        if bytes_ > SYNC_BYTES:
            continue
        if size + bytes_ > SYNC_BYTES:
            request.more = True
            yield request
            request, size = pb.SynchronizeRequest(), 0
        target = request.pods if isinstance(one, pb.PodSandbox) else request.containers
        target.append(one)  # type: ignore[arg-type]  # of the one of the two that it belongs to
        size += bytes_
    yield request
