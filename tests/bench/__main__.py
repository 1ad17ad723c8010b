"""`make bench`: every figure of docs/figures.md from one run, with the peers in the same run. Prints a table.

A benchmark, never a timed test: these machines are noisy, so medians and ratios count, and nothing fails.
Names given as arguments choose a part: pods lifecycle exec stream log memory node pull recovery.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.bench.exec_ import measure as exec_
from tests.bench.figures import Figure, show
from tests.bench.lifecycle import measure as lifecycle
from tests.bench.log import measure as log
from tests.bench.memory import measure as memory
from tests.bench.node import measure as node
from tests.bench.pods import measure as pods
from tests.bench.pull import measure as pull
from tests.bench.recovery import measure as recovery
from tests.bench.stream import measure as stream
from tests.support.daemon import compile_sources

PARTS: dict[str, Callable[[], list[Figure]]] = {
    "pods": pods,
    "lifecycle": lifecycle,
    "exec": exec_,
    "stream": stream,
    "log": log,
    "memory": memory,
    "node": node,
    "pull": pull,
    "recovery": recovery,
}


def main(names: list[str]) -> None:
    """Measure the parts and print them as they come."""
    unknown = set(names) - set(PARTS)
    if unknown:
        sys.exit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    compile_sources()
    figures: list[Figure] = []
    for name in names or list(PARTS):
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        figures += PARTS[name]()
    show(figures)


if __name__ == "__main__":
    main(sys.argv[1:])
