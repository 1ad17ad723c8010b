"""Runs in: `make bench`.

Memory of the whole daemon without containers, and of one monitor among fifty whose containers run, have
logged and were executed in; conmon's as a measure.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

from tests.bench import bench_monitor
from tests.bench.bench_monitor import memory_of
from tests.bench.figures import Figure
from tests.bench.world import Pods
from tests.support import machine
from tests.support.daemon import Node
from tests.support.images import served
from tests.support.monitor_process import children_of

CONTAINERS = 50
SETTLE = 5.0  # seconds after which what was started on demand or at the start is quiet
COMMAND = ["sh", "-c", "echo one; echo two >&2; sleep 1000"]


def measure() -> list[Figure]:
    """PSS of everything idle; private memory and PSS of a monitor, medians."""
    machine.enter()
    with served() as images, Node(registries=images.registries_conf) as node:
        time.sleep(SETTLE)
        parts = idle_parts(node)
        node.ctl("pull", images.busybox)
        private, proportional = _monitors(node, Pods(node, images.busybox))
    conmon_private, conmon_pss = bench_monitor.conmon_memory()
    return [
        _at_most("everything idle, no container, PSS", sum(parts.values()), None, 60),
        *(Figure(f"  {kind}", f"{size:.1f} MB", "-", "-", "-") for kind, size in parts.items()),
        _at_most(f"a monitor among {CONTAINERS}, private", private, conmon_private, 0.7),
        _at_most(f"a monitor among {CONTAINERS}, PSS", proportional, conmon_pss, 1.0),
    ]


def idle_parts(node: Node) -> dict[str, float]:
    """PSS of every process of the daemon, by kind; a child that is no worker counts with its parent.

    What runs in containers is the users', as it is where peers are measured with their monitors.
    """
    kinds = {worker.pid: worker.kind for worker in node.workers() if worker.pid}
    assert node.daemon is not None
    parts: dict[str, float] = {}
    pending = [(node.daemon.pid, "supervisor")]
    while pending:
        pid, parent = pending.pop()
        kind = kinds.get(pid, parent)
        parts[kind] = parts.get(kind, 0.0) + memory_of(pid)[1]
        pending += [(child, kind) for child in children_of(pid) if kind != "monitor" or _ours(child)]
    return parts


def _ours(pid: int) -> bool:
    """Whether a process executes our interpreter: a hand of a monitor does, a container does not."""
    return os.path.samefile(f"/proc/{pid}/exe", sys.executable)


def _monitors(node: Node, pods: Pods) -> tuple[float, float]:
    pod = pods.run("many")
    for number in range(CONTAINERS):
        container = pods.create(pod, "many", COMMAND, name=f"c{number}")
        pods.start(container)
        pods.execute(container, "true")
    time.sleep(SETTLE)
    sizes = [memory_of(pid) for pid in node.pids("monitor")]
    assert len(sizes) == CONTAINERS, len(sizes)
    private, proportional = (statistics.median(column) for column in zip(*sizes, strict=True))
    return private, proportional


def _at_most(name: str, ours: float, baseline: float | None, bound: float) -> Figure:
    theirs = "-" if baseline is None else f"{baseline:.2f} MB"
    ratio = "-" if baseline is None else f"{ours / baseline:.2f}"
    return Figure(name, f"{ours:.2f} MB", theirs, ratio, f"at most {bound} MB", ours <= bound)
