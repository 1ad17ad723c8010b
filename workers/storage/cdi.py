"""Runs in: children of storage.

Container Device Interface: which devices the files in the specification directories describe, and what each
of them changes of a container (SPEC.md of cncf-tags/container-device-interface, versions 0.3.0 to 1.0.0).

Files are read when a container asks for a device, so what stands there is what counts, and no other container
pays for it. A directory named later overrides one named earlier; two files of one directory that describe the
same device make it ambiguous. Refuses unknown fields (a part that is not understood is not applied by halves)
and other versions: such a file is skipped with a line in the log, and named when a device is missing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ipc import log, yamlfiles
from ipc.errors import invalid, precondition
from ipc.messages.storage import CdiEdits, CdiMount, CdiNode, Hook

from .hookfiles import STAGES, checked_hook
from .mounts import Progress
from .textfiles import read_file

VERSIONS = frozenset({"0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0"})
MAX_FILE = 4 * 1024 * 1024
MAX_DEVICES = 1024

_PART = r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
_KIND = re.compile(rf"{_PART}/[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_NODE_TYPES = {"b": "b", "c": "c", "u": "c", "p": "p"}
_FILE_TYPES = {stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p"}


class _Strict(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    pass


class _Node(_Strict):
    path: str
    host_path: str = ""
    type: str = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None


class _Mount(_Strict):
    host_path: str
    container_path: str
    options: list[str] | None = None
    type: str = ""


class _Hook(_Strict):
    hook_name: str
    path: str
    args: list[str] | None = None
    env: list[str] | None = None
    timeout: int | None = None


class _Rdt(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    closID: str = ""
    l3CacheSchema: str = ""
    memBwSchema: str = ""
    enableCMT: bool = False
    enableMBM: bool = False


class _Edits(_Strict):
    env: list[str] | None = None
    device_nodes: list[_Node] | None = None
    mounts: list[_Mount] | None = None
    hooks: list[_Hook] | None = None
    intel_rdt: _Rdt | None = None
    additional_gids: list[int] | None = msgspec.field(default=None, name="additionalGids")


class _Device(_Strict):
    name: str
    container_edits: _Edits
    annotations: dict[str, str] | None = None


class _File(_Strict):
    cdi_version: str
    kind: str
    devices: list[_Device]
    annotations: dict[str, str] | None = None
    container_edits: _Edits | None = None


_DECODER = msgspec.json.Decoder(_File)


@dataclass
class _Found:
    """A device: the file that describes it, or both of one directory that do."""

    device: _Device
    file: _File
    paths: list[str]


@dataclass
class Registry:
    """What the directories hold."""

    devices: dict[str, _Found] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def resolve(
    names: list[str], directories: list[str], progress: Progress
) -> tuple[CdiEdits, dict[str, list[Hook]]]:
    """What the devices change, and their hooks by stage. INVALID_ARGUMENT for what is no qualified name,
    FAILED_PRECONDITION for a device that is not described, or is but not there."""
    if not names:
        return CdiEdits(), {}
    if len(names) > MAX_DEVICES:
        raise invalid(f"more than {MAX_DEVICES} CDI devices in one container")
    for name in names:
        _check_name(name)
    registry = read(directories, progress)
    total = _Total(progress)
    for name in dict.fromkeys(names):
        total.add(_device(name, registry, directories))
    return total.edits, total.hooks


def _check_name(name: str) -> None:
    kind, equals, device = name.partition("=")
    if not (equals and _KIND.fullmatch(kind) and _NAME.fullmatch(device)):
        raise invalid(f"CDI device {name!r} is not of the form vendor.com/class=name")


def _device(name: str, registry: Registry, directories: list[str]) -> _Found:
    found = registry.devices.get(name)
    if found is None:
        hint = f"; skipped files: {', '.join(registry.skipped)}" if registry.skipped else ""
        raise precondition(f"CDI device {name!r} is not described in {', '.join(directories)}{hint}")
    if len(found.paths) > 1:
        raise precondition(f"CDI device {name!r} is described twice: {', '.join(found.paths)}")
    return found


# -- files ------------------------------------------------------------------------------------------------


def read(directories: list[str], progress: Progress) -> Registry:
    """Read all specification files."""
    registry = Registry()
    for directory in directories:
        here: dict[str, _Found] = {}
        for path, file in _files(directory, registry, progress):
            for device in file.devices:
                name = f"{file.kind}={device.name}"
                if name in here:
                    here[name].paths.append(path)
                else:
                    here[name] = _Found(device, file, [path])
        registry.devices.update(here)
    return registry


def _files(directory: str, registry: Registry, progress: Progress) -> Iterator[tuple[str, _File]]:
    progress.at(directory)
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        path = os.path.join(directory, name)
        if Path(name).suffix not in {".json", ".yaml", ".yml"}:
            continue
        progress.at(path)
        try:
            yield path, _read(path)
        except (OSError, ValueError) as error:
            registry.skipped.append(path)
            log.get().warning("CDI specification skipped", path=path, why=error)


def _read(path: str) -> _File:
    """One file. Raises OSError, ValueError."""
    if path.endswith(".json"):
        file = _DECODER.decode(read_file(path, MAX_FILE))
    else:
        file = msgspec.convert(yamlfiles.parse(read_file(path, yamlfiles.MAX_YAML)), type=_File)
    if file.cdi_version not in VERSIONS:
        raise ValueError(f"its version {file.cdi_version!r} is none of {', '.join(sorted(VERSIONS))}")
    if not _KIND.fullmatch(file.kind):
        raise ValueError(f"its kind {file.kind!r} is not of the form vendor.com/class")
    _check_devices(file)
    return file


def _check_devices(file: _File) -> None:
    if not file.devices:
        raise ValueError("it describes no device")
    names = [device.name for device in file.devices]
    if bad := [name for name in names if not _NAME.fullmatch(name)]:
        raise ValueError(f"{bad[0]!r} is not the name of a device")
    if len(set(names)) != len(names):
        raise ValueError("it describes a device twice")
    for edits in (file.container_edits, *(device.container_edits for device in file.devices)):
        if edits is not None:
            _check_edits(edits)


def _check_edits(edits: _Edits) -> None:
    for entry in edits.env or []:
        if not entry.partition("=")[0] or "=" not in entry or "\0" in entry:
            raise ValueError(f"{entry!r} is not of the form NAME=VALUE")
    for node in edits.device_nodes or []:
        _check_node(node)
    for mount in edits.mounts or []:
        for path in (mount.container_path, mount.host_path):
            if not path or "\0" in path:
                raise ValueError("a mount has no path")
    for hook in edits.hooks or []:
        if hook.hook_name not in STAGES:
            raise ValueError(f"{hook.hook_name!r} is not a stage of hooks")
        checked_hook(hook.path, hook.args, hook.env, hook.timeout)


def _check_node(node: _Node) -> None:
    if not node.path.startswith("/"):
        raise ValueError(f"device node {node.path!r} is no absolute path")
    if node.type and node.type not in _NODE_TYPES:
        raise ValueError(f"device node {node.path!r} has the unknown type {node.type!r}")
    if set(node.permissions) - set("rwm"):
        raise ValueError(f"device node {node.path!r} has the permissions {node.permissions!r}")


# -- edits ------------------------------------------------------------------------------------------------


class _Total:
    """The edits of all devices of one container. Those of a whole file come once, before its devices'."""

    def __init__(self, progress: Progress) -> None:
        self.edits = CdiEdits()
        self.hooks: dict[str, list[Hook]] = {}
        self._progress = progress
        self._files: set[int] = set()

    def add(self, found: _Found) -> None:
        """Add one device."""
        if id(found.file) not in self._files and found.file.container_edits is not None:
            self._add(found.file.container_edits)
        self._files.add(id(found.file))
        self._add(found.device.container_edits)

    def _add(self, edits: _Edits) -> None:
        self.edits.env += edits.env or []
        self.edits.nodes += [self._node(node) for node in edits.device_nodes or []]
        self.edits.mounts += [_mount(mount) for mount in edits.mounts or []]
        # 0 would say "root's group" to a process that is not root's: the specification leaves it out
        self.edits.additional_gids += [gid for gid in edits.additional_gids or [] if gid > 0]
        if edits.intel_rdt is not None:
            self.edits.intel_rdt = self.edits.intel_rdt | msgspec.to_builtins(edits.intel_rdt)
        for hook in edits.hooks or []:
            made = checked_hook(hook.path, hook.args, hook.env, hook.timeout)
            self.hooks.setdefault(hook.hook_name, []).append(made)

    def _node(self, node: _Node) -> CdiNode:
        kind, major, minor = self._numbers(node)
        return CdiNode(
            path=node.path,
            type=kind,
            major=major,
            minor=minor,
            permissions="" if kind == "p" else (node.permissions or "rwm"),
            mode=node.file_mode,
            uid=node.uid,
            gid=node.gid,
        )

    def _numbers(self, node: _Node) -> tuple[str, int, int]:
        """Type and number: as they are described, else the host's."""
        kind = _NODE_TYPES.get(node.type, "")
        if kind and (kind == "p" or node.major or node.minor):
            return kind, node.major, node.minor
        path = node.host_path or node.path
        self._progress.at(path)
        try:
            status = os.stat(path)
        except OSError as error:
            raise precondition(f"CDI: device node {path!r}: {error.strerror}") from error
        real = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "")
        if not real or kind not in {"", real}:
            raise precondition(f"CDI: {path!r} is not a device node of type {node.type or 'b, c or p'}")
        return real, os.major(status.st_rdev), os.minor(status.st_rdev)


def _mount(mount: _Mount) -> CdiMount:
    options = list(mount.options or [])
    if not mount.type and not {"bind", "rbind"} & set(options):
        options.insert(0, "rbind")
    return CdiMount(
        destination=mount.container_path,
        source=mount.host_path,
        type=mount.type or "bind",
        options=options,
    )
