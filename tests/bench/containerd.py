"""Runs in: `make bench`. A containerd of its own with its CRI on, beside the node that is measured.

It stands in the same namespaces, with a CNI list of the same plugins (another bridge and subnet), the same
runtime binaries, and images from the same registry. It owns a directory and a tmpfs over /run/containerd,
where its shims put their sockets, and leaves neither mounts nor processes behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from ipc import kernel
from ipc.cri import api_pb2 as cri
from ipc.cri import api_pb2_grpc, rpc
from tests.support.daemon import PLUGINS, wait_for

SHIMS = "/run/containerd"
RUNTIMES = {"crun": "/usr/bin/crun", "runc": "/usr/sbin/runc"}


class Containerd:
    """What the measured work needs of a node; made by `running`."""

    def __init__(self, base: Path) -> None:
        self.logs = base / "logs"
        self.socket = base / "sock"
        self._channel = grpc.insecure_channel(f"unix:{self.socket}")

    @property
    def runtime(self) -> api_pb2_grpc.RuntimeServiceStub:
        """RuntimeService."""
        return rpc.runtime_client(self._channel)

    def pull(self, references: Sequence[str]) -> None:
        """Pull images from the registry on loopback."""
        for reference in references:
            command = ["ctr", "--address", str(self.socket), "--namespace", "k8s.io", "images", "pull"]
            subprocess.run([*command, "--plain-http", reference], check=True, stdout=subprocess.DEVNULL)

    def ready(self) -> bool:
        """Say whether the runtime and its network are."""
        with contextlib.suppress(grpc.RpcError):
            conditions = self.runtime.Status(cri.StatusRequest(), timeout=2).status.conditions
            return all(condition.status for condition in conditions)
        return False

    def close(self) -> None:
        """Remove every pod, end the connection."""
        for pod in self.runtime.ListPodSandbox(cri.ListPodSandboxRequest(), timeout=30).items:
            self.runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=60)
            self.runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=60)
        self._channel.close()


@contextlib.contextmanager
def running(base: Path, conflist: dict[str, Any], pause_image: str) -> Iterator[Containerd]:
    """Start one below `base`, whose mounts are gone at the end."""
    for name in ("logs", "net.d", "state"):
        (base / name).mkdir(parents=True)
    (base / "net.d" / "10-bench.conflist").write_text(json.dumps(conflist))
    (base / "config.toml").write_text(_config(base, pause_image))
    with _tmpfs(Path(SHIMS)), _tmpfs(base / "state"), (base / "log").open("wb") as log:
        command = ["containerd", "--config", str(base / "config.toml")]
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            made = Containerd(base)
            wait_for(made.ready, "containerd is ready")
            yield made
            made.close()
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)


def _config(base: Path, pause_image: str) -> str:
    plugin = 'plugins."io.containerd.grpc.v1.cri"'
    runtimes = "".join(
        f'[{plugin}.containerd.runtimes.{name}]\nruntime_type = "io.containerd.runc.v2"\n'
        f'[{plugin}.containerd.runtimes.{name}.options]\nBinaryName = "{path}"\n'
        for name, path in RUNTIMES.items()
    )
    return (
        f'version = 2\nroot = "{base}/root"\nstate = "{base}/state"\n[grpc]\naddress = "{base}/sock"\n'
        f'[{plugin}]\nsandbox_image = "{pause_image}"\n'
        "disable_apparmor = true\nrestrict_oom_score_adj = true\n"
        f'[{plugin}.cni]\nbin_dir = "{PLUGINS}"\nconf_dir = "{base}/net.d"\n'
        f'[{plugin}.containerd]\nsnapshotter = "overlayfs"\ndefault_runtime_name = "crun"\n{runtimes}'
    )


@contextlib.contextmanager
def _tmpfs(path: Path) -> Iterator[None]:
    """A tmpfs on a directory, which goes again if it was not there."""
    there = path.is_dir()
    path.mkdir(parents=True, exist_ok=True)
    kernel.mount("bench", str(path), "tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)
        if not there:
            os.rmdir(path)
