"""The disk fails cri and network at every write of theirs (ENOSPC, EIO, EDQUOT in turn): in the state's
database and the files beside it, in network's records and pins.

Creation and removal answer honestly, the same request again succeeds, lists are exact, and a check of the
node finds nothing. The short form takes a few steps of each. A pull and the removal of an image change only
what is storage's, which has its own walk (test_crash_storage.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from ipc.errors import RemoteError
from supervisor.cli.checks.report import check
from supervisor.cli.checks.running import Running
from tests.support import machine
from tests.support.cri_client import Client
from tests.support.daemon import Node, wait_for
from tests.support.faults import CHANGES, Strace
from tests.support.images import Served, served
from workers.jobs import SPARE

LONG = os.environ.get("BULKHEAD_CRASH") == "long"
POINTS = 400 if LONG else 3  # of each operation in each worker
ERRORS = ("ENOSPC", "EIO", "EDQUOT")
HONEST = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
}
#: Calls of ours. CNI plugins make those that end in "at": host-local takes no notice of an address that it
#: could not remove, which is no write of network's, and what `bulkhead check` is for.
OURS = ",".join(call for call in CHANGES.split(",") if not call.endswith("at"))
READY, RUNNING = pb.PodSandboxState.SANDBOX_READY, pb.ContainerState.CONTAINER_RUNNING


@pytest.fixture(scope="module")
def images() -> Iterator[Served]:
    machine.enter()
    with served(larger_files=2) as found:
        yield found


@dataclass
class Scene:
    """A node, and the one pod with one container that is made and removed again."""

    node: Node
    images: Served
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = Client(self.node, self.images)
        self.sandbox = self.client.pod_config()
        self.container = self.client.container_config(["sleep", "1000"])

    def pull(self) -> None:
        self.client.pull()

    def create(self) -> None:
        pod = self.client.run(self.sandbox)
        container = self.client.create(pod, self.sandbox, self.container)
        if self.client.status(container).state != RUNNING:
            self.client.start(container)

    def remove(self) -> None:
        for pod in self.pods():
            self.client.remove_pod(pod.id)

    def pods(self) -> list[pb.PodSandbox]:
        request = pb.ListPodSandboxRequest()
        return list(self.node.runtime.ListPodSandbox(request, timeout=20).items)

    def listed(self) -> tuple[list[int], list[int], int]:
        """States of pods, states of containers, number of images."""
        containers = self.node.runtime.ListContainers(pb.ListContainersRequest(), timeout=20).containers
        images = self.node.images.ListImages(pb.ListImagesRequest(), timeout=20).images
        return [pod.state for pod in self.pods()], [one.state for one in containers], len(images)


@dataclass(frozen=True)
class Operation:
    """What is done, what stands before it, and what is listed after it."""

    name: str
    prepare: Callable[[Scene], object]
    act: Callable[[Scene], object]
    after: tuple[list[int], list[int], int]


def an_image(scene: Scene) -> None:
    scene.pull()
    scene.remove()


def a_container(scene: Scene) -> None:
    scene.pull()
    scene.create()


OPERATIONS = [
    Operation("create", an_image, Scene.create, ([READY], [RUNNING], 1)),
    Operation("remove", a_container, Scene.remove, ([], [], 1)),
]
CELLS = [(kind, one) for one in OPERATIONS for kind in ("cri", "network")]


@pytest.fixture(scope="module")
def scene(images: Served) -> Iterator[Scene]:
    with Node(registries=images.registries_conf, bridge="bhstate0") as node:
        yield Scene(node, images)


def traced(scene: Scene, kind: str) -> int:
    """The pid of a kind's worker, whose next job gets a child that is forked, and traced, from then on."""
    pid = scene.node.pids(kind)[0]
    idle = [child for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if _idle(child)]
    for child in idle:
        os.kill(int(child), signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in idle), "idle children end")
    return pid


def _idle(pid: str) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == SPARE


def steps_of(scene: Scene, kind: str, operation: Operation) -> list[tuple[str, int]]:
    """Which calls of the operation to harm: all, or some that are spread over it."""
    operation.prepare(scene)
    with Strace(traced(scene, kind), calls=OURS) as counted:
        operation.act(scene)
    assert counted.steps
    return counted.steps[:: -(-len(counted.steps) // POINTS)]


def refusal(step: Callable[[], object]) -> grpc.StatusCode | None:
    """How it was refused, None if it succeeded."""
    try:
        step()
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        code: grpc.StatusCode = error.code()
        assert code in HONEST, error
        assert "a bug" not in (error.details() or ""), error.details()
        return code
    return None


def is_clean(scene: Scene) -> bool:
    with contextlib.suppress(RemoteError):
        return not check(Running(str(scene.node.run_root)), deep=False, repair=False)
    return False


@pytest.mark.parametrize(("kind", "operation"), CELLS, ids=lambda one: getattr(one, "name", one))
def test_an_error_at_any_write_is_an_answer_and_the_same_request_again_succeeds(
    scene: Scene, kind: str, operation: Operation
) -> None:
    for count, (call, nth) in enumerate(steps_of(scene, kind, operation)):
        operation.prepare(scene)
        error = ERRORS[count % len(ERRORS)]
        with Strace(traced(scene, kind), f"error={error}", nth=nth, calls=call):
            refused = refusal(lambda: operation.act(scene))
        where = f"{error} at {call} {nth} of {kind}: {refused}"
        wait_for(lambda: refusal(lambda: operation.act(scene)) is None, f"again after {where}")
        wait_for(lambda: scene.listed() == operation.after, f"lists after {where}")
        wait_for(lambda: is_clean(scene), f"clean after {where}")
