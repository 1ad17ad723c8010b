"""Runs in: the tests.

A kubelet, more or less: what a test asks of a whole daemon (tests/support/daemon.py) through its CRI socket.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from tests.support.daemon import Node, wait_for
from tests.support.images import Served

SHELL = ["/bin/sh", "-c"]


@dataclass
class Client:
    """A kubelet, more or less."""

    node: Node
    images: Served
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def pull(self) -> None:
        """Pull the image that containers are made of."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=self.images.busybox))
        self.node.images.PullImage(request, timeout=60)

    def pod_config(self, *, shared_pid: bool = False, **fields: Any) -> pb.PodSandboxConfig:
        name = f"pod-{next(self.numbers)}"
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, namespace="tests", uid=f"uid-{name}"),
            log_directory=str(self.node.logs / name),
            **fields,
        )
        options = config.linux.security_context.namespace_options
        options.pid = pb.NamespaceMode.POD if shared_pid else pb.NamespaceMode.CONTAINER
        return config

    def run(self, config: pb.PodSandboxConfig, handler: str = "") -> str:
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return self.node.runtime.RunPodSandbox(request, timeout=60).pod_sandbox_id

    def pod_status(self, pod_id: str) -> Any:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
        return self.node.runtime.PodSandboxStatus(request, timeout=10).status

    def container_config(self, command: list[str], **fields: Any) -> pb.ContainerConfig:
        name = f"c-{next(self.numbers)}"
        return pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=self.images.busybox),
            command=command,
            log_path=f"{name}.log",
            **fields,
        )

    def create(self, pod_id: str, sandbox: pb.PodSandboxConfig, config: pb.ContainerConfig) -> str:
        if not config.linux.security_context.HasField("namespace_options"):
            options = sandbox.linux.security_context.namespace_options
            config.linux.security_context.namespace_options.CopyFrom(options)
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=sandbox)
        return self.node.runtime.CreateContainer(request, timeout=60).container_id

    def start(self, container_id: str) -> None:
        self.node.runtime.StartContainer(pb.StartContainerRequest(container_id=container_id), timeout=60)

    def stop(self, container_id: str, grace: int = 0) -> None:
        request = pb.StopContainerRequest(container_id=container_id, timeout=grace)
        self.node.runtime.StopContainer(request, timeout=60)

    def status(self, container_id: str, *, verbose: bool = False) -> Any:
        request = pb.ContainerStatusRequest(container_id=container_id, verbose=verbose)
        answer = self.node.runtime.ContainerStatus(request, timeout=10)
        return answer if verbose else answer.status

    def ended(self, container_id: str, seconds: float = 20.0) -> Any:
        """Wait for a container's end, return its status."""
        exited = pb.ContainerState.CONTAINER_EXITED
        wait_for(lambda: self.status(container_id).state == exited, "the container ends", seconds)
        return self.status(container_id)

    def execute(self, container_id: str, *command: str, timeout: int = 20) -> Any:
        request = pb.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout)
        return self.node.runtime.ExecSync(request, timeout=60)

    def remove(self, container_id: str) -> None:
        self.node.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container_id), timeout=60)

    def remove_pod(self, pod_id: str) -> None:
        self.node.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id), timeout=60)
        self.node.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id), timeout=60)

    def log(self, container_id: str) -> list[str]:
        """The messages of a container's log; what came in parts (a terminal writes "\\r" first) is joined."""
        messages, begun = [], b""
        for line in Path(self.status(container_id).log_path).read_bytes().splitlines():
            _time, _stream, tag, part = line.split(b" ", 3)
            begun += part
            if tag == b"F":
                messages.append(begun.decode().removesuffix("\r"))
                begun = b""
        return messages

    def output(self, container_id: str, script: str) -> str:
        """What a shell script in a container prints; it must succeed."""
        done = self.execute(container_id, *SHELL, script)
        assert done.exit_code == 0, (done.stdout, done.stderr)
        text: str = done.stdout.decode()
        return text

    def running(self, *command: str, handler: str = "", **fields: Any) -> tuple[str, str]:
        """A pod with one running container."""
        sandbox = self.pod_config(**fields)
        pod_id = self.run(sandbox, handler)
        config = self.container_config(list(command) or ["sleep", "1000"])
        container_id = self.create(pod_id, sandbox, config)
        self.start(container_id)
        return pod_id, container_id


def code_of(step: Any, *arguments: Any, **options: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        step(*arguments, **options)
    assert isinstance(caught.value, grpc.Call)
    code: grpc.StatusCode = caught.value.code()
    return code
