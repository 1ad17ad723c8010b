"""Runs in: cri. The `mounts` of the OCI runtime-spec.

Owns the default mounts, the pod's files, and what a CRI mount means: order, propagation, flags. Refuses a
propagation that the source cannot have, recursive read-only where the runtime cannot, and unknown options.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError, internal, invalid, precondition
from ipc.messages.storage import MountSourceInfo

from . import security, userns, validate
from .inputs import SpecInputs
from .notes import Notes
from .words import words

Mount = dict[str, Any]

#: CRI propagation -> mount option of the runtime-spec
PROPAGATION = {
    api_pb2.PROPAGATION_PRIVATE: "rprivate",
    api_pb2.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    api_pb2.PROPAGATION_BIDIRECTIONAL: "rshared",
}
#: the same in storage's words
STORAGE_PROPAGATION = {"rprivate": "private", "rslave": "host-to-container", "rshared": "bidirectional"}

#: What a request may put into mount_options. rw is none of them: `readonly` decides that.
OPTIONS = frozenset(
    words(
        "nosuid suid nodev dev noexec exec noatime atime nodiratime diratime relatime norelatime strictatime"
    )
)

#: What is mounted before everything else.
KERNEL_DESTINATIONS = frozenset(words("/proc /dev /dev/pts /dev/mqueue /sys /sys/fs/cgroup"))
_KERNEL_FLAGS = ["nosuid", "noexec", "nodev"]
_POD_FILE_OPTIONS = ["rbind", "rprivate", "nosuid", "nodev", "noexec"]


def mounts(inputs: SpecInputs, notes: Notes) -> list[Mount]:
    """All mounts in the order they must be made: defaults, then by depth of their destination."""
    requested = _requested(inputs, notes)
    taken = {mount["destination"] for mount in requested}
    defaults = [mount for mount in _kernel_mounts(inputs) if not _covered(mount["destination"], taken)]
    files = [mount for mount in _pod_mounts(inputs) if mount["destination"] not in taken]
    return defaults + sorted(files + requested, key=_depth)


def in_order(mounts: list[Mount]) -> list[Mount]:
    """Mounts to which some were added: those of the kernel stay first, the others come by depth."""
    first = [mount for mount in mounts if mount["destination"] in KERNEL_DESTINATIONS]
    return first + sorted((mount for mount in mounts if mount not in first), key=_depth)


def rootfs_propagation(config: api_pb2.ContainerConfig) -> str:
    """What the root must be for the strongest propagation of a mount to work (mount_namespaces(7))."""
    wanted = {propagation(mount) for mount in config.mounts}
    return next((mode for mode in ("rshared", "rslave") if mode in wanted), "rprivate")


def propagation(mount: api_pb2.Mount) -> str:
    """The runtime-spec's word for it."""
    if mount.propagation not in PROPAGATION:
        raise invalid(f"mounts: {mount.propagation} is no propagation")
    return PROPAGATION[mount.propagation]


def _depth(mount: Mount) -> int:
    # sorting is stable: of two mounts at one depth the first asked for is made first
    return len([part for part in mount["destination"].split("/") if part])


def _covered(destination: str, taken: Iterable[str]) -> bool:
    """Whether a requested mount stands there or above: who mounts the host's /dev wants no /dev/pts on it."""
    return any(destination == path or destination.startswith(f"{path}/") for path in taken)


def _kernel_mounts(inputs: SpecInputs) -> list[Mount]:
    access = "rw" if inputs.config.linux.security_context.privileged else "ro"
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
    devices = ["nosuid", "strictatime", "mode=755", "size=65536k"]
    return [
        _mount("/proc", "proc", "proc", _KERNEL_FLAGS),
        _mount("/dev", "tmpfs", "tmpfs", devices),
        _mount("/dev/pts", "devpts", "devpts", terminals),
        _mount("/dev/mqueue", "mqueue", "mqueue", _KERNEL_FLAGS),
        _sysfs(inputs, access),
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*_KERNEL_FLAGS, "relatime", access]),
    ]


def _sysfs(inputs: SpecInputs, access: str) -> Mount:
    """sysfs is of a network namespace: the host's cannot be mounted anew by a user namespace's root."""
    if userns.of_pod(inputs.sandbox) and namespace_options(inputs).network == api_pb2.NODE:
        return _mount("/sys", "bind", "/sys", ["rbind", "rslave", *_KERNEL_FLAGS, access])
    return _mount("/sys", "sysfs", "sysfs", [*_KERNEL_FLAGS, access])


