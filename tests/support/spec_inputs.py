"""Runs in: the tests.

SpecInputs for a container that asks for nothing special; tests change what they are about with
`dataclasses.replace` or the keywords of `inputs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from ipc.capabilities import NAMES
from ipc.cri import api_pb2
from ipc.messages.storage import ContainerRootfs, DeviceInfo, MountSourceInfo, PodFiles
from ipc.messages.supervisor import HostInfo, RuntimeInfo
from ipc.settings import CriSettings
from workers.cri.spec import Built, SpecInputs, build

CONTAINER_ID = "c" * 64
POD_ID = "d" * 64
PINNED = {name: f"/run/bulkhead/ns/{POD_ID}/{name}" for name in ("net", "ipc", "uts", "pid")}


def host(**changes: Any) -> HostInfo:
    """A node with everything."""
    facts: dict[str, Any] = {
        "cgroup_version": 2,
        "cgroup_driver": "cgroupfs",
        "cgroup_controllers": ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"],
        "runtimes": [],
        "kernel": "6.1.0",
        "boot_id": "b",
        "seccomp": True,
        "apparmor": False,
        "selinux": False,
        "swap": True,
        "oom_score_floor": -1000,
        "capabilities": [f"CAP_{name}" for name in NAMES],
        "degraded": [],
    }
    return HostInfo(**(facts | changes))


def runtime(**changes: Any) -> RuntimeInfo:
    return RuntimeInfo(**({"name": "crun", "path": "/usr/bin/crun"} | changes))


def settings(**changes: Any) -> CriSettings:
    return CriSettings(**({"root": "/var/lib/bulkhead", "run_root": "/run/bulkhead"} | changes))


def rootfs(**changes: Any) -> ContainerRootfs:
    facts: dict[str, Any] = {"rootfs": "/rootfs", "uid": 0, "gid": 0, "additional_gids": [], "home": "/root"}
    return ContainerRootfs(**(facts | changes))


def pod_files() -> PodFiles:
    base = f"/run/bulkhead/pods/{POD_ID}"
    return PodFiles(
        directory=base,
        shm=f"{base}/shm",
        resolv_conf=f"{base}/resolv.conf",
        hostname=f"{base}/hostname",
        hosts=f"{base}/hosts",
    )


def image_config(**fields: Any) -> bytes:
    """An image's config; fields in its own spelling (Entrypoint, Cmd, Env, ...)."""
    return json.dumps({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]} | fields}).encode()


def container(
    security: api_pb2.LinuxContainerSecurityContext | None = None,
    resources: api_pb2.LinuxContainerResources | None = None,
    **fields: Any,
) -> api_pb2.ContainerConfig:
    linux = api_pb2.LinuxContainerConfig(security_context=security, resources=resources)
    metadata = fields.pop("metadata", None) or api_pb2.ContainerMetadata(name="main")
    return api_pb2.ContainerConfig(metadata=metadata, linux=linux, **fields)


def sandbox(
    security: api_pb2.LinuxSandboxSecurityContext | None = None,
    *,
    cgroup_parent: str = "/pods/pod1",
    sysctls: Mapping[str, str] | None = None,
    **fields: Any,
) -> api_pb2.PodSandboxConfig:
    linux = api_pb2.LinuxPodSandboxConfig(
        cgroup_parent=cgroup_parent, security_context=security, sysctls=dict(sysctls or {})
    )
    metadata = fields.pop("metadata", None) or api_pb2.PodSandboxMetadata(
        name="pod", namespace="ns", uid="u1"
    )
    return api_pb2.PodSandboxConfig(metadata=metadata, linux=linux, **fields)


def privileged_sandbox(**fields: Any) -> api_pb2.PodSandboxConfig:
    return sandbox(api_pb2.LinuxSandboxSecurityContext(privileged=True), **fields)


def inputs(config: api_pb2.ContainerConfig | None = None, **changes: Any) -> SpecInputs:
    """A plain container; keywords replace fields of SpecInputs."""
    fields: dict[str, Any] = {
        "container_id": CONTAINER_ID,
        "pod_id": POD_ID,
        "config": config or container(),
        "sandbox": sandbox(),
        "image_config": image_config(),
        "image_id": "sha256:" + "a" * 64,
        "rootfs": rootfs(),
        "pod_files": pod_files(),
        "hostname": "pod-host",
        "namespaces": PINNED,
        "host": host(),
        "runtime": runtime(),
        "settings": settings(),
        "machine": "x86_64",
    }
    return SpecInputs(**(fields | changes))


def built(config: api_pb2.ContainerConfig | None = None, **changes: Any) -> Built:
    return build(inputs(config, **changes))


def spec(config: api_pb2.ContainerConfig | None = None, **changes: Any) -> dict[str, Any]:
    """The spec, decoded."""
    decoded: dict[str, Any] = msgspec.json.decode(built(config, **changes).spec)
    return decoded


def source(path: str, **changes: Any) -> MountSourceInfo:
    return MountSourceInfo(**({"path": path} | changes))


def device(requested: str, major: int, minor: int, **changes: Any) -> DeviceInfo:
    fields: dict[str, Any] = {"requested": requested, "type": "c", "major": major, "minor": minor}
    return DeviceInfo(**(fields | changes))
