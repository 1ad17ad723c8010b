"""Runs in: the tests, `make demo` and `make bench`.

A registry with the images that whole-daemon tests run: busybox, and a larger one to pull under fire.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.registry import Image, Registry, busybox_image, make_image, make_layer, push


@dataclass(frozen=True)
class Served:
    """Where the images are, and the registries.conf that reaches them over plain HTTP."""

    address: str
    busybox: str
    larger: str
    larger_digest: str
    registries_conf: str
    registry: Registry  # to push more to


@contextlib.contextmanager
def served(*, larger_files: int = 200) -> Iterator[Served]:
    """Start a registry with both images; it ends with the context."""
    with (
        tempfile.TemporaryDirectory(prefix="bh-registry-") as directory,
        Registry(Path(directory)) as registry,
    ):
        push(registry, "test/busybox", "1", busybox_image())
        digest = push(registry, "test/larger", "1", _larger(larger_files))
        yield Served(
            registry.address,
            f"{registry.address}/test/busybox:1",
            f"{registry.address}/test/larger:1",
            digest,
            f'[[registry]]\nlocation = "{registry.address}"\ninsecure = true\n',
            registry,
        )


def _larger(files: int) -> Image:
    chance = random.Random(1)
    layers = [
        make_layer({f"data/{layer}/{n}": chance.randbytes(20_000) for n in range(files)})
        for layer in range(4)
    ]
    return make_image(layers)
