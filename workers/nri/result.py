"""Runs in: nri. Sans-IO: what plugins answered to one event, put together.

Each plugin sees the container as those before it left it; the adjustments are collected with the field's
owners. Everything with a key can be removed by a "-" before it. Raises Conflict where two plugins want the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import msgspec
from google.protobuf.message import Message

from ipc.messages import nri as messages
from ipc.nri import nri_pb2 as pb

from . import resources
from .owners import REMOVED, Conflict, Owners, is_marked, unmarked

_MEMORY_FIELDS = {
    "limit": pb.MemLimit,
    "reservation": pb.MemReservation,
    "swap": pb.MemSwapLimit,
    "kernel": pb.MemKernelLimit,
    "kernel_tcp": pb.MemTCPLimit,
    "swappiness": pb.MemSwappiness,
    "disable_oom_killer": pb.MemDisableOomKiller,
    "use_hierarchy": pb.MemUseHierarchy,
}
_CPU_FIELDS = {
    "shares": pb.CPUShares,
    "quota": pb.CPUQuota,
    "period": pb.CPUPeriod,
    "realtime_runtime": pb.CPURealtimeRuntime,
    "realtime_period": pb.CPURealtimePeriod,
}
_CPUSET_FIELDS = {"cpus": pb.CPUSetCPUs, "mems": pb.CPUSetMems}
_CLASS_FIELDS = {"blockio_class": pb.BlockioClass, "rdt_class": pb.RdtClass}
_RDT_FIELDS = {
    "clos_id": pb.RdtClosID,
    "schemata": pb.RdtSchemata,
    "enable_monitoring": pb.RdtEnableMonitoring,
}
#: Messages of LinuxContainerAdjustment that one plugin sets as a whole.
_WHOLE = {
    "oom_score_adj": pb.OomScoreAdj,
    "io_priority": pb.IoPriority,
    "seccomp_policy": pb.SeccompPolicy,
    "scheduler": pb.LinuxSched,
    "memory_policy": pb.MemoryPolicy,
}
_STAGES = ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop")


def to_update(wanted: pb.ContainerUpdate) -> messages.Update:
    """An update, as cri is told."""
    limits = msgspec.json.encode(resources.to_oci(wanted.linux.resources))
    return messages.Update(
        container_id=wanted.container_id, resources=limits, ignore_failure=wanted.ignore_failure
    )


def to_eviction(wanted: pb.ContainerEviction) -> messages.Eviction:
    """An eviction, as cri is told."""
    return messages.Eviction(container_id=wanted.container_id, reason=wanted.reason)


class Updates:
    """What plugins want of other containers: updates by container, and evictions."""

    def __init__(self, owners: Owners, creating: str = "") -> None:
        self.by_id: dict[str, pb.ContainerUpdate] = {}
        self.evictions: dict[str, pb.ContainerEviction] = {}
        self._owners = owners
        self._creating = creating

    def add(self, updates: Iterable[pb.ContainerUpdate], plugin: str) -> None:
        """Take a plugin's updates. One that may fail and conflicts is left out. Raises Conflict."""
        for update in updates:
            if update.container_id == self._creating:
                text = f"plugin {plugin!r} asked for an update of the container that is being created"
                raise Conflict(text)
            try:
                self._add(update, plugin)
            except Conflict:
                if not update.ignore_failure:
                    raise

    def evict(self, evictions: Iterable[pb.ContainerEviction]) -> None:
        """Take a plugin's evictions."""
        for eviction in evictions:
            self.evictions.setdefault(eviction.container_id, eviction)

    def wishes(self) -> messages.Wishes:
        """All of it, as cri is told."""
        return messages.Wishes(
            updates=[to_update(one) for one in self.by_id.values()],
            evictions=[to_eviction(one) for one in self.evictions.values()],
        )

    def _add(self, update: pb.ContainerUpdate, plugin: str) -> None:
        known = self.by_id.get(update.container_id)
        merged = pb.ContainerUpdate(container_id=update.container_id, ignore_failure=update.ignore_failure)
        if known is not None:
            merged.CopyFrom(known)
            merged.ignore_failure = known.ignore_failure and update.ignore_failure
        limits, wanted = merged.linux.resources, update.linux.resources
        claim_resources(self._owners, update.container_id, wanted, plugin)
        put_resources(limits, wanted)
        self.by_id[update.container_id] = merged


