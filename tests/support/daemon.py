"""Runs in: the tests, `make demo` and `make bench`.

A node of its own with the whole of Bulkhead on it: directories that play /etc, /run and /var/lib, CNI with
the real bridge plugin, and `bulkhead serve` in front of it all. It stands in the namespaces of the test run
(tests/support/machine.py), so the machine's own network and mounts are never touched. `close` ends everything
and returns what was left behind (nothing, or it is a bug).
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc

from ipc import kernel
from ipc.blocking import Client
from ipc.cri import api_pb2, api_pb2_grpc, rpc
from ipc.errors import RemoteError
from ipc.messages.supervisor import WorkerList, WorkerState
from supervisor.cgroup import instance_name
from tests.support import machine
from tests.support.service_manager import ServiceManager

REPO = Path(__file__).resolve().parents[2]
PLUGINS = "/usr/lib/cni"
CGROUPS = Path("/sys/fs/cgroup")
SUBNET = "10.214.0.0/16"
NETWORK = "bulkhead-test"
START_SECONDS = 30.0
OUTLIVING = ("supervisor", "monitor", "init", "stream")  # the last one if it has sessions
T = TypeVar("T")


def wait_for(condition: Callable[[], T | None], what: str, seconds: float = 20.0) -> T:
    """Return the first true value of `condition`. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.01)


