"""Runs in: `make bench`, and at the end of `make test-crash`. From SIGKILL to serving again, and a start.

Serving means for cri and the supervisor that ListContainers is answered and exact, for another worker that it
has said hello out of its sandbox and accepts; one that runs on demand is asked for at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from ipc.blocking import Client
from ipc.cri import api_pb2 as cri
from ipc.messages.supervisor import WorkerList
from tests.bench.figures import Figure
from tests.bench.world import Pods
from tests.support import machine
from tests.support.daemon import Node, wait_for
from tests.support.images import Served, served
from tests.support.registry import busybox_image, make_image, make_layer, push

RUNNING, CREATED, IMAGES = 100, 400, 200
EACH = 10  # containers of a pod
ROUNDS, STARTS = 7, 3
BETWEEN = 1.2  # seconds: a worker that is killed sooner than a second after its hello has to wait
SLEEP = ["sleep", "100000"]
NRI = "nri.sock"

#: Kinds that run on demand, and the socket that asks for one.
DEMANDED = {"image": "ipc/image.sock", "stream": "ipc/stream.sock", "ops": "ops.sock", "nri": NRI}
LEAVES = ("storage", "network", *DEMANDED)


@dataclass(frozen=True)
class Bound:
    """What the project has set itself, in milliseconds."""

    kind: str
    limit: float


BOUNDS = (*(Bound(kind, 150) for kind in LEAVES), Bound("cri", 700), Bound("supervisor", 1500))


def measure() -> list[Figure]:
    """SIGKILL with a hundred running containers; a start with five hundred and two hundred images."""
    with full_node() as (node, images):
        took = serving_again(node)
        fill(node, images)
        start = _start(node)
    figures = [_figure(f"{one.kind}: SIGKILL to serving", took[one.kind], one.limit) for one in BOUNDS]
    name = f"start with {RUNNING + CREATED} containers and {IMAGES} images"
    return [*figures, _figure(name, start, 3000)]


@contextlib.contextmanager
def full_node() -> Iterator[tuple[Node, Served]]:
    """A node with a hundred running containers."""
    machine.enter()
    with (
        served(larger_files=1) as images,
        Node(registries=images.registries_conf, log_level="warning") as node,
    ):
        node.ctl("pull", images.busybox)
        pods = Pods(node, images.busybox)
        for name, pod in _pods(pods, RUNNING // EACH, "full"):
            for number in range(EACH):
                pods.start(pods.create(pod, name, SLEEP, name=f"c{number}"))
        yield node, images


def fill(node: Node, images: Served) -> None:
    """More containers, created and not started, and many images."""
    pods = Pods(node, images.busybox)
    for name, pod in _pods(pods, CREATED // EACH, "more"):
        for number in range(EACH):
            pods.create(pod, name, SLEEP, name=f"c{number}")
    base = busybox_image().layers
    for number in range(IMAGES - 1):
        image = make_image([*base, make_layer({f"number/{number}": b"x" * 1000})])
        push(images.registry, f"test/many{number}", "1", image)
        request = cri.PullImageRequest(image=cri.ImageSpec(image=f"{images.address}/test/many{number}:1"))
        node.images.PullImage(request, timeout=60)


def _pods(pods: Pods, count: int, word: str) -> Iterator[tuple[str, str]]:
    for number in range(count):
        yield f"{word}-{number}", pods.run(f"{word}-{number}")


def medians(rounds: int = ROUNDS) -> str:
    """From SIGKILL to serving again on a node with a hundred running containers, as a table in Markdown."""
    with full_node() as (node, _images):
        took = serving_again(node, rounds)
    lines = ["| SIGKILL of | serving again after, median | bound |", "|---|---|---|"]
    lines += [f"| {one.kind} | {took[one.kind]:.0f} ms | {one.limit:.0f} ms |" for one in BOUNDS]
    return "\n".join(lines)


def serving_again(node: Node, rounds: int = ROUNDS) -> dict[str, float]:
    """Kill each kind so many times; the medians in milliseconds."""
    expected = _containers(node)
    ways: dict[str, Callable[[], float]] = {kind: lambda kind=kind: _leaf(node, kind) for kind in LEAVES}  # type: ignore[misc]  # a default binds it
    ways |= {
        "cri": lambda: _front(node, expected, lambda: _kill(node, "cri")),
        "supervisor": lambda: _front(node, expected, lambda: _kill_supervisor(node)),
    }
    took: dict[str, list[float]] = {kind: [] for kind in ways}
    for _ in range(rounds):
        for kind, way in ways.items():
            time.sleep(BETWEEN if kind in ("storage", "supervisor") else 0)
            took[kind].append(way() * 1000)
    return {kind: statistics.median(times) for kind, times in took.items()}


def _leaf(node: Node, kind: str) -> float:
    _wake(node, kind)
    with Client(str(node.run_root / "ipc" / "supervisor.sock"), timeout=10) as client:

        def up(but: int = 0) -> int:
            states = client.call(WorkerList()).workers
            return next(
                (one.pid for one in states if one.kind == kind and one.state == "ready" and one.pid != but), 0
            )

        pid = wait_for(up, f"{kind} runs")
        time.sleep(BETWEEN)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        with _asking(node, kind):
            wait_for(lambda: up(pid), f"{kind} runs again")
            return time.monotonic() - began


def _wake(node: Node, kind: str) -> None:
    with _asking(node, kind):
        wait_for(lambda: node.pids(kind), f"{kind} is started")


@contextlib.contextmanager
def _asking(node: Node, kind: str) -> Iterator[None]:
    """Be connected to a kind that runs on demand."""
    path = DEMANDED.get(kind)
    if path is None:
        yield
        return
    packets = path.startswith("ipc/")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if packets else socket.SOCK_STREAM) as sock:
        sock.connect(str(node.run_root / path))
        yield


def _front(node: Node, expected: int, kill: Callable[[], object]) -> float:
    began = time.monotonic()
    kill()
    wait_for(lambda: _answers(node, expected), "lists are exact again")
    return time.monotonic() - began


def _kill(node: Node, kind: str) -> None:
    assert node.kill_worker(kind)


def _kill_supervisor(node: Node) -> None:
    """Be the service manager, with no delay of its own."""
    assert node.daemon is not None
    node.daemon.kill()
    node.restart_ended()


def _start(node: Node) -> float:
    """Stop in order, and start; the median in milliseconds."""
    expected, took = _containers(node), []
    for _ in range(STARTS):
        node.stop()
        began = time.monotonic()
        node.start()
        wait_for(lambda: _answers(node, expected), "lists are exact")
        assert len(node.images.ListImages(cri.ListImagesRequest(), timeout=20).images) == IMAGES
        took.append((time.monotonic() - began) * 1000)
    return statistics.median(took)


def _containers(node: Node) -> int:
    return len(node.runtime.ListContainers(cri.ListContainersRequest(), timeout=20).containers)


def _answers(node: Node, expected: int) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return _containers(node) == expected
    return False


def _figure(name: str, took: float, limit: float) -> Figure:
    return Figure(name, f"{took:.0f} ms", "-", "-", f"at most {limit:.0f} ms", took <= limit)