class Adjustments:
    """The adjustments of a container that is being created. `container` is what the next plugin sees."""

    def __init__(self, container: pb.Container) -> None:
        self.container = container
        self.adjust = pb.ContainerAdjustment()
        self.owners = Owners()
        self.updates = Updates(self.owners, container.id)

    def add(self, reply: pb.CreateContainerResponse, plugin: str) -> None:
        """Take a plugin's answer. Raises Conflict."""
        wanted, shown, collected = reply.adjust, self.container, self.adjust
        self._map(pb.Annotations, wanted.annotations, shown.annotations, collected.annotations, plugin)
        self._list(pb.Mounts, "destination", wanted.mounts, shown.mounts, collected.mounts, plugin=plugin)
        self._env(wanted.env, plugin)
        self._args(list(wanted.args), plugin)
        self._hooks(wanted.hooks, plugin)
        self._list(pb.Rlimits, "type", wanted.rlimits, shown.rlimits, collected.rlimits, plugin=plugin)
        self._list(pb.CdiDevices, "name", wanted.CDI_devices, [], collected.CDI_devices, plugin=plugin)
        if wanted.HasField("linux"):
            self._linux(wanted.linux, plugin)
        self.updates.add(reply.update, plugin)
        self.updates.evict(reply.evict)

    def _linux(self, wanted: pb.LinuxContainerAdjustment, plugin: str) -> None:
        shown, collected = self.container.linux, self.adjust.linux
        self._list(pb.Devices, "path", wanted.devices, shown.devices, collected.devices, plugin=plugin)
        self._namespaces(wanted, plugin)
        self._map(pb.Sysctl, wanted.sysctl, shown.sysctl, collected.sysctl, plugin)
        self._net_devices(wanted, plugin)
        claim_resources(self.owners, self.container.id, wanted.resources, plugin)
        for target in (shown.resources, collected.resources):
            put_resources(target, wanted.resources)
        if wanted.cgroups_path:
            self.owners.claim(self.container.id, pb.CgroupsPath, plugin)
            shown.cgroups_path = collected.cgroups_path = wanted.cgroups_path
        for name, field in _WHOLE.items():
            self._whole(name, field, wanted, plugin)
        self._rdt(wanted.rdt, plugin)

    # -- kinds of fields ------------------------------------------------------------------------------

    def _map(
        self,
        field: pb.Field,
        wanted: MutableMapping[str, str],
        shown: MutableMapping[str, str],
        collected: MutableMapping[str, str],
        plugin: str,
    ) -> None:
        for key in self._cleared(field, wanted, plugin):
            shown.pop(key, None)
            collected.pop(key, None)
            collected[REMOVED + key] = ""
        for key in [key for key in wanted if not is_marked(key)]:
            self.owners.claim(self.container.id, field, plugin, key)
            collected.pop(REMOVED + key, None)
            shown[key] = collected[key] = wanted[key]

    def _cleared(self, field: pb.Field, keys: Iterable[str], plugin: str) -> list[str]:
        """What a plugin removes; the marks are off, and what is set after is its own."""
        removed = [unmarked(key) for key in keys if is_marked(key)]
        for key in removed:
            self.owners.clear(self.container.id, field, plugin, key)
        return removed

    def _list(
        self, field: pb.Field, key: str, wanted: Any, shown: Any, collected: Any, *, plugin: str
    ) -> None:
        """Repeated messages that have a key: `key` is the name of that field."""

        def key_of(one: Message) -> str:
            return str(getattr(one, key))

        added = [one for one in wanted if not is_marked(key_of(one))]
        self._cleared(field, map(key_of, wanted), plugin)
        for one in added:
            self.owners.claim(self.container.id, field, plugin, key_of(one))
        names = {unmarked(key_of(one)) for one in wanted}
        for target in (shown, collected):
            _drop(target, lambda one: unmarked(key_of(one)) in names)
        again = {key_of(one) for one in added}
        gone = [one for one in wanted if is_marked(key_of(one)) and unmarked(key_of(one)) not in again]
        collected.extend([*gone, *added])
        shown.extend(added)

    def _env(self, wanted: Iterable[pb.KeyValue], plugin: str) -> None:
        entries = list(wanted)
        self._list(pb.Env, "key", entries, [], self.adjust.env, plugin=plugin)
        names = {unmarked(one.key) for one in entries}
        _drop(self.container.env, lambda one: str(one).partition("=")[0] in names)
        self.container.env.extend(f"{one.key}={one.value}" for one in entries if not is_marked(one.key))

    def _args(self, args: list[str], plugin: str) -> None:
        if not args:
            return
        if not args[0]:  # "whoever set them before"
            self.owners.clear(self.container.id, pb.Args, plugin)
            args = args[1:]
        self.owners.claim(self.container.id, pb.Args, plugin)
        for target in (self.adjust, self.container):
            target.args[:] = args

    def _hooks(self, wanted: pb.Hooks, plugin: str) -> None:
        for stage in _STAGES:
            if hooks := getattr(wanted, stage):
                self.owners.share(self.container.id, pb.OciHooks, plugin)
                for target in (self.adjust.hooks, self.container.hooks):
                    getattr(target, stage).extend(hooks)

    def _namespaces(self, wanted: pb.LinuxContainerAdjustment, plugin: str) -> None:
        shown, collected = self.container.linux.namespaces, self.adjust.linux.namespaces
        for one in wanted.namespaces:
            type_ = unmarked(one.type)
            self.owners.claim(self.container.id, pb.Namespace, plugin, type_)
            _drop_type(shown, type_)
            if not is_marked(one.type):
                shown.append(one)
            collected.append(one)

    def _net_devices(self, wanted: pb.LinuxContainerAdjustment, plugin: str) -> None:
        shown, collected = self.container.linux.net_devices, self.adjust.linux.net_devices
        for key in self._cleared(pb.LinuxNetDevices, wanted.net_devices, plugin):
            shown.pop(key, None)
            collected.pop(key, None)
            collected[REMOVED + key].name = ""
        for key in [key for key in wanted.net_devices if not is_marked(key)]:
            self.owners.claim(self.container.id, pb.LinuxNetDevices, plugin, key)
            collected.pop(REMOVED + key, None)
            for target in (shown, collected):
                target[key].CopyFrom(wanted.net_devices[key])

    def _whole(self, name: str, field: pb.Field, wanted: pb.LinuxContainerAdjustment, plugin: str) -> None:
        if wanted.HasField(name):
            self.owners.claim(self.container.id, field, plugin)
            value = getattr(wanted, name)
            getattr(self.adjust.linux, name).CopyFrom(value)
            if hasattr(self.container.linux, name):
                getattr(self.container.linux, name).CopyFrom(value)

    def _rdt(self, wanted: pb.LinuxRdt, plugin: str) -> None:
        collected = self.adjust.linux.rdt
        if wanted.remove:
            for field in _RDT_FIELDS.values():
                self.owners.clear(self.container.id, field, plugin)
            collected.Clear()
            collected.remove = True
        for name, field in _RDT_FIELDS.items():
            if wanted.HasField(name):
                self.owners.claim(self.container.id, field, plugin)
                getattr(collected, name).CopyFrom(getattr(wanted, name))