class Node:
    """One node with one daemon; use as a context manager, which starts it and closes it without a trace."""

    def __init__(
        self,
        *,
        config: str = "",
        registries: str = "",
        log_level: str = "info",
        bridge: str = "bhbr0",
        run_in_memory: bool = False,
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="bh-", dir="/tmp"))
        self.root.chmod(0o755)
        self.run_root = self.root / "run"
        self.state = self.root / "state"
        self.conf_dir = self.root / "net.d"
        self.addresses = self.root / "addresses"
        self.logs = self.root / "logs"
        self.socket = self.run_root / "bulkhead.sock"
        self.log_level = log_level
        self.bridge = bridge
        self.daemon: subprocess.Popen[bytes] | None = None
        self.manager: ServiceManager | None = None  # whose service the daemon is
        self._channel: grpc.Channel | None = None
        for directory in (self.conf_dir, self.logs, self.root / "bulkhead.toml.d"):
            directory.mkdir()
        if run_in_memory:  # as /run is
            self.run_root.mkdir()
            kernel.mount("run", str(self.run_root), "tmpfs", data="mode=755")
        (self.conf_dir / "10-test.conflist").write_text(json.dumps(self.conflist(bridge)))
        self.registries_conf = self.root / "registries.conf"
        self.registries_conf.write_text(registries)
        self.config = self.root / "bulkhead.toml"
        self.config.write_text(self._config_text() + config)

    def conflist(self, bridge: str) -> dict[str, Any]:
        """The CNI list: bridge, portmap."""
        ipam = {
            "type": "host-local",
            "ranges": [[{"subnet": SUBNET}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(self.addresses),
        }
        plugins = [
            {"type": "bridge", "bridge": bridge, "isGateway": True, "hairpinMode": True, "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]
        return {"cniVersion": "1.0.0", "name": NETWORK, "plugins": plugins}

    def _config_text(self) -> str:
        return (
            f'[image]\nregistries_conf = "{self.registries_conf}"\n'
            f'registries_conf_dir = "{self.root}/registries.conf.d"\n'
            f'certs_dirs = ["{self.root}/certs.d"]\n'
        )

    # -- the daemon -----------------------------------------------------------------------------------

    def command(self) -> list[str]:
        """The daemon's command line."""
        return [
            *(sys.executable, "-m", "supervisor", "serve"),
            *("--config", str(self.config), "--config-dir", str(self.root / "bulkhead.toml.d")),
            *("--root", str(self.state), "--run-root", str(self.run_root), "--listen", str(self.socket)),
            *("--cni-conf-dir", str(self.conf_dir), "--cni-bin-dir", PLUGINS),
            *("--log-level", self.log_level),
        ]

    def start(self) -> float:
        """Start the daemon, wait until its socket answers; return the seconds that took."""
        began = time.monotonic()
        command, environment, fds = self.command(), dict(os.environ), list[int]()
        if self.manager is not None:
            command, environment, fds = self.manager.service(command)
        with (self.root / "daemon.log").open("ab") as log:
            self.daemon = subprocess.Popen(
                command,
                cwd=REPO,
                env=environment,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.wait_ready()
        return time.monotonic() - began

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until Version is answered. Raises AssertionError with the end of the log."""
        end = time.monotonic() + seconds
        while not self.answers():
            assert self.daemon is None or self.daemon.poll() is None, f"the daemon ended\n{self.log_tail()}"
            assert time.monotonic() < end, f"no answer within {seconds} s\n{self.log_tail()}"
            time.sleep(0.01)

    def answers(self) -> bool:
        """Say whether the CRI socket answers just now."""
        if not self.socket.exists():
            return False
        with self._new_channel() as channel, contextlib.suppress(grpc.RpcError):
            rpc.runtime_client(channel).Version(api_pb2.VersionRequest(), timeout=1)
            return True
        return False

    def stop(self) -> None:
        """SIGTERM; wait for the end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the supervisor; wait for its end and for that of its workers."""
        workers = [worker.pid for worker in self.workers() if worker.pid and worker.kind not in OUTLIVING]
        self._end(signal.SIGKILL)
        wait_for(lambda: not any(alive(pid) for pid in workers), "workers end with their supervisor")

    def restart_ended(self) -> None:
        """The supervisor has been killed by somebody: start it again, as the service manager would."""
        assert self.daemon is not None
        self.daemon.wait(30)
        self.start()

    def _end(self, number: int) -> None:
        assert self.daemon is not None
        self.daemon.send_signal(number)
        self.daemon.wait(30)
        self.daemon = None

    def log_tail(self, lines: int = 60) -> str:
        """The end of the daemon's log."""
        text = (self.root / "daemon.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    # -- clients --------------------------------------------------------------------------------------

    def _new_channel(self) -> grpc.Channel:
        options = [
            ("grpc.max_receive_message_length", 256 << 20),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 200),
        ]
        return grpc.insecure_channel(f"unix:{self.socket}", options=options)

    @property
    def channel(self) -> grpc.Channel:
        """One channel for the node's life; it reconnects by itself."""
        if self._channel is None:
            self._channel = self._new_channel()
        return self._channel

    @property
    def runtime(self) -> api_pb2_grpc.RuntimeServiceStub:
        """RuntimeService."""
        return rpc.runtime_client(self.channel)

    @property
    def images(self) -> api_pb2_grpc.ImageServiceStub:
        """ImageService."""
        return rpc.image_client(self.channel)

    def ctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run bulkheadctl against this node."""
        command = [sys.executable, "-m", "supervisor.cli.bulkheadctl"]
        command += ["-r", str(self.socket), "--run-root", str(self.run_root), *words]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}\n{self.log_tail()}"
        return done

    def workers(self) -> list[WorkerState]:
        """Every process, as the supervisor tells it."""
        with Client(str(self.run_root / "ipc" / "supervisor.sock"), timeout=10) as client:
            return client.call(WorkerList()).workers

    def pids(self, kind: str) -> list[int]:
        """Pids of a kind's processes."""
        return [worker.pid for worker in self.workers() if worker.kind == kind and worker.pid]

    def kill_worker(self, kind: str, number: int = signal.SIGKILL) -> list[int]:
        """Signal every process of a kind; return their pids."""
        pids = self.pids(kind)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    # -- the end --------------------------------------------------------------------------------------

    def remove_everything(self) -> None:
        """Stop and remove every pod, remove every image."""
        for pod in self.runtime.ListPodSandbox(api_pb2.ListPodSandboxRequest(), timeout=30).items:
            self.runtime.StopPodSandbox(api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=60)
            self.runtime.RemovePodSandbox(api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=60)

    def leftovers(self) -> list[str]:
        """What pods and containers have left behind: mounts, pins, addresses, links, cgroups, processes."""
        return [*self._left_mounts(), *self._left_directories(), *self._left_links(), *self._left_cgroups()]

    def _left_mounts(self) -> Iterator[str]:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            target = line.split()[4]
            if target.startswith(f"{self.root}/") and target != str(self.run_root):
                yield f"mount {target}"

    def _left_directories(self) -> Iterator[str]:
        watched = [self.run_root / name for name in ("ns", "monitors", "pods", "containers", "inits")]
        for directory in [*watched, self.state / "containers", self.state / "staging"]:
            for entry in os.listdir(directory) if directory.is_dir() else []:
                if not entry.startswith("."):  # inits/.empty, the root of all inits
                    yield f"{directory.name} {entry}"
        network = self.run_root / "net"
        for path in network.glob("*.json") if network.is_dir() else []:
            yield f"network record {path.name}"
        held = self.addresses / NETWORK
        for name in os.listdir(held) if held.is_dir() else []:
            if name[0].isdigit():
                yield f"address {name}"

    def _left_links(self) -> Iterator[str]:
        listing = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            name = line.split(": ")[1].split("@")[0]
            if name.startswith("veth"):
                yield f"link {name}"

    def _left_cgroups(self) -> Iterator[str]:
        """Groups of containers and inits, below the parent that all pods of this instance share."""
        return self._groups(f"{self._instance}.pods/*")

    def _left_instance(self) -> Iterator[str]:
        """Groups of the instance itself, which go with the daemon."""
        return self._groups(f"{self._instance}*")

    def _groups(self, pattern: str) -> Iterator[str]:
        for path in CGROUPS.glob(f"*/{pattern}"):
            if path.is_dir() and not path.is_relative_to(machine.UNIFIED):  # crun's directories, no groups
                yield f"cgroup {path}"

    @property
    def _instance(self) -> str:
        return instance_name(str(self.run_root))

    def close(self) -> list[str]:
        """Remove all pods, stop the daemon, remove the node; return what the pods had left behind."""
        left: list[str] = []
        try:
            if (
                self.daemon is None
                and (self.run_root / "monitors").is_dir()
                and os.listdir(self.run_root / "monitors")
            ):
                self.start()
            if self.daemon is not None and self.daemon.poll() is None:
                self.remove_everything()
                left = self._settled_leftovers()
                self.stop()
                left += self._left_instance()
        finally:
            self._tear_down()
        return left

    def _settled_leftovers(self) -> list[str]:
        end = time.monotonic() + 10
        while (left := self.leftovers()) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def _tear_down(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self.daemon is not None and self.daemon.poll() is None:
            self._end(signal.SIGKILL)
        self._kill_strays()
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            target = line.split()[4]
            if target.startswith(f"{self.root}/"):
                subprocess.run(["umount", "-l", target], check=False, capture_output=True)
        # the next node has the same subnet: routes of this one's bridge would lead its packets astray
        self.delete_link(self.bridge)
        shutil.rmtree(self.root, ignore_errors=True)

    @staticmethod
    def delete_link(name: str) -> None:
        """Delete a link of the run's network namespace, if it is there."""
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)

    def _kill_strays(self) -> None:
        """End monitors, inits and containers that this node's daemon started and that outlived it."""
        marker = str(self.root).encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if _belongs(entry, marker):
                        os.kill(int(entry.name), signal.SIGKILL)

    def __enter__(self) -> Node:
        try:
            self.start()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stderr.write(self.log_tail() + "\n")
            with contextlib.suppress(Exception):
                self.close()
            return
        left = self.close()
        assert left == [], f"left behind: {left}"


def _belongs(entry: Path, marker: bytes) -> bool:
    """A process belongs to a node if its mounts or its open files lie there."""
    if (entry / "exe").resolve() == Path("/") or b"pytest" in (entry / "cmdline").read_bytes():
        return False
    if marker in (entry / "environ").read_bytes() or marker in (entry / "cmdline").read_bytes():
        return True
    root = (entry / "mountinfo").read_bytes().split(b"\n", 1)[0]
    return marker in root


def compile_sources() -> None:
    """Byte code beside the sources, as an installed Bulkhead has it: to compile at each start costs 8 MB."""
    for package in ("ipc", "supervisor", "workers"):
        compileall.compile_dir(REPO / package, quiet=1)


def environment() -> dict[str, str]:
    """The environment of a daemon as systemd gives it, not as a developer's shell has it."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}


def alive(pid: int) -> bool:
    """Say whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def supervisor_answers(run_root: Path) -> bool:
    """Say whether the supervisor's own socket answers."""
    with (
        contextlib.suppress(RemoteError),
        Client(str(run_root / "ipc" / "supervisor.sock"), timeout=1) as client,
    ):
        client.call(WorkerList())
        return True
    return False
