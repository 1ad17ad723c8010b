"""Runs in: the tests.

A node whose daemon is started by a launcher from the tree that a link named `current` leads to, as packages
have it: further trees of other versions can be made, `current` switched, and the daemon upgraded in place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
