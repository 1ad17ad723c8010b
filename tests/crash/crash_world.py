"""Runs in: the tests. A node with a witness on it: a pod that logs a counter and must notice nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc

from ipc.cri import api_pb2 as cri
from tests.support.daemon import Node, wait_for
from tests.support.nri_plugin import Plugin

T = TypeVar("T")
COUNTER = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.01; done"
AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
SLEEP = ["sleep", "1000"]


def is_away(error: Exception) -> bool:
    """True for what a client is told while there is no cri."""
    return isinstance(error, grpc.Call) and error.code() in AWAY


@dataclass
class CounterLog:
    """The witness's log: every number once, in order; some may be missing only where the log says so."""

    path: Path
    numbers: int = 0  # that were read
    _offset: int = 0
    _expected: int = 0
    _told: bool = False  # a monitor's successor has just said that something may be missing

    def read(self) -> int:
        """Read what was added, and check it; return how many numbers there are by now."""
        data = b""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(line)
        return self.numbers

    def _take(self, line: bytes) -> None:
        _when, _stream, tag, text = line.split(b" ", 3)
        assert tag == b"F", line
        if text.startswith(b"[bulkhead] "):
            self._told = True
            return
        number = int(text)
        fits = number == self._expected or (self._told and number > self._expected)
        assert fits, f"{number} instead of {self._expected}"
        self.numbers += 1
        self._expected, self._told = number + 1, False


