"""Runs in: the tests. A node with a witness on it: a pod that logs a counter and must notice nothing.

`Operation`s are what clients do; each prepares what it needs, acts (while somebody is killed),
says what must be true afterwards, and takes itself back.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc

from ipc.cri import api_pb2 as cri
from tests.support.daemon import Node, wait_for

T = TypeVar("T")
COUNTER = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.01; done"
RETRY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
SLEEP = ["sleep", "1000"]


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

    # -- clients ------------------------------------------------------------------------------------

    def patient(self, work: Callable[[], T], seconds: float = 30.0) -> T:
        """What a kubelet does: try again while the runtime is unavailable."""
        end = time.monotonic() + seconds
        while True:
            try:
                return work()
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                if error.code() not in RETRY or time.monotonic() > end:
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
        wait_for(lambda: len(self.numbers()) > 3, "the witness counts")

    def numbers(self) -> list[int]:
        """What the witness has logged."""
        return [number for number in self._logged() if number is not None]

    def _logged(self) -> list[int | None]:
        """The same, with None where the successor of a monitor says that something may be missing."""
        path = self.node.logs / "witness" / "main.log"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        assert all(line.split(b" ", 3)[2] == b"F" for line in lines)
        texts = [line.split(b" ", 3)[3] for line in lines]
        return [None if text.startswith(b"[bulkhead] ") else int(text) for text in texts]

    def check_log(self) -> None:
        """Every number stands there once, in order; one may be missing only where the log itself says so."""
        expected, told = 0, False
        for number in self._logged():
            if number is None:
                told = True
                continue
            assert number == expected or (told and number > expected), f"{number} instead of {expected}"
            expected, told = number + 1, False

    def check_witness(self) -> None:
        """The witness runs as the same process, and its log has every number once."""
        assert self.pid_of(self.witness) == self.witness_pid
        assert self.state(self.witness) == cri.CONTAINER_RUNNING
        count = len(self.numbers())
        wait_for(lambda: len(self.numbers()) > count + 2, "the witness goes on")
        self.check_log()

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
        wait_for(lambda: self._is_up(kind), f"{kind} runs")

    def _is_up(self, kind: str) -> bool:
        return any(worker.kind == kind and worker.state == "ready" for worker in self.node.workers())

    def kill(self, kind: str) -> None:
        """SIGKILL; the supervisor is started again at once, as systemd would."""
        if kind == "supervisor":
            self.node.kill()
            self.node.start()
        else:
            assert self.node.kill_worker(kind)


@dataclass
class Operation:
    """One operation of a client; when the runtime was away, `act` is done again with the same arguments."""

    name: str
    prepare: Callable[[World], str]
    act: Callable[[World, str], object]
    check: Callable[[World, str, object], None]
    undo: Callable[[World, str, object], None]


def _nothing(_world: World) -> str:
    return ""


def _pulled(world: World, _name: str, _result: object) -> None:
    status = cri.ImageStatusRequest(image=cri.ImageSpec(image=world.pulled_again))
    assert world.node.images.ImageStatus(status, timeout=10).image.id


def _pull(world: World, _name: str) -> object:
    request = cri.PullImageRequest(image=cri.ImageSpec(image=world.pulled_again))
    return world.node.images.PullImage(request, timeout=60)


def _unpull(world: World, _name: str, _result: object) -> None:
    request = cri.RemoveImageRequest(image=cri.ImageSpec(image=world.pulled_again))
    world.node.images.RemoveImage(request, timeout=30)


def _is_ready(world: World, _name: str, result: object) -> None:
    assert world.pods() == {world.witness_pod: cri.SANDBOX_READY, str(result): cri.SANDBOX_READY}


def _remove_pod(world: World, _name: str, result: object) -> None:
    world.stop_pod(str(result))
    world.remove_pod(str(result))


def _pod(world: World) -> str:
    name = world.fresh("pod")
    return f"{name} {world.run_pod(name)}"


def _create(world: World, subject: str, command: list[str] | None = None) -> str:
    name, pod = subject.split()
    return world.create(pod, name, command or SLEEP)


def _container_is(state: int) -> Callable[[World, str, object], None]:
    def check(world: World, subject: str, result: object) -> None:
        container = str(result) if state == cri.CONTAINER_CREATED else subject.split()[2]
        assert world.states() == {world.witness: cri.CONTAINER_RUNNING, container: state}
        assert world.state(container) == state

    return check


def _undo_subject(world: World, subject: str, _result: object) -> None:
    _remove_pod(world, "", subject.split()[1])


def _created(world: World) -> str:
    subject = _pod(world)
    return f"{subject} {_create(world, subject)}"


def _started(world: World) -> str:
    subject = _created(world)
    world.start(subject.split()[2])
    return subject


def _start(world: World, subject: str) -> object:
    container = subject.split()[2]
    if world.state(container) != cri.CONTAINER_RUNNING:  # a kubelet looks before it tries again
        world.start(container)
    return container


def _stop(world: World, subject: str) -> object:
    world.stop(subject.split()[2], grace=1)
    return subject


def _exec(world: World, subject: str) -> object:
    request = cri.ExecSyncRequest(
        container_id=subject.split()[2], cmd=["sh", "-c", "echo in; sleep 0.1; echo out"], timeout=20
    )
    return world.node.runtime.ExecSync(request, timeout=30).stdout


def _exec_said(_world: World, _subject: str, result: object) -> None:
    assert result == b"in\nout\n"


def _remove(world: World, subject: str) -> object:
    world.remove_pod(subject.split()[1])
    return subject


def _is_gone(world: World, subject: str, _result: object) -> None:
    assert world.pods() == {world.witness_pod: cri.SANDBOX_READY}
    assert world.states() == {world.witness: cri.CONTAINER_RUNNING}


def _already_gone(_world: World, _subject: str, _result: object) -> None:
    return None


def _idle_check(world: World, _name: str, _result: object) -> None:
    assert world.pods() == {world.witness_pod: cri.SANDBOX_READY}


def _fresh_pod_name(world: World) -> str:
    return world.fresh("run")


OPERATIONS = [
    Operation("idle", _nothing, lambda world, _name: time.sleep(0.05), _idle_check, _already_gone),
    Operation("pull", _nothing, _pull, _pulled, _unpull),
    Operation(
        "RunPodSandbox", _fresh_pod_name, lambda world, name: world.run_pod(name), _is_ready, _remove_pod
    ),
    Operation("CreateContainer", _pod, _create, _container_is(cri.CONTAINER_CREATED), _undo_subject),
    Operation("StartContainer", _created, _start, _container_is(cri.CONTAINER_RUNNING), _undo_subject),
    Operation("ExecSync", _started, _exec, _exec_said, _undo_subject),
    Operation("StopContainer", _started, _stop, _container_is(cri.CONTAINER_EXITED), _undo_subject),
    Operation("RemovePodSandbox", _started, _remove, _is_gone, _already_gone),
]


@contextlib.contextmanager
def witnessed(world: World) -> Iterator[World]:
    """Run the witness; at the end it is checked, and everything is removed."""
    world.start_witness()
    yield world
    world.check_witness()
    world.stop_pod(world.witness_pod)
    world.check_log()
