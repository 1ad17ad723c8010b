"""Runs in: cri. What CRI says of user namespaces.

Owns the reading of UserNamespace and of the mappings of mounts: a pod has one namespace for all its
containers, with one range of uids and one of gids, from the container's id 0 on, without the host's root in
it. Refuses everything else, by the field's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ipc import userns
from ipc.cri import api_pb2
from ipc.errors import invalid
from ipc.messages import IdMapping

_LAST_ID = 2**32 - 2


class Mappings(NamedTuple):
    """A pod's ranges."""

    uids: IdMapping
    gids: IdMapping


def mappings(options: api_pb2.NamespaceOption) -> Mappings | None:
    """The ranges of a pod with a user namespace, None without one. Raises RemoteError(INVALID_ARGUMENT)."""
    asked = options.userns_options
    if not options.HasField("userns_options"):
        return None
    if asked.mode == api_pb2.NODE:
        if asked.uids or asked.gids:
            raise invalid("userns_options: mode NODE is without a user namespace, so it has no mappings")
        return None
    if asked.mode != api_pb2.POD:
        raise invalid("userns_options.mode must be POD or NODE")
    for name in ("pid", "ipc"):
        if getattr(options, name) == api_pb2.NODE:
            raise invalid(f"namespace_options.{name} NODE cannot be had with a user namespace")
    return Mappings(_one("uids", asked.uids), _one("gids", asked.gids))


def of_pod(config: api_pb2.PodSandboxConfig) -> Mappings | None:
    """The ranges of a pod sandbox."""
    return mappings(config.linux.security_context.namespace_options)


def check_container(config: api_pb2.ContainerConfig, sandbox: api_pb2.PodSandboxConfig) -> None:
    """A container is in its pod's user namespace, and so are the ids of its mounts."""
    pods = of_pod(sandbox)
    own = config.linux.security_context.namespace_options
    if own.HasField("userns_options") and mappings(own) != pods:
        raise invalid("userns_options: a container has those of its pod sandbox")
    if pods and config.linux.security_context.HasField("namespace_options"):
        for name in ("pid", "ipc"):
            if getattr(own, name) == api_pb2.NODE:
                raise invalid(f"namespace_options.{name} NODE cannot be had with a user namespace")
    for mount in config.mounts:
        mapped(mount, pods)


def mapped(mount: api_pb2.Mount, pods: Mappings | None) -> bool:
    """Whether a mount's ids are mapped. INVALID_ARGUMENT for other ranges than the pod's."""
    if not mount.uidMappings and not mount.gidMappings:
        return False
    if pods is None:
        raise invalid(f"mounts: {mount.container_path!r}: mappings need a pod with a user namespace")
    asked = (_ranges(mount.uidMappings), _ranges(mount.gidMappings))
    if asked != ([pods.uids], [pods.gids]):
        raise invalid(f"mounts: {mount.container_path!r}: uidMappings and gidMappings must be the pod's own")
    return True


def _one(what: str, asked: Sequence[api_pb2.IDMapping]) -> IdMapping:
    if len(asked) != 1:
        raise invalid(f"userns_options.{what}: exactly one mapping is needed, there are {len(asked)}")
    (found,) = _ranges(asked)
    if found.container_id != 0:
        raise invalid(f"userns_options.{what}: container_id must be 0, not {found.container_id}")
    if found.host_id == 0 or found.length == 0 or found.host_id + found.length - 1 > _LAST_ID:
        raise invalid(
            f"userns_options.{what}: {found.length} ids from host id {found.host_id} on are no range"
        )
    return found


def _ranges(asked: Iterable[api_pb2.IDMapping]) -> list[IdMapping]:
    return [IdMapping(container_id=m.container_id, host_id=m.host_id, length=m.length) for m in asked]


def stdio_owner(config: api_pb2.PodSandboxConfig, uid: int, gid: int) -> tuple[int, int]:
    """The host's ids of a container's user. Raises RemoteError(INVALID_ARGUMENT) if they have none."""
    pods = of_pod(config)
    if pods is None:
        return uid, gid
    try:
        return userns.on_host([pods.uids], uid), userns.on_host([pods.gids], gid)
    except LookupError as error:
        raise invalid(f"id {error} is not in the pod's user namespace") from None


def oci(found: IdMapping) -> dict[str, int]:
    """The runtime-spec's spelling."""
    return {"containerID": found.container_id, "hostID": found.host_id, "size": found.length}