def _drop(repeated: Any, unwanted: Callable[[Any], bool]) -> None:
    """Remove elements of a repeated field (or a list) in place."""
    kept = [one for one in repeated if not unwanted(one)]
    del repeated[:]
    repeated.extend(kept)


def _drop_type(namespaces: Any, type_: str) -> None:
    _drop(namespaces, lambda one: one.type == type_)


# -- resources --------------------------------------------------------------------------------------------


def claim_resources(owners: Owners, container_id: str, wanted: pb.LinuxResources, plugin: str) -> None:
    """Claim every limit that is set. Raises Conflict."""
    for part, fields in ((wanted.memory, _MEMORY_FIELDS), (wanted.cpu, _CPU_FIELDS), (wanted, _CLASS_FIELDS)):
        for name, field in fields.items():
            if part.HasField(name):
                owners.claim(container_id, field, plugin)
    for name, field in _CPUSET_FIELDS.items():
        if getattr(wanted.cpu, name):
            owners.claim(container_id, field, plugin)
    if wanted.HasField("pids"):
        owners.claim(container_id, pb.PidsLimit, plugin)
    for page in wanted.hugepage_limits:
        owners.claim(container_id, pb.HugepageLimits, plugin, page.page_size)
    for key in wanted.unified:
        owners.claim(container_id, pb.CgroupsUnified, plugin, key)


def put_resources(target: pb.LinuxResources, wanted: pb.LinuxResources) -> None:
    """Put limits over others; what is not set stays."""
    merged = resources.to_interface(resources.merge(resources.to_oci(target), resources.to_oci(wanted)))
    for name in _CLASS_FIELDS:
        source = wanted if wanted.HasField(name) else target
        if source.HasField(name):
            getattr(merged, name).CopyFrom(getattr(source, name))
    target.CopyFrom(merged)
