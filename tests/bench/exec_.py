"""Runs in: `make bench`.

ExecSync of `true` through the CRI socket, against the OCI runtime's `exec` by hand, in turns in the same
container.
"""

from __future__ import annotations

import statistics
import subprocess

from tests.bench.figures import Figure, at_most, timed
from tests.bench.world import Pods
from tests.support import machine
from tests.support.daemon import Node
from tests.support.images import served

ROUNDS = 60
WARM = 5


def measure() -> list[Figure]:
    """Medians of both."""
    machine.enter()
    with served() as images, Node(registries=images.registries_conf) as node:
        node.ctl("pull", images.busybox)
        pods = Pods(node, images.busybox)
        pod = pods.run("exec")
        container = pods.create(pod, "exec", ["sleep", "1000"])
        pods.start(container)
        bare = [
            "/usr/bin/crun",
            "--root",
            str(node.run_root / "runtimes" / "crun"),
            "exec",
            container,
            "true",
        ]
        ours, theirs = [], []
        for _ in range(WARM + ROUNDS):
            ours.append(timed(lambda: pods.execute(container, "true")))
            theirs.append(timed(lambda: subprocess.run(bare, check=True, stdin=subprocess.DEVNULL)))
    median, floor = (statistics.median(seconds[WARM:]) for seconds in (ours, theirs))
    return [at_most("ExecSync of true, against crun exec by hand", median, floor, 1.5)]
