"""Runs in: cri. What the builder is given, and what it gives back.

Everything that must be looked up (users, mount sources, devices, namespaces, features of node and runtime)
was looked up by the process that may do so and stands here as data. Owns nothing, refuses nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ipc.cri import api_pb2
from ipc.messages.storage import ContainerRootfs, PodFiles
from ipc.messages.supervisor import HostInfo, RuntimeInfo
from ipc.settings import CriSettings


def _machine() -> str:
    return os.uname().machine


@dataclass(frozen=True, kw_only=True)
class SpecInputs:
    """One container to be: the request, and the facts about it."""

    container_id: str
    pod_id: str
    config: api_pb2.ContainerConfig
    sandbox: api_pb2.PodSandboxConfig
    #: the image's config JSON, as the registry had it (not to be trusted)
    image_config: bytes
    image_id: str
    #: storage's answer to the request that `request.container_create` made
    rootfs: ContainerRootfs
    pod_files: PodFiles
    #: what runtimes with a sandbox of their own know the pod by: the id of its sandbox container, if any
    sandbox_id: str = ""
    #: this is the pod's sandbox container itself
    is_sandbox: bool = False
    #: the pod's effective host name (`pod.hostname`)
    hostname: str
    #: pinned namespaces by name: "net", "ipc", "uts", "pid"; what is missing is the host's
    namespaces: Mapping[str, str]
    #: PID namespace of the container that namespace_options.target_id names, "" without
    target_pid_namespace: str = ""
    host: HostInfo
    runtime: RuntimeInfo
    settings: CriSettings
    #: name of the AppArmor profile that stands for RuntimeDefault; storage has looked whether it is loaded
    apparmor_default: str = ""
    machine: str = field(default_factory=_machine)


@dataclass(frozen=True, kw_only=True)
class Built:
    """The runtime specification and what goes with it to the monitor."""

    spec: bytes
    #: the container's cgroup relative to each hierarchy, with a leading slash
    cgroup_path: str
    systemd_cgroup: bool
    #: name of the signal that StopContainer sends first: "SIGTERM", "SIGRTMIN+3"
    stop_signal: str
    #: what this node could not give, a sentence each, for the log
    degraded: tuple[str, ...] = ()
