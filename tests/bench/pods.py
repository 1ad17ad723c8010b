"""Runs in: `make bench`.

A pod from nothing to a started container, through the CRI socket, against the bare sum of its parts: the same
CNI plugins with the same configuration and the same OCI runtime with the same config.json, run by hand. In
turns, so that both have the same machine.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipc.cri import api_pb2
from tests.bench.bare import BareNetwork, BareRuntime, unique
from tests.bench.figures import Figure, at_most, timed
from tests.bench.world import Pods, bench_cgroup, image_root, spec_of
from tests.support import machine
from tests.support.daemon import Node
from tests.support.images import served

ROUNDS = 30
WARM = 3
COMMAND = ["sleep", "1000"]


def measure() -> list[Figure]:
    """RunPodSandbox, CreateContainer and StartContainer together, and each."""
    machine.enter()
    with served() as images, Node(registries=images.registries_conf, bridge="bhbench0") as node:
        pods = Pods(node, images.busybox)
        node.images.PullImage(api_pb2.PullImageRequest(image=api_pb2.ImageSpec(image=images.busybox)))
        model = pods.run("model")
        like = spec_of(node, pods.create(model, "model", COMMAND))
        with bare_pods(node.conflist("bhbench1"), like) as bare:
            return _compare(pods, bare)


def _compare(pods: Pods, bare: Callable[[], tuple[float, float]]) -> list[Figure]:
    ours: list[tuple[float, ...]] = []
    theirs: list[tuple[float, ...]] = []
    for _ in range(WARM + ROUNDS):
        ours.append(one_pod(pods))
        theirs.append(bare())
    steps = [statistics.median(column) for column in zip(*ours[WARM:], strict=True)]
    parts = [statistics.median(column) for column in zip(*theirs[WARM:], strict=True)]
    whole = statistics.median(map(sum, ours[WARM:]))
    floor = statistics.median(map(sum, theirs[WARM:]))
    names = ("RunPodSandbox", "CreateContainer", "StartContainer")
    return [
        at_most("pod: run, create, start, against CNI + crun by hand", whole, floor, 1.5),
        *(
            Figure(f"  {name}", f"{s * 1e3:.1f} ms", "-", "-", "-")
            for name, s in zip(names, steps, strict=True)
        ),
        *(
            Figure(f"  by hand: {name}", "-", f"{s * 1e3:.1f} ms", "-", "-")
            for name, s in zip(("namespace and CNI", "crun create and start"), parts, strict=True)
        ),
    ]


def one_pod(pods: Pods) -> tuple[float, ...]:
    """Run a pod with one container, take it away again; return the seconds of the three calls."""
    name = unique("pod")
    made: list[str] = []
    steps = (
        timed(lambda: made.append(pods.run(name))),
        timed(lambda: made.append(pods.create(made[0], name, COMMAND))),
        timed(lambda: pods.start(made[1])),
    )
    pods.remove(made[0])
    return steps


@contextmanager
def bare_pods(conflist: dict[str, Any], like: dict[str, Any]) -> Iterator[Callable[[], tuple[float, float]]]:
    """Give a function that makes one pod by hand: (seconds for the network, seconds for the container)."""
    with tempfile.TemporaryDirectory(prefix="bhbench-", dir="/tmp") as directory:
        base = Path(directory)
        plugins = conflist["plugins"]
        plugins[0]["ipam"]["dataDir"] = str(base / "addresses")
        plugins[0]["ipam"]["ranges"] = [[{"subnet": "10.215.0.0/16"}]]
        network = BareNetwork(base, plugins, [])
        with bench_cgroup("/bulkhead-bench"), image_root(base / "image") as rootfs:
            runtime = BareRuntime("/usr/bin/crun", base, rootfs, like)
            yield lambda: _bare_pod(network, runtime)
        link = plugins[0]["bridge"]
        subprocess.run(["ip", "link", "delete", link], check=True)


def _bare_pod(network: BareNetwork, runtime: BareRuntime) -> tuple[float, float]:
    name = unique("bare")
    pins: list[Path] = []
    connected = timed(lambda: pins.append(network.add(f"net-{name}")))
    bundle = runtime.bundle(name, pins[0])
    started = timed(lambda: runtime.create_and_start(name, bundle))
    runtime.delete(name)
    network.delete(f"net-{name}", pins[0])
    return connected, started