def _mount(destination: str, kind: str, source: str, options: list[str]) -> Mount:
    return {"destination": destination, "type": kind, "source": source, "options": options}


def _pod_mounts(inputs: SpecInputs) -> list[Mount]:
    access = "ro" if inputs.config.linux.security_context.readonly_rootfs else "rw"
    files = inputs.pod_files
    paths = {
        "/etc/resolv.conf": files.resolv_conf,
        "/etc/hostname": files.hostname,
        "/etc/hosts": files.hosts,
    }
    binds = [
        _mount(destination, "bind", source, [*_POD_FILE_OPTIONS, access])
        for destination, source in paths.items()
        if source
    ]
    return [*binds, _shared_memory(inputs)]


def _shared_memory(inputs: SpecInputs) -> Mount:
    """The pod's tmpfs; a container with an IPC namespace of its own has its own, on host IPC the host's."""
    options = namespace_options(inputs)
    if options.ipc == api_pb2.CONTAINER:
        return _mount("/dev/shm", "tmpfs", "shm", [*_KERNEL_FLAGS, "mode=1777", "size=65536k"])  # noqa: S108 - a mount point
    source = inputs.pod_files.shm if options.ipc != api_pb2.NODE else ""
    return _mount("/dev/shm", "bind", source or "/dev/shm", [*_POD_FILE_OPTIONS, "rw"])  # noqa: S108 - a mount point


def namespace_options(inputs: SpecInputs) -> api_pb2.NamespaceOption:
    """The container's own options; the sandbox's where the container has none."""
    own = inputs.config.linux.security_context
    if own.HasField("namespace_options"):
        return own.namespace_options
    return inputs.sandbox.linux.security_context.namespace_options


def _requested(inputs: SpecInputs, notes: Notes) -> list[Mount]:
    asked, found = inputs.config.mounts, inputs.rootfs.mounts
    if len(asked) != len(found):
        raise internal(f"storage answered {len(found)} mount sources, {len(asked)} were asked for")
    return [_bind(mount, source, inputs, notes) for mount, source in zip(asked, found, strict=True)]


def _bind(mount: api_pb2.Mount, source: MountSourceInfo, inputs: SpecInputs, notes: Notes) -> Mount:
    destination = validate.clean_path("mounts.container_path", mount.container_path)
    if destination == "/":
        raise invalid("mounts: nothing can be mounted over the container's root")
    if mount.selinux_relabel and inputs.host.selinux and not security.mount_label(inputs, notes):
        notes.add(f"{destination}: its files keep their SELinux labels, the container has none to give them")
    options = ["rbind", propagation(mount), _access(mount, inputs), *_flags(mount, source)]
    _check_source(mount, source)
    return _mount(destination, "bind", source.path, options)


def _access(mount: api_pb2.Mount, inputs: SpecInputs) -> str:
    if not mount.recursive_read_only:
        return "ro" if mount.readonly else "rw"
    if not mount.readonly:
        raise invalid(f"mounts: {mount.container_path!r}: recursive_read_only needs readonly")
    if mount.propagation != api_pb2.PROPAGATION_PRIVATE:
        raise invalid(f"mounts: {mount.container_path!r}: recursive_read_only needs private propagation")
    if not inputs.runtime.recursive_read_only:
        text = f"runtime handler {inputs.runtime.name!r} cannot mount recursively read-only"
        raise RemoteError(Code.FAILED_PRECONDITION, text, reason="RROUnsupported")
    return "rro"


def _flags(mount: api_pb2.Mount, source: MountSourceInfo) -> list[str]:
    """The source's flags stay (a read-only remount would clear them), then the request's."""
    for option in mount.mount_options:
        if option not in OPTIONS:
            raise invalid(f"mount_options: {option!r} is not one of {' '.join(sorted(OPTIONS))}")
    kept = [flag for flag in source.locked_flags if flag != "ro" or not mount.readonly]
    return list(dict.fromkeys([*kept, *mount.mount_options]))


def _check_source(mount: api_pb2.Mount, source: MountSourceInfo) -> None:
    if mount.propagation == api_pb2.PROPAGATION_BIDIRECTIONAL and not source.shared:
        raise precondition(f"mounts: {mount.host_path!r} is not on a shared mount, bidirectional needs one")
    to_container = mount.propagation == api_pb2.PROPAGATION_HOST_TO_CONTAINER
    if to_container and not (source.shared or source.slave):
        raise precondition(f"mounts: {mount.host_path!r} is not on a shared or slave mount")
