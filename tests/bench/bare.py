"""The same work by hand: the same CNI plugins and the same OCI runtime, called one after the other.

This is the floor: what no runtime can be faster than, however it is built.
"""

from __future__ import annotations

import json
import os
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
    """An OCI runtime called by hand on a bundle that it is given."""

    def __init__(self, runtime: str, directory: Path, rootfs: Path) -> None:
        self.runtime = runtime
        self.root = directory / "runtime"
        self._directory = directory
        self._rootfs = rootfs

    def bundle(self, name: str, arguments: list[str], netns: Path | None) -> Path:
        """Write a bundle with an ordinary container's config.json; return its directory."""
        path = self._directory / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(_spec(self._rootfs, arguments, netns, name)))
        return path

    def create_and_start(self, name: str, bundle: Path) -> None:
        """`create`, then `start`."""
        with (bundle / "log").open("wb") as log:
            self._call("create", "--bundle", str(bundle), name, stdout=log, stderr=log)
        self._call("start", name)

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


def _spec(rootfs: Path, arguments: list[str], netns: Path | None, name: str) -> dict[str, Any]:
    namespaces: list[dict[str, str]] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    namespaces.append({"type": "network", "path": str(netns)} if netns else {"type": "network"})
    capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": arguments,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "root": {"path": str(rootfs)},
        "hostname": "bench",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid"]},
        ],
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": f"/bulkhead-bench/{name}",
            "resources": {"cpu": {"shares": 512}, "memory": {"limit": 512 << 20}},
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/bus", "/proc/sys"],
        },
    }
