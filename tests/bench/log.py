"""Runs in: `make bench`. Log throughput of one container, against conmon with the same writer."""

from __future__ import annotations

from tests.bench import bench_monitor
from tests.bench.figures import Figure
from tests.support import machine


def measure() -> list[Figure]:
    """Bytes of the container's output a second, until all of it is in the log."""
    machine.enter()
    return bench_monitor.measure_log()
