"""Runs in: nri. Sans-IO: which plugin changed which field of which container, and that no two do.

A field belongs to the plugin that set it first. A plugin that wants a field of another one must remove it
first; from then on it is its own. The record is the interface's own (OwningPlugins), for validators.
"""

from __future__ import annotations

from ipc.nri import nri_pb2 as pb

REMOVED = "-"


class Conflict(Exception):
    """Two plugins want the same field."""


def unmarked(key: str) -> str:
    """The key of something that is to be set or removed."""
    return key.removeprefix(REMOVED)


def is_marked(key: str) -> bool:
    """Whether it is to be removed."""
    return key.startswith(REMOVED)


class Owners:
    """Owners of the fields of containers, for one event."""

    def __init__(self) -> None:
        self.record = pb.OwningPlugins()

    def claim(self, container_id: str, field: pb.Field, plugin: str, key: str = "") -> None:
        """The plugin sets a field, or one entry of it. Raises Conflict."""
        owners = self.record.owners[container_id]
        if key:
            entries = owners.compound[field].owners
            _check(entries.get(key, ""), plugin, f"{pb.Field.Name(field)} {key!r}")
            entries[key] = plugin
        else:
            _check(owners.simple.get(field, ""), plugin, pb.Field.Name(field))
            owners.simple[field] = plugin

    def clear(self, container_id: str, field: pb.Field, plugin: str, key: str = "") -> None:
        """The plugin removes a field, or one entry of it, whoever set it."""
        owners = self.record.owners[container_id]
        if key:
            owners.compound[field].owners[key] = REMOVED + plugin
        else:
            owners.simple[field] = REMOVED + plugin

    def share(self, container_id: str, field: pb.Field, plugin: str) -> None:
        """The plugin adds to a field that everybody may add to (hooks)."""
        simple = self.record.owners[container_id].simple
        names = [name for name in simple.get(field, "").split(",") if name]
        simple[field] = ",".join(dict.fromkeys([*names, plugin]))

    def of(self, container_id: str, field: pb.Field) -> str:
        """Who owns a field that is one, "" for nobody."""
        return self.record.owners[container_id].simple.get(field, "")

    def entries(self, container_id: str, field: pb.Field) -> dict[str, str]:
        """Who owns which entry."""
        return dict(self.record.owners[container_id].compound[field].owners)


def _check(owner: str, plugin: str, what: str) -> None:
    """A plugin may set again what it has removed, but not what it has set: that would be a contradiction."""
    if owner and owner != REMOVED + plugin:
        raise Conflict(f"plugins {unmarked(owner)!r} and {plugin!r} both tried to set {what}")
