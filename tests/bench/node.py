"""Runs in: `make bench`. A full node: memory with 20 pods, stats and lists with a hundred and a thousand."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from ipc.cri import api_pb2 as cri
from tests.bench.figures import Figure, median_seconds
from tests.bench.memory import idle_parts
from tests.bench.world import Pods
from tests.support import machine
from tests.support.daemon import Node
from tests.support.images import served
from tests.support.monitor_process import children_of

FEW, MANY, EACH = 20, 100, 10  # pods; pods; containers in each of the many in the end
SETTLE, RELISTED, ROUNDS = 5.0, 20, 15
IDLE = (
    65.0  # seconds after which what serves on demand has ended (timeouts.idle_exit is 60), spare children too
)
SLEEP = ["sleep", "100000"]
TICK = os.sysconf("SC_CLK_TCK")


def measure() -> list[Figure]:
    """Memory, stats, the cost of a relist each second, lists."""
    machine.enter()
    with served() as images, Node(registries=images.registries_conf, log_level="warning") as node:
        node.ctl("pull", images.busybox)
        pods = Pods(node, images.busybox)
        names = [f"full-{number}" for number in range(MANY)]
        running = [_running(pods, name) for name in names[:FEW]]
        time.sleep(SETTLE)
        busy = sum(idle_parts(node).values())
        time.sleep(IDLE)
        memory = sum(idle_parts(node).values())
        running += [_running(pods, name) for name in names[FEW:]]
        time.sleep(SETTLE)
        stats = median_seconds(lambda: _stats(node), ROUNDS)
        share = _relisted(node)
        for name, pod in zip(names, running, strict=True):
            for number in range(1, EACH):
                pods.create(pod, name, SLEEP, name=f"c{number}")
        containers = median_seconds(lambda: _containers(node), ROUNDS)
        sandboxes = median_seconds(lambda: _pods(node), ROUNDS)
    return [
        _bound(f"everything with {FEW} pods, a minute after the last pull, PSS", memory, "MB", 75),
        Figure(
            f"- the same {SETTLE:.0f} s after the last pod, with the image worker", f"{busy:.1f} MB", *"---"
        ),
        _bound(f"ListContainerStats of {MANY} containers", stats * 1000, "ms", 40),
        _bound(f"all processes, {MANY} pods, lists each second", share * 100, "% of a core", 2),
        _bound(f"ListContainers with {MANY * EACH} containers", containers * 1000, "ms", 30),
        _bound(f"ListPodSandbox with {MANY} pods of {EACH}", sandboxes * 1000, "ms", 30),
    ]


def _running(pods: Pods, name: str) -> str:
    pod = pods.run(name)
    pods.start(pods.create(pod, name, SLEEP))
    return pod


def _stats(node: Node) -> None:
    answer = node.runtime.ListContainerStats(cri.ListContainerStatsRequest(), timeout=60)
    assert len(answer.stats) == MANY, len(answer.stats)


def _containers(node: Node) -> None:
    answer = node.runtime.ListContainers(cri.ListContainersRequest(), timeout=60)
    assert len(answer.containers) == MANY * EACH, len(answer.containers)


def _pods(node: Node) -> None:
    answer = node.runtime.ListPodSandbox(cri.ListPodSandboxRequest(), timeout=60)
    assert len(answer.items) == MANY, len(answer.items)


def _relisted(node: Node) -> float:
    """Share of a core that all processes take while pods and containers are listed once a second."""
    begun, before = time.monotonic(), _cpu(node)
    for _ in range(RELISTED):
        _pods(node)
        node.runtime.ListContainers(cri.ListContainersRequest(), timeout=60)
        time.sleep(1)
    return (_cpu(node) - before) / (time.monotonic() - begun)


def _cpu(node: Node) -> float:
    """Seconds of CPU time of every process of the daemon, ended children included."""
    return sum(sum(map(int, _stat(pid)[11:15])) for pid in _processes(node)) / TICK


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def _processes(node: Node) -> Iterator[int]:
    """The supervisor and all below it but the containers, whose work is none of ours."""
    assert node.daemon is not None
    monitors = set(node.pids("monitor"))
    pending = [node.daemon.pid]
    while pending:
        pid = pending.pop()
        yield pid
        if pid not in monitors:
            pending += children_of(pid)


def _bound(name: str, ours: float, unit: str, bound: float) -> Figure:
    return Figure(name, f"{ours:.1f} {unit}", "-", "-", f"at most {bound} {unit}", ours <= bound)
