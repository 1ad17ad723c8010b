"""Runs in: a program (`make test-soak`). A day in an hour: 2,000 pods, 8 at a time, and a picture of it.

Ends with an error if a request failed, if memory or descriptors of a process grow after warm-up, or if
anything is left behind.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.soak.curves import Curves, growth
from tests.soak.load import Load
from tests.soak.picture import draw
from tests.support import machine
from tests.support.daemon import Node
from tests.support.images import served

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "soak.png"


def main() -> None:
    """Run it, print what was done, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    machine.enter()
    begun = time.monotonic()
    with (
        served(larger_files=100) as images,
        Node(registries=images.registries_conf, bridge="bhsoak0", log_level="warning") as node,
    ):
        with Curves(node) as curves:
            done = Load(node, images).run(at_once=options.at_once, pods=options.pods)
        seconds = time.monotonic() - begun
        counts = ", ".join(f"{number} {what}" for what, number in sorted(done.counts.items()))
        draw(curves.samples, options.picture, f"{counts} in {seconds:.0f} s, {options.at_once} at a time")
    print(f"{counts} in {seconds:.0f} s")
    trouble = [*done.errors, *growth(curves.samples)]
    print("\n".join(trouble) or "no error, no growth, nothing left behind")
    sys.exit(bool(trouble))


if __name__ == "__main__":
    main()
