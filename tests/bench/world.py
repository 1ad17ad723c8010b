"""Runs in: `make bench`. Pods through the CRI socket, and a root file system for those who work by hand."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ipc.cri import api_pb2 as cri
from ipc.cri import api_pb2_grpc
from tests.support.daemon import CGROUPS, Node
from tests.support.monitor_process import busybox_root
from tests.support.registry import Image, make_image, make_layer


class Served(Protocol):
    """A node, Bulkhead's or another runtime's."""

    logs: Path

    @property
    def runtime(self) -> api_pb2_grpc.RuntimeServiceStub: ...


class Pods:
    """Ordinary pods with a network of their own, of one image; `parent` is their cgroup parent."""

    def __init__(self, node: Served, image: str, *, handler: str = "", parent: str = "") -> None:
        self._node = node
        self._image = image
        self._handler = handler
        self._parent = parent

    @property
    def runtime(self) -> api_pb2_grpc.RuntimeServiceStub:
        """RuntimeService."""
        return self._node.runtime

    def config(self, name: str) -> cri.PodSandboxConfig:
        """A pod's configuration."""
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, namespace="bench", uid=f"uid-{name}"),
            hostname=name[:60],
            log_directory=str(self._node.logs / name),
            linux=cri.LinuxPodSandboxConfig(
                cgroup_parent=self._parent,
                security_context=cri.LinuxSandboxSecurityContext(
                    namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)
                ),
            ),
        )

    def run(self, name: str) -> str:
        """RunPodSandbox."""
        request = cri.RunPodSandboxRequest(config=self.config(name), runtime_handler=self._handler)
        return self._node.runtime.RunPodSandbox(request, timeout=60).pod_sandbox_id

    def create(self, pod: str, pod_name: str, command: list[str], name: str = "main") -> str:
        """CreateContainer."""
        security = cri.LinuxContainerSecurityContext(namespace_options=cri.NamespaceOption(pid=cri.CONTAINER))
        request = cri.CreateContainerRequest(
            pod_sandbox_id=pod,
            config=cri.ContainerConfig(
                metadata=cri.ContainerMetadata(name=name),
                image=cri.ImageSpec(image=self._image),
                command=command,
                log_path=f"{name}.log",
                linux=cri.LinuxContainerConfig(
                    security_context=security,
                    resources=cri.LinuxContainerResources(cpu_shares=512, memory_limit_in_bytes=512 << 20),
                ),
            ),
            sandbox_config=self.config(pod_name),
        )
        return self._node.runtime.CreateContainer(request, timeout=60).container_id

    def start(self, container: str) -> None:
        """StartContainer."""
        self._node.runtime.StartContainer(cri.StartContainerRequest(container_id=container), timeout=60)

    def execute(self, container: str, *command: str) -> None:
        """ExecSync."""
        request = cri.ExecSyncRequest(container_id=container, cmd=command, timeout=60)
        answer = self._node.runtime.ExecSync(request, timeout=70)
        assert answer.exit_code == 0, answer

    def stop_container(self, container: str, grace: int) -> None:
        """StopContainer."""
        request = cri.StopContainerRequest(container_id=container, timeout=grace)
        self._node.runtime.StopContainer(request, timeout=60 + grace)

    def remove_container(self, container: str) -> None:
        """RemoveContainer."""
        self._node.runtime.RemoveContainer(cri.RemoveContainerRequest(container_id=container), timeout=60)

    def stop(self, pod: str) -> None:
        """StopPodSandbox."""
        self._node.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=60)

    def remove_stopped(self, pod: str) -> None:
        """RemovePodSandbox."""
        self._node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=60)

    def remove(self, pod: str) -> None:
        """StopPodSandbox and RemovePodSandbox."""
        self.stop(pod)
        self.remove_stopped(pod)


def spec_of(node: Node, container: str) -> dict[str, Any]:
    """The config.json that the OCI runtime got."""
    bundle = node.run_root / "monitors" / container / "bundle"
    spec: dict[str, Any] = json.loads((bundle / "config.json").read_bytes())
    return spec


def pause_image() -> Image:
    """What other runtimes run in each pod: a process that waits."""
    files = {"bin/busybox": Path("/bin/busybox").read_bytes()}
    return make_image([make_layer(files, mode=0o755)], config={"Cmd": ["/bin/busybox", "sleep", "1000000"]})


@contextmanager
def bench_cgroup(parent: str) -> Iterator[None]:
    """A cgroup parent for whoever makes containers; it goes with the context, in every hierarchy."""
    try:
        yield
    finally:
        for path in CGROUPS.glob(f"*{parent}"):
            if (path / "cgroup.procs").exists():
                for below in path.iterdir():
                    if below.is_dir():
                        os.rmdir(below)
                os.rmdir(path)


@contextmanager
def image_root(base: Path) -> Iterator[Path]:
    """A mounted overlay of busybox, as a container's root file system is one."""
    lower = busybox_root(base / "lower")
    for name in ("upper", "work", "merged"):
        (base / name).mkdir()
    options = f"lowerdir={lower},upperdir={base}/upper,workdir={base}/work"
    merged = base / "merged"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True)
    try:
        yield merged
    finally:
        subprocess.run(["umount", "-l", str(merged)], check=True)
