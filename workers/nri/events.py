"""Runs in: nri. What plugins are told of pods and containers, and what they answer, put together.

A plugin that says no refuses the operation. One that fails in any other way (no answer in time, a broken
protocol, a closed connection) is disconnected, and the event goes on without it; but a validator that fails
objects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import msgspec
from google.protobuf.message import Message

from ipc.aio import Call
from ipc.errors import invalid, precondition
from ipc.messages import Empty
from ipc.messages import nri as messages
from ipc.nri import nri_pb2 as pb
from ipc.settings import NriValidator

from . import adjust, oci, resources, ttrpc, validator
from .connection import Gone, Refused
from .interface import PLUGIN_CALLS
from .owners import Conflict, Owners
from .plugin import Plugin
from .plugins import Plugins
from .result import Adjustments, Updates, claim_resources, put_resources

_VALIDATE = "ValidateContainerAdjustment"


class Events:
    """The handlers of events."""

    def __init__(self, plugins: Plugins, default_validator: NriValidator) -> None:
        self._plugins = plugins
        self._validator = default_validator

    async def pod_event(self, _call: Call, body: messages.PodEvent) -> Empty:
        """RunPodSandbox and its like."""
        pod = oci.pod(body.pod)
        request = _request(body.event, pod=pod)
        if isinstance(request, pb.UpdatePodSandboxRequest):
            request.overhead_linux_resources.CopyFrom(oci.decoded_resources(body.overhead))
            request.linux_resources.CopyFrom(oci.decoded_resources(body.resources))
        async with self._plugins.turn:
            await self._relay(body.event, request)
        return Empty()

    async def container_event(self, _call: Call, body: messages.ContainerEvent) -> messages.Wishes:
        """StartContainer and its like. With StopContainer plugins may want other containers updated."""
        request = _request(body.event, pod=oci.pod(body.pod), container=oci.container(body.container))
        updates = Updates(Owners())
        async with self._plugins.turn:
            for plugin, reply in await self._relay(body.event, request):
                if isinstance(reply, pb.StopContainerResponse):
                    with consistent():
                        updates.add(reply.update, plugin.name)
        return updates.wishes()

    async def container_create(self, _call: Call, body: messages.ContainerCreate) -> messages.Adjusted:
        """Have everybody adjust a container, and the adjustments validated."""
        spec = msgspec.json.decode(body.container.spec)
        pod, container = oci.pod(body.pod), oci.container(body.container, spec, seccomp=True)
        adjustments = Adjustments(container)
        async with self._plugins.turn:
            consulted = list(self._plugins.active)
            pristine = pb.Container()
            pristine.CopyFrom(container)
            for plugin in consulted:
                asked = pb.CreateContainerRequest(pod=pod, container=container)
                reply = await self._tell(plugin, "CreateContainer", asked)
                if isinstance(reply, pb.CreateContainerResponse):
                    with consistent():
                        adjustments.add(reply, plugin.name)
            await self._validate(pod, pristine, adjustments, consulted)
        wanted = adjustments.adjust
        try:
            notes = adjust.apply(spec, wanted)
        except ValueError as error:  # a number that no enumeration has
            raise precondition(f"a plugin's adjustment makes no sense: {error}") from error
        return messages.Adjusted(
            spec=msgspec.json.encode(spec),
            cgroups_path=wanted.linux.cgroups_path,
            cdi_devices=[one.name for one in wanted.CDI_devices],
            wishes=adjustments.updates.wishes(),
            degraded=[*notes, *adjust.newer_than(body.oci_version, wanted)],
        )

    async def container_update(self, _call: Call, body: messages.ContainerUpdate) -> messages.Updated:
        """Have everybody change an update of a container."""
        owners, limits = Owners(), oci.decoded_resources(body.resources)
        updates = Updates(owners)
        pod, container = oci.pod(body.pod), oci.container(body.container)
        async with self._plugins.turn:
            for plugin in list(self._plugins.active):
                asked = pb.UpdateContainerRequest(pod=pod, container=container, linux_resources=limits)
                reply = await self._tell(plugin, "UpdateContainer", asked)
                if isinstance(reply, pb.UpdateContainerResponse):
                    own = [one for one in reply.update if one.container_id == container.id]
                    with consistent():
                        _change(limits, owners, own, plugin.name)
                        updates.add((one for one in reply.update if one not in own), plugin.name)
                    updates.evict(reply.evict)
        wanted = msgspec.json.encode(resources.to_oci(limits))
        return messages.Updated(resources=wanted, wishes=updates.wishes())

    # -- asking ---------------------------------------------------------------------------------------

    async def _relay(self, event: str, request: Message) -> list[tuple[Plugin, Message]]:
        """Tell everybody who wants to know. Raises RemoteError if one says no."""
        answers = [
            (plugin, await self._tell(plugin, event, request)) for plugin in list(self._plugins.active)
        ]
        return [(plugin, reply) for plugin, reply in answers if reply is not None]

    async def _tell(self, plugin: Plugin, event: str, request: Message) -> Message | None:
        """One plugin's answer; None if it does not want to know, or is gone."""
        if not plugin.wants(event):
            return None
        try:
            return await plugin.tell(event, request)
        except Gone:
            return None
        except Refused as error:
            raise precondition(f"plugin {plugin.name} refused {event}: {error.text}") from error

    # -- validating -----------------------------------------------------------------------------------

    async def _validate(
        self, pod: pb.PodSandbox, container: pb.Container, adjustments: Adjustments, consulted: list[Plugin]
    ) -> None:
        """Raises RemoteError if the default validator or a plugin objects."""
        there = [plugin for plugin in consulted if not plugin.gone]
        if self._validator.enable:
            names = {plugin.base for plugin in there}
            try:
                validator.validate(self._validator, pod, container, adjustments.owners, names)
            except validator.Rejected as error:
                raise precondition(f"container {container.name}: {error}") from error
        request = pb.ValidateContainerAdjustmentRequest(
            pod=pod,
            container=container,
            adjust=adjustments.adjust,
            update=adjustments.updates.by_id.values(),
            owners=adjustments.owners.record,
            plugins=[pb.PluginInstance(name=plugin.base, index=plugin.index) for plugin in there],
        )
        for plugin in there:
            if plugin.wants(_VALIDATE):
                await _ask_validator(plugin, request)


