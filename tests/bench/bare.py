"""The same work by hand: the same CNI plugins and the same OCI runtime, called one after the other.

This is the floor: what no runtime can be faster than, however it is built.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

PLUGINS = "/usr/lib/cni"


class BareNetwork:
    """A CNI list run by hand in namespaces made by hand.

    `host` is a command prefix that enters the namespace that plays the host's.
    """

    def __init__(self, directory: Path, plugins: list[dict[str, Any]], host: list[str]) -> None:
        self._directory = directory
        self._plugins = plugins
        self._host = host

    def add(self, name: str) -> Path:
        """Make and pin a namespace, run ADD of every plugin; return the pin."""
        pin = self._directory / name
        pin.touch()
        subprocess.run(["unshare", f"--net={pin}", "ip", "link", "set", "lo", "up"], check=True)
        previous: dict[str, Any] | None = None
        for plugin in self._plugins:
            previous = json.loads(self._run("ADD", name, pin, plugin, previous) or "{}")
        return pin

    def delete(self, name: str, pin: Path) -> None:
        """Run DEL of every plugin in reverse, unpin."""
        for plugin in reversed(self._plugins):
            self._run("DEL", name, pin, plugin, None)
        subprocess.run(["umount", str(pin)], check=True)
        pin.unlink()

    def _run(
        self, command: str, name: str, pin: Path, plugin: dict[str, Any], previous: dict[str, Any] | None
    ) -> bytes:
        config: dict[str, Any] = {"cniVersion": "1.0.0", "name": "bench-bare", **plugin}
        if previous is not None:
            config["prevResult"] = previous
        environment = {
            "PATH": os.environ["PATH"],
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": name,
            "CNI_NETNS": str(pin),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": PLUGINS,
        }
        done = subprocess.run(
            [*self._host, f"{PLUGINS}/{plugin['type']}"],
            input=json.dumps(config).encode(),
            env=environment,
            stdout=subprocess.PIPE,
            check=True,
        )
        return done.stdout


class BareRuntime:
    """An OCI runtime called by hand. `like` is the config.json of a container that Bulkhead made."""

    def __init__(
        self, runtime: str, directory: Path, rootfs: Path, like: dict[str, Any], *, root: str = "runtime"
    ) -> None:
        self.runtime = runtime
        self.root = directory / root
        self._directory = directory
        self._rootfs = rootfs
        self._like = like

    def bundle(self, name: str, netns: Path) -> Path:
        """Write a bundle whose config.json differs in root, network and cgroup; return its directory."""
        path = self._directory / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self._spec(name, netns)))
        return path

    def _spec(self, name: str, netns: Path) -> dict[str, Any]:
        linux = dict(self._like["linux"])
        linux["namespaces"] = [
            {"type": entry["type"], **({"path": str(netns)} if entry["type"] == "network" else {})}
            for entry in linux["namespaces"]
        ]
        linux["cgroupsPath"] = f"/bulkhead-bench/{name}"
        return {**self._like, "root": {**self._like["root"], "path": str(self._rootfs)}, "linux": linux}

    def create_and_start(self, name: str, bundle: Path) -> None:
        """`create`, then `start`."""
        self.create(name, bundle)
        self.start(name)

    def create(self, name: str, bundle: Path) -> None:
        """`create`."""
        options = ["--bundle", str(bundle), "--pid-file", str(bundle / "pid")]
        with (bundle / "log").open("wb") as log:
            self._call("create", *options, name, stdout=log, stderr=log)

    def start(self, name: str) -> None:
        """`start`."""
        self._call("start", name)

    def kill(self, name: str) -> None:
        """`kill` with SIGTERM; returns when the container has ended."""
        pidfd = os.pidfd_open(int((self._directory / name / "pid").read_text()))
        try:
            self._call("kill", name, "TERM")
            select.select([pidfd], [], [], 30)
        finally:
            os.close(pidfd)

    def execute(self, name: str, *command: str) -> None:
        """`exec`."""
        self._call("exec", name, *command)

    def delete(self, name: str) -> None:
        """`delete --force`, and the bundle with it."""
        self._call("delete", "--force", name)
        shutil.rmtree(self._directory / name)

    def _call(self, *arguments: str, **kwargs: Any) -> None:
        subprocess.run(
            [self.runtime, "--root", str(self.root), *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
            **kwargs,
        )


def unique(prefix: str) -> str:
    """A name nobody else has."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"
