"""Runs in: `make bench`.

The whole life of pods and containers in the shape of critest's benchmark: pods are run, stopped and removed;
containers, each in a pod of its own, are created, started, stopped and removed; one at a time, then four at
a time. By Bulkhead and by Debian's containerd in turns, with the same runtime (crun, then runc), CNI plugins
and image; and the same work by hand, which is the floor.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.bench import beside, containerd
from tests.bench.bare import BareNetwork, BareRuntime, unique
from tests.bench.figures import Figure, at_most, timed
from tests.bench.world import Pods, image_root, spec_of
from tests.support import machine
from tests.support.daemon import Node

COUNT = int(os.environ.get("BENCH_PODS", "20"))
WARM = 2
TOGETHER = 4
BOUNDS = {"crun": 0.5, "runc": 0.65}  # of containerd's sum
FLOOR_BOUND = 1.25
GRACE = 10  # seconds; the command ends at its stop signal
#: An entry point with a handler for its stop signal, as most have.
COMMAND = ["sh", "-c", "trap 'exit 0' TERM; sleep 1000 & wait"]
SETTLE = 0.1  # seconds in which it sets the handler, on either side
#: Seconds between turns: the kernel clears a network namespace away in the background, and holds up whoever
#: makes or removes an interface meanwhile; nobody is to wait for what another one has left.
PAUSE = 0.2
POD_STEPS = ("CreatePod", "StopPod", "RemovePod")
CONTAINER_STEPS = ("CreateContainer", "StartContainer", "StopContainer", "RemoveContainer")
ORDER = ("CreatePod", *CONTAINER_STEPS, "StopPod", "RemovePod")
MAY_BE_SLOWER = "CreateContainer"

Times = Mapping[str, float]  # seconds by step
Life = Callable[[], Times]


def measure() -> list[Figure]:
    """The sum of all steps, and each, against containerd; the sum against the floor."""
    machine.enter()
    figures: list[Figure] = []
    with beside.running() as both, _floors(both.node, both.ours("crun"), both.base) as floors:
        for runtime, bound in BOUNDS.items():
            ours, theirs = both.ours(runtime), both.theirs(runtime)
            figures += _one_at_a_time(ours, theirs, floors[runtime], runtime, bound)
            figures += _together(ours, theirs, runtime, bound)
    return figures


# -- lives ----------------------------------------------------------------------------------------------


def pod_life(pods: Pods) -> Times:
    """A pod without containers."""
    name = unique("pod")
    made: list[str] = []
    run = timed(lambda: made.append(pods.run(name)))
    return {
        "CreatePod": run,
        "StopPod": timed(lambda: pods.stop(made[0])),
        "RemovePod": _removed(pods, made[0]),
    }


def _removed(pods: Pods, pod: str) -> float:
    return timed(lambda: pods.remove_stopped(pod))


def container_life(pods: Pods) -> Times:
    """A container in a pod of its own, whose life does not count."""
    name = unique("pod")
    pod = pods.run(name)
    made: list[str] = []
    times = {
        "CreateContainer": timed(lambda: made.append(pods.create(pod, name, COMMAND))),
        "StartContainer": timed(lambda: pods.start(made[0])),
    }
    time.sleep(SETTLE)
    times["StopContainer"] = timed(lambda: pods.stop_container(made[0], GRACE))
    times["RemoveContainer"] = timed(lambda: pods.remove_container(made[0]))
    pods.remove(pod)
    return times


def _medians(lives: Sequence[Times]) -> dict[str, float]:
    return {step: statistics.median(life[step] for life in lives) for step in lives[0]}


# -- figures --------------------------------------------------------------------------------------------


def _one_at_a_time(ours: Pods, theirs: Pods, floor: Life, runtime: str, bound: float) -> list[Figure]:
    lives: list[list[Times]] = [[], [], []]
    turns: tuple[Life, Life, Life] = (lambda: _whole(ours), lambda: _whole(theirs), floor)
    for _ in range(WARM + COUNT):
        for column, life in zip(lives, turns, strict=True):
            time.sleep(PAUSE)
            column.append(life())
    mine, peers, bare = (_medians(column[WARM:]) for column in lives)
    what = f"life of a pod, {runtime}"
    by_hand = sum(bare.values())
    return [
        at_most(f"{what}, against containerd", sum(mine.values()), sum(peers.values()), bound),
        *_steps(mine, peers),
        at_most(f"{what}, against CNI + {runtime} by hand", sum(mine.values()), by_hand, FLOOR_BOUND),
        *(Figure(f"  by hand: {step}", "-", f"{s * 1e3:.1f} ms", "-", "-") for step, s in bare.items()),
    ]


def _whole(pods: Pods) -> Times:
    return {**pod_life(pods), **container_life(pods)}


def _together(ours: Pods, theirs: Pods, runtime: str, bound: float) -> list[Figure]:
    mine, peers = _crowd(ours), _crowd(theirs)
    what = f"life of a pod, {runtime}, {TOGETHER} at a time, against containerd"
    return [at_most(what, sum(mine.values()), sum(peers.values()), bound), *_steps(mine, peers)]


def _crowd(pods: Pods) -> Times:
    with ThreadPoolExecutor(TOGETHER) as pool:
        alone = list(pool.map(lambda _: pod_life(pods), range(COUNT)))
        inside = list(pool.map(lambda _: container_life(pods), range(COUNT)))
    return {**_medians(alone), **_medians(inside)}


def _steps(ours: Times, theirs: Times) -> list[Figure]:
    return [_step(step, ours[step], theirs[step]) for step in ORDER]


def _step(name: str, ours: float, theirs: float) -> Figure:
    if name != MAY_BE_SLOWER:
        return at_most(f"  {name}", ours, theirs, 1)
    ratio = f"{ours / theirs:.2f}"
    return Figure(f"  {name}", f"{ours * 1e3:.1f} ms", f"{theirs * 1e3:.1f} ms", ratio, "-")


# -- the floor ------------------------------------------------------------------------------------------


@contextmanager
def _floors(node: Node, pods: Pods, base: Path) -> Iterator[Mapping[str, Life]]:
    """One life by hand for each runtime: CNI ADD and DEL, the runtime's create, start, kill, delete."""
    name = unique("model")
    pod = pods.run(name)
    like = spec_of(node, pods.create(pod, name, COMMAND))  # whose pod's files it mounts: it stays
    plugins = beside.conflist(node, "bhbench2", "10.216.0.0/16", base / "addresses")["plugins"]
    assert isinstance(plugins, list)
    network = BareNetwork(base, plugins, [])
    with image_root(base / "image") as rootfs:
        runtimes = {
            kind: BareRuntime(path, base, rootfs, like, root=f"runtime-{kind}")
            for kind, path in containerd.RUNTIMES.items()
        }
        yield {kind: _floor_of(network, runtime) for kind, runtime in runtimes.items()}
    node.delete_link("bhbench2")


def _floor_of(network: BareNetwork, runtime: BareRuntime) -> Life:
    return lambda: {**_bare_pod(network), **_bare_container(network, runtime)}


def _bare_pod(network: BareNetwork) -> Times:
    """As pod_life: what is made goes at once. DEL of an interface that is new waits longer."""
    name = unique("net")
    pins: list[Path] = []
    return {
        "CNI ADD": timed(lambda: pins.append(network.add(name))),
        "CNI DEL": timed(lambda: network.delete(name, pins[0])),
    }


def _bare_container(network: BareNetwork, runtime: BareRuntime) -> Times:
    """As container_life: its network does not count."""
    name = unique("bare")
    pin = network.add(f"net-{name}")
    bundle = runtime.bundle(name, pin)
    times = {
        "create": timed(lambda: runtime.create(name, bundle)),
        "start": timed(lambda: runtime.start(name)),
    }
    time.sleep(SETTLE)
    times["kill"] = timed(lambda: runtime.kill(name))
    times["delete"] = timed(lambda: runtime.delete(name))
    network.delete(f"net-{name}", pin)
    return times