@dataclass
class World:
    """The node, the image it pulls from, and the witness."""

    node: Node
    image: str
    pulled_again: str  # a second image, for pulls under fire
    witness: str = ""
    witness_pod: str = ""
    witness_pid: int = 0
    sequence: int = 0
    counter: CounterLog = field(init=False)
    plugin: Plugin | None = None

    def __post_init__(self) -> None:
        self.counter = CounterLog(self.node.logs / "witness" / "main.log")

    # -- clients ------------------------------------------------------------------------------------

    def patient(
        self, work: Callable[[], T], seconds: float = 30.0, allowed: Callable[[Exception], bool] = is_away
    ) -> T:
        """What a kubelet does: try again while the runtime is unavailable, or after what else is allowed."""
        end = time.monotonic() + seconds
        while True:
            try:
                return work()
            except Exception as error:
                if not allowed(error) or time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def pod_config(self, name: str) -> cri.PodSandboxConfig:
        """A pod's configuration; the same name is the same pod."""
        return cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, namespace="crash", uid=f"uid-{name}"),
            hostname=name[:60],
            log_directory=str(self.node.logs / name),
            linux=cri.LinuxPodSandboxConfig(
                security_context=cri.LinuxSandboxSecurityContext(
                    namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)
                )
            ),
        )

    def run_pod(self, name: str) -> str:
        """RunPodSandbox."""
        request = cri.RunPodSandboxRequest(config=self.pod_config(name))
        return self.node.runtime.RunPodSandbox(request, timeout=60).pod_sandbox_id

    def create(
        self,
        pod: str,
        pod_name: str,
        command: list[str],
        name: str = "main",
        *,
        tty: bool = False,
        memory: int = 0,
    ) -> str:
        """CreateContainer; `memory`: a limit in bytes."""
        request = cri.CreateContainerRequest(
            pod_sandbox_id=pod,
            config=cri.ContainerConfig(
                metadata=cri.ContainerMetadata(name=name),
                image=cri.ImageSpec(image=self.image),
                command=command,
                log_path=f"{name}.log",
                tty=tty,
                linux=cri.LinuxContainerConfig(
                    resources=cri.LinuxContainerResources(memory_limit_in_bytes=memory),
                    security_context=cri.LinuxContainerSecurityContext(
                        namespace_options=cri.NamespaceOption(pid=cri.CONTAINER)
                    ),
                ),
            ),
            sandbox_config=self.pod_config(pod_name),
        )
        return self.node.runtime.CreateContainer(request, timeout=60).container_id

    def start(self, container: str) -> None:
        """StartContainer."""
        self.node.runtime.StartContainer(cri.StartContainerRequest(container_id=container), timeout=60)

    def stop(self, container: str, grace: int = 0) -> None:
        """StopContainer."""
        request = cri.StopContainerRequest(container_id=container, timeout=grace)
        self.node.runtime.StopContainer(request, timeout=60)

    def remove_container(self, container: str) -> None:
        """RemoveContainer."""
        request = cri.RemoveContainerRequest(container_id=container)
        self.node.runtime.RemoveContainer(request, timeout=60)

    def state(self, container: str) -> int:
        """A container's state as ContainerStatus tells it."""
        request = cri.ContainerStatusRequest(container_id=container)
        return self.node.runtime.ContainerStatus(request, timeout=10).status.state

    def states(self) -> dict[str, int]:
        """Every container's state as ListContainers tells it."""
        answer = self.node.runtime.ListContainers(cri.ListContainersRequest(), timeout=10)
        return {one.id: one.state for one in answer.containers}

    def pods(self) -> dict[str, int]:
        """Every pod's state as ListPodSandbox tells it."""
        answer = self.node.runtime.ListPodSandbox(cri.ListPodSandboxRequest(), timeout=10)
        return {one.id: one.state for one in answer.items}

    def stop_pod(self, pod: str) -> None:
        """StopPodSandbox."""
        self.node.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=60)

    def remove_pod(self, pod: str) -> None:
        """RemovePodSandbox."""
        self.node.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=60)

    def pid_of(self, container: str) -> int:
        """The container's init, from the monitor's own record."""
        path = self.node.run_root / "monitors" / container / "state.json"
        return int(json.loads(path.read_text())["pid"])

    def fresh(self, what: str) -> str:
        """A name that was not used."""
        self.sequence += 1
        return f"{what}-{self.sequence}"

    # -- the witness ----------------------------------------------------------------------------------

    def start_witness(self) -> None:
        """Run the pod that counts."""
        self.witness_pod = self.run_pod("witness")
        self.witness = self.create(self.witness_pod, "witness", ["sh", "-c", COUNTER])
        self.start(self.witness)
        self.witness_pid = self.pid_of(self.witness)
        wait_for(lambda: self.counter.read() > 3, "the witness counts")

    def check_witness(self) -> None:
        """The witness runs as the same process, and its log has every number once."""
        assert self.pid_of(self.witness) == self.witness_pid
        assert self.state(self.witness) == cri.CONTAINER_RUNNING
        count = self.counter.read()
        wait_for(lambda: self.counter.read() > count + 1, "the witness goes on")

    # -- the victims ----------------------------------------------------------------------------------

    def recovered(self) -> None:
        """Wait until the CRI socket answers again."""
        wait_for(self.node.answers, "cri answers again")
        self.patient(self.pods)

    def wake(self, kind: str) -> None:
        """Make sure that a worker runs: ask for an on-demand one, wait for one that was killed just now."""
        if kind == "ops":
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(str(self.node.run_root / "ops.sock"))
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                sock.recv(4096)
        elif kind == "image":
            request = cri.PullImageRequest(image=cri.ImageSpec(image=self.image))
            self.node.images.PullImage(request, timeout=60)
        elif kind == "stream":
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(str(self.node.run_root / "ipc" / "stream.sock"))
        elif kind == "nri":
            self._register_plugin()
        wait_for(lambda: self.is_up(kind), f"{kind} runs")

    def _register_plugin(self) -> None:
        """Be the node resource plugin that connects again when it was let go."""
        if self.plugin is None or self.plugin.closed.is_set():
            self.plugin = Plugin(str(self.node.run_root / "nri.sock")).join()

    def is_up(self, kind: str, but: Collection[int] = ()) -> bool:
        """Say whether a worker of the kind serves, one that is none of `but`."""
        states = self.node.workers()
        return any(one.kind == kind and one.state == "ready" and one.pid not in but for one in states)

    def kill(self, kind: str) -> None:
        """SIGKILL; the supervisor is started again at once, as systemd would."""
        if kind == "supervisor":
            self.node.kill()
            self.node.start()
        else:
            assert self.node.kill_worker(kind)


@contextlib.contextmanager
def witnessed(world: World) -> Iterator[World]:
    """Run the witness; at the end it is checked, and everything is removed."""
    world.start_witness()
    yield world
    world.check_witness()
    world.stop_pod(world.witness_pod)
    world.counter.read()
