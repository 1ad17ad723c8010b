"""Runs in: the tests.

A client of the whole daemon that makes pods with one container each: what tests of single fields need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import grpc

from ipc.cri import api_pb2 as pb
from tests.support.daemon import Node, wait_for
from tests.support.images import Served

SHELL = ("/bin/sh", "-c")
_NUMBERS = count(1)


@dataclass
class Kubelet:
    """Pods and containers of one node."""

    node: Node
    images: Served
    ids: dict[str, str] = field(default_factory=dict)  # of pulled images, by their short names

    def name(self, image: str) -> str:
        """The full name of a test image."""
        return f"{self.images.address}/test/{image}:1"

    def pull(self, image: str) -> None:
        """Pull a test image."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=self.name(image)))
        self.ids[image] = self.node.images.PullImage(request, timeout=60).image_ref

    def sandbox(self, **fields: Any) -> pb.PodSandboxConfig:
        """A pod with a PID namespace for each container."""
        name = f"field-{next(_NUMBERS)}"
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, namespace="tests", uid=f"uid-{name}"),
            log_directory=str(self.node.logs / name),
            **fields,
        )
        config.linux.security_context.namespace_options.pid = pb.NamespaceMode.CONTAINER
        return config

    def mapped_sandbox(self, host_id: int = 200_000, length: int = 65_536) -> pb.PodSandboxConfig:
        """A pod with a user namespace."""
        config = self.sandbox()
        users = config.linux.security_context.namespace_options.userns_options
        users.mode = pb.NamespaceMode.POD
        for mappings in (users.uids, users.gids):
            mappings.add(host_id=host_id, container_id=0, length=length)
        return config

    def run_pod(self, config: pb.PodSandboxConfig, handler: str = "") -> str:
        """RunPodSandbox."""
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return self.node.runtime.RunPodSandbox(request, timeout=60).pod_sandbox_id

    def created(
        self,
        handler: str = "",
        *command: str,
        image: str = "busybox",
        sandbox: pb.PodSandboxConfig | None = None,
        **fields: Any,
    ) -> str:
        """A pod with one created container; `fields` are of ContainerConfig."""
        pod = sandbox or self.sandbox()
        pod_id = self.run_pod(pod, handler)
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="main"),
            image=pb.ImageSpec(image=self.name(image)),
            command=command or ("sleep", "1000"),
            log_path="main.log",
            **fields,
        )
        context = config.linux.security_context
        if not context.HasField("namespace_options"):
            context.namespace_options.CopyFrom(pod.linux.security_context.namespace_options)
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod)
        return self.node.runtime.CreateContainer(request, timeout=60).container_id

    def running(self, handler: str = "", *command: str, **fields: Any) -> str:
        """As `created`, and started."""
        container_id = self.created(handler, *command, **fields)
        self.node.runtime.StartContainer(pb.StartContainerRequest(container_id=container_id), timeout=60)
        return container_id

    def output(self, handler: str, script: str, **fields: Any) -> str:
        """What a shell script prints as a container's process, which must end with success."""
        container_id = self.running(handler, *SHELL, script, **fields)
        status = self.ended(container_id)
        text = self.log(container_id)
        assert status.exit_code == 0, f"{status.reason}: {text}"
        return text

    def ended(self, container_id: str) -> Any:
        """Wait for a container's end; its status."""
        exited = pb.ContainerState.CONTAINER_EXITED
        wait_for(lambda: self.status(container_id).state == exited, "the container ends")
        return self.status(container_id)

    def log(self, container_id: str) -> str:
        """What a container has printed."""
        path = Path(self.status(container_id).log_path)
        return "".join(f"{line.split(' ', 3)[3]}\n" for line in path.read_text().splitlines())

    def wait_for_log(self, container_id: str, text: str) -> None:
        """Wait until a container has printed a text."""
        wait_for(lambda: text in self.log(container_id), f"the container prints {text!r}")

    def status(self, container_id: str) -> Any:
        """ContainerStatus."""
        request = pb.ContainerStatusRequest(container_id=container_id)
        return self.node.runtime.ContainerStatus(request, timeout=20).status

    def execute(self, container_id: str, *command: str) -> str:
        """Output of a command that must succeed."""
        done = self._exec(container_id, command)
        assert done.exit_code == 0, done.stderr.decode()
        text: str = done.stdout.decode()
        return text

    def fails(self, container_id: str, *command: str) -> bool:
        """Say whether a command fails."""
        return bool(self._exec(container_id, command).exit_code)

    def _exec(self, container_id: str, command: tuple[str, ...]) -> Any:
        request = pb.ExecSyncRequest(container_id=container_id, cmd=command, timeout=20)
        return self.node.runtime.ExecSync(request, timeout=60)

    def mount_options(self, container_id: str, target: str) -> set[str]:
        """The options of the mount that a container has at a place."""
        for line in self.execute(container_id, "cat", "/proc/self/mountinfo").splitlines():
            fields = line.split()
            if fields[4] == target:
                return set(fields[5].split(","))
        raise AssertionError(f"nothing is mounted at {target}")

    def remove(self, container_id: str) -> None:
        """RemoveContainer."""
        self.node.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container_id), timeout=60)

    def clear(self) -> None:
        """Remove all pods; nothing of them may stay."""
        self.node.remove_everything()
        left = self.node._settled_leftovers()
        assert left == []


def refusal(step: Callable[[], object]) -> Any:
    """The error that a call must end with (a grpc.Call with code and details)."""
    try:
        step()
    except grpc.RpcError as error:
        return error
    raise AssertionError("it was not refused")
