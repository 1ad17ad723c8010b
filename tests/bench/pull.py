"""Runs in: `make bench`.

An image of 500 MB and 12,000 files in five gzip layers, pulled from a registry on loopback: by Bulkhead
through its CRI socket, by skopeo into containers-storage (overlay), and by containerd. In turns, each from
nothing, all on the same file system.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path

from ipc.cri import api_pb2
from tests.bench.figures import Figure, at_most, timed
from tests.support import machine
from tests.support.daemon import Node, wait_for
from tests.support.registry import Layer, Registry, digest_of, make_image, make_tar, push

ROUNDS = 3
LAYERS = 5
FILES = 2_400  # in a layer
LAYER_BYTES = 100_000_000
COMPRESSION = 6  # what docker build uses
TEXT = b"the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs\n"


def measure() -> list[Figure]:
    """Pull times, the median of some rounds."""
    machine.enter()
    with tempfile.TemporaryDirectory(prefix="bhbench-", dir="/tmp") as directory:
        base = Path(directory)
        with Registry(base / "registry") as registry, Node(registries=_insecure(registry)) as node:
            push(registry, "bench/large", "1", make_image(_layers()))
            reference = f"{registry.address}/bench/large:1"
            return _compare(base, node, reference)


def _compare(base: Path, node: Node, reference: str) -> list[Figure]:
    with containerd(base / "containerd") as pull_by_containerd:
        pulls: dict[str, Callable[[], float]] = {
            "ours": lambda: pull_by_bulkhead(node, reference),
            "skopeo": lambda: pull_by_skopeo(base / "skopeo", reference),
            "containerd": lambda: pull_by_containerd(reference),
        }
        times: dict[str, list[float]] = {name: [] for name in pulls}
        for _ in range(ROUNDS):
            for name, pull in pulls.items():
                os.sync()  # nobody pays for the pages that another one has left
                times[name].append(pull())
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    what = "pull, 500 MB, 12,000 files, against "
    return [
        at_most(what + "skopeo copy", median["ours"], median["skopeo"], 1, "s", 1),
        at_most(what + "containerd", median["ours"], median["containerd"], 1, "s", 1),
    ]


# -- the image ----------------------------------------------------------------------------------------------


def _insecure(registry: Registry) -> str:
    return f'[[registry]]\nlocation = "{registry.address}"\ninsecure = true\n'


def _layers() -> Sequence[Layer]:
    with Pool(2) as pool:
        return pool.map(_layer, range(LAYERS))


def _layer(number: int) -> Layer:
    """One layer: small files and some large ones, half of each text and half noise."""
    chance = random.Random(number)
    weights = [chance.lognormvariate(0, 1.6) for _ in range(FILES)]
    scale = LAYER_BYTES / sum(weights)
    files = {
        f"opt/app{number}/part{n // 50}/file{n}": _content(chance, int(weight * scale))
        for n, weight in enumerate(weights)
    }
    tar = make_tar(files)
    packer = zlib.compressobj(COMPRESSION, wbits=31)
    return Layer(packer.compress(tar) + packer.flush(), digest_of(tar))


def _content(chance: random.Random, size: int) -> bytes:
    noise = chance.randbytes(size // 2)
    words = TEXT * ((size - len(noise)) // len(TEXT) + 1)
    return noise + words[: size - len(noise)]


# -- those who pull -----------------------------------------------------------------------------------------


def pull_by_bulkhead(node: Node, reference: str) -> float:
    """PullImage through the socket; the image is removed again."""
    spec = api_pb2.ImageSpec(image=reference)
    pull = api_pb2.PullImageRequest(image=spec)
    seconds = timed(lambda: node.images.PullImage(pull, timeout=300))
    node.images.RemoveImage(api_pb2.RemoveImageRequest(image=spec), timeout=60)
    layers = node.state / "layers"
    wait_for(lambda: not [name for name in os.listdir(layers) if len(name) >= 64], "the layers are gone", 60)
    return seconds


def pull_by_skopeo(base: Path, reference: str) -> float:
    """`skopeo copy` into a containers-storage of its own."""
    base.mkdir()
    configuration = base / "storage.conf"
    configuration.write_text('[storage]\ndriver = "overlay"\n')
    target = f"containers-storage:[overlay@{base}/root+{base}/run]{reference}"
    command = ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{reference}", target]
    environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(configuration), "TMPDIR": str(base)}
    seconds = timed(lambda: subprocess.run(command, check=True, env=environment))
    subprocess.run(["umount", str(base / "root/overlay")], check=False, capture_output=True)
    shutil.rmtree(base)
    return seconds


@contextlib.contextmanager
def containerd(base: Path) -> Iterator[Callable[[str], float]]:
    """A containerd of its own; gives the function that pulls with it and removes the image again."""
    base.mkdir()
    socket = base / "sock"
    (base / "config.toml").write_text(
        f'version = 2\nroot = "{base}/root"\nstate = "{base}/state"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{socket}"\n'
    )
    ctr = ["ctr", "--address", str(socket)]
    with (base / "log").open("wb") as log:
        command = ["containerd", "--config", str(base / "config.toml")]
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(
            lambda: subprocess.run([*ctr, "version"], check=False, capture_output=True).returncode == 0,
            "containerd answers",
        )
        yield lambda reference: _pull_by_ctr(ctr, reference)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)


def _pull_by_ctr(ctr: list[str], reference: str) -> float:
    pull = [*ctr, "images", "pull", "--plain-http", reference]
    seconds = timed(lambda: subprocess.run(pull, check=True, stdout=subprocess.DEVNULL))
    subprocess.run([*ctr, "images", "rm", "--sync", reference], check=True, stdout=subprocess.DEVNULL)
    return seconds


def main() -> None:
    """This part alone."""
    from tests.bench.figures import show

    begun = time.monotonic()
    show(measure())
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
