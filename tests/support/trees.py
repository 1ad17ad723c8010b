"""Runs in: the tests.

A node whose daemon is started by a launcher from the tree that a link named `current` leads to, as packages
have it: further trees of other versions can be made, `current` switched, and the daemon upgraded in place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from ipc.cri import api_pb2_grpc, rpc
from tests.support.daemon import REPO, Node

LAUNCHER = """#!{python} -B
import os, sys
sys.path.insert(0, os.path.realpath({current!r}))
from supervisor.cli.bulkhead import main
sys.exit(main())
"""


class TreeNode(Node):
    """A node with trees."""

    def __init__(self, version: str, *, registries: str, bridge: str, config: str = "") -> None:
        super().__init__(registries=registries, bridge=bridge, config=config)
        self.library = self.root / "lib"
        self.library.mkdir()
        self.launcher = self.root / "bulkhead"
        self.write_launcher(sys.executable)
        self.make_tree(version)
        self.switch(version)

    def write_launcher(self, python: str) -> None:
        """Have the program started by this interpreter."""
        self.launcher.write_text(LAUNCHER.format(python=python, current=str(self.library / "current")))
        self.launcher.chmod(0o755)

    def make_tree(self, version: str) -> Path:
        """Install a build of this version."""
        tree = self.library / version
        for package in ("ipc", "supervisor", "workers"):
            shutil.copytree(
                REPO / package, tree / package
            )  # with byte code, which knows its source by its time
        (tree / f"bulkhead_cri-{version}.dist-info").mkdir()
        return tree

    def switch(self, version: str) -> None:
        """Make `current` name a tree."""
        (self.library / "current.new").symlink_to(version)
        os.rename(self.library / "current.new", self.library / "current")

    def command(self) -> list[str]:
        command = super().command()
        return [str(self.launcher), *command[command.index("serve") :]]

    def upgrade(self, version: str = "") -> subprocess.CompletedProcess[str]:
        """Switch, and upgrade in place."""
        if version:
            self.switch(version)
        flags = self.command()[2:]
        return subprocess.run(
            [str(self.launcher), "upgrade", *flags], capture_output=True, text=True, check=False
        )


@dataclass
class Load:
    """Clients that ask without end, each on a channel of its own, and what they met with."""

    node: Node
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def running(self, **clients: Callable[[api_pb2_grpc.RuntimeServiceStub, int], object]) -> Iterator[None]:
        """Each client's function gets a stub and the number of the turn."""
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._ask, args=(name, ask, stop)) for name, ask in clients.items()
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _ask(
        self,
        name: str,
        ask: Callable[[api_pb2_grpc.RuntimeServiceStub, int], object],
        stop: threading.Event,
    ) -> None:
        with self.node._new_channel() as channel:
            runtime = rpc.runtime_client(channel)
            while not stop.is_set():
                began = time.monotonic()
                try:
                    ask(runtime, self.counts[name])
                except (grpc.RpcError, AssertionError) as error:
                    self.errors.append(f"{name}: {error}")
                self.counts[name] += 1
                self.slowest[name] = max(self.slowest.get(name, 0.0), time.monotonic() - began)
                time.sleep(0.02)