async def _ask_validator(plugin: Plugin, request: pb.ValidateContainerAdjustmentRequest) -> None:
    try:
        reply = await plugin.tell(_VALIDATE, request)
    except Gone as error:
        raise precondition(f"validator {plugin.name} is gone: {error}") from error
    except Refused as error:
        if error.code == ttrpc.Status.UNIMPLEMENTED:  # it subscribed to everything there is
            return
        raise precondition(f"validator {plugin.name} failed: {error.text}") from error
    assert isinstance(reply, pb.ValidateContainerAdjustmentResponse)
    if reply.reject:
        raise precondition(f"validator {plugin.name} rejected the adjustment: {reply.reason}")


def _change(
    limits: pb.LinuxResources, owners: Owners, updates: Iterable[pb.ContainerUpdate], plugin: str
) -> None:
    """A plugin changes the very update that is asked for. Raises Conflict."""
    for one in updates:
        try:
            claim_resources(owners, one.container_id, one.linux.resources, plugin)
        except Conflict:
            if not one.ignore_failure:
                raise
        else:
            put_resources(limits, one.linux.resources)


@contextlib.contextmanager
def consistent() -> Iterator[None]:
    """Plugins that contradict each other are the caller's answer."""
    try:
        yield
    except Conflict as error:
        raise precondition(str(error)) from error


def _request(event: str, **parts: Message) -> Message:
    """The interface's request of an event. Raises RemoteError(INVALID_ARGUMENT) for what is no such event."""
    call = PLUGIN_CALLS.get(event)
    if call is None or not call.event or set(parts) - set(call.request.DESCRIPTOR.fields_by_name):
        raise invalid(f"there is no such event: {event!r}")
    return call.request(**parts)
