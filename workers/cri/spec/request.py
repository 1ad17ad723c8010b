"""Runs in: cri. What CreateContainer asks of storage before a spec can be built.

Owns the mapping from the CRI request to `storage.container.create`, so that storage's answer and `build`
speak of the same mounts and devices in the same order. Refuses what `validate.container` refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

from ipc.cri import api_pb2
from ipc.errors import invalid
from ipc.messages import storage

from . import cdi, image, mounts, process, seccomp, userns, validate
from . import security as seclabels


def container_create(
    *,
    container_id: str,
    pod_id: str,
    image_id: str,
    config: api_pb2.ContainerConfig,
    sandbox: api_pb2.PodSandboxConfig,
    image_config: bytes,
    mount_images: Sequence[str] = (),
    apparmor_default: str = "",
    selinux: bool = False,
) -> storage.ContainerCreate:
    """Check the request and make the message. RemoteError says what is wrong with it.

    `mount_images` has the image's id for each mount that is an image volume, "" for the others. `selinux`
    says that the node has it: mounts that are to be relabelled are.
    """
    validate.container(config, sandbox)
    security = config.linux.security_context
    images = mount_images or [""] * len(config.mounts)
    execution = image.execution(image_config)
    mapped = userns.of_pod(sandbox)
    label = seclabels.volume_label(config, sandbox) if selinux else ""
    return storage.ContainerCreate(
        container_id=container_id,
        pod_id=pod_id,
        image_id=image_id,
        user=container_user(security, execution),
        mounts=[
            _mount_source(mount, id_, mapped, label) for mount, id_ in zip(config.mounts, images, strict=True)
        ],
        uid_mappings=[mapped.uids] if mapped else [],
        gid_mappings=[mapped.gids] if mapped else [],
        read_only=security.readonly_rootfs,
        devices=[validate.clean_path("devices.host_path", d.host_path) for d in config.devices],
        all_devices=security.privileged,
        seccomp_profile=seccomp.localhost_path(security),
        cdi_devices=cdi.devices(config),
        hook_facts=hook_facts(config, execution),
        apparmor_profile=seclabels.apparmor_wanted(security, apparmor_default),
        directories=image.volumes(execution),
    )


def hook_facts(config: api_pb2.ContainerConfig, execution: image.Execution) -> storage.HookFacts:
    """What hooks of the node may be chosen by."""
    return storage.HookFacts(
        command=process.arguments(config, execution)[0],
        annotations=dict(config.annotations),
        bind_mounts=bool(config.mounts),
    )


def container_user(
    security: api_pb2.LinuxContainerSecurityContext, execution: image.Execution
) -> storage.ContainerUser:
    """Who the container runs as, unresolved."""
    return storage.ContainerUser(
        uid=security.run_as_user.value if security.HasField("run_as_user") else None,
        gid=security.run_as_group.value if security.HasField("run_as_group") else None,
        name=security.run_as_username,
        image_user=execution.user,
        supplemental=list(security.supplemental_groups),
        strict=security.supplemental_groups_policy == api_pb2.Strict,
    )


def _mount_source(
    mount: api_pb2.Mount, image_id: str, mapped: userns.Mappings | None, label: str
) -> storage.MountSource:
    if image_id:
        return storage.MountSource(path="", image_id=image_id, sub_path=mount.image_sub_path)
    if not mount.host_path:
        raise invalid(f"mounts: {mount.container_path!r} has no host_path")
    return storage.MountSource(
        path=validate.clean_path("mounts.host_path", mount.host_path),
        propagation=mounts.STORAGE_PROPAGATION[mounts.propagation(mount)],
        idmap=userns.mapped(mount, mapped),
        relabel=label if mount.selinux_relabel else "",
    )
