"""Runs in: the tests; `python -m tests.support.network_node SETTINGS LISTENER CONTROL` is the worker.

A node of its own for the network worker: a network namespace that plays the host's, a directory that plays
/etc and /run, the worker in the sandbox that the process table declares, a client that the worker takes for
`cri`, and the part of the supervisor that holds the listening socket and answers hello. The machine's own
namespace is never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ipc import kernel
from ipc.blocking import Client
from ipc.channel import Channel, Peer
from ipc.log import Log
from ipc.loop import Loop
from ipc.messages import Empty, control, network
from ipc.serve import Call, Connection
from ipc.settings import NetworkSettings
from ipc.table import Handler, table
from supervisor import sandbox
from supervisor.table import TABLE
from tests.support.leaks import Leaks, Scope
from workers import boot
from workers.network import main as network_main

CRI_UID = 64991
PLUGINS = "/usr/lib/cni"
SUBNET = "10.213.7.0/24"
_SYS_SETRESUID = {"x86_64": 117, "aarch64": 147}[platform.machine()]


class CriClient(Client):
    """A client that the worker's SO_PEERCRED takes for `cri`."""

    def __enter__(self) -> CriClient:
        return self

    def _connect(self, deadline: float | None) -> Channel:
        _become(CRI_UID)
        try:
            return super()._connect(deadline)
        finally:
            _become(0)


def _become(uid: int) -> None:
    """Change the effective uid of this thread alone: the C library would change every thread's."""
    kernel.syscall(_SYS_SETRESUID, -1, uid, -1, what="setresuid")


class Supervisor(threading.Thread):
    """Answers a worker's hello and waits for its end."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self.ready = threading.Event()
        self._loop = Loop()
        handlers = table(Handler(control.Hello, self._hello, callers={"supervisor"}))
        connection = Connection(self._loop, sock, Peer(0, 0, 0, "supervisor"), handlers)
        connection.on_close(self._loop.stop)

    def _hello(self, _call: Call, _body: control.Hello) -> Empty:
        self.ready.set()
        return Empty()

    def run(self) -> None:
        """Serve until the worker is gone."""
        self._loop.run()
        self._loop.close()


class Node:
    """One node. `start` begins a worker, `kill` ends it, `client` talks to whichever runs."""

    def __init__(self, **settings: Any) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="bh-network-"))
        self.root.chmod(0o755)
        self.netns = self.root / "host-netns"
        self.conf_dir = self.root / "net.d"
        self.run_root = self.root / "run"
        self.pins = self.run_root / "ns"
        self.records = self.run_root / "net"
        self.addresses = self.root / "addresses"
        self.fake_dir = self.root / "fake"
        for directory in (self.conf_dir, self.run_root / "ipc", self.fake_dir, self.records):
            directory.mkdir(parents=True)
        (self.records / "gc.marks").write_text("{}")  # stays: it is no pod's
        self.netns.touch()
        subprocess.run(["unshare", f"--net={self.netns}", "ip", "link", "set", "lo", "up"], check=True)
        self.settings = NetworkSettings(
            root=str(self.root),
            run_root=str(self.run_root),
            uids={CRI_UID: "cri"},
            conf_dir=str(self.conf_dir),
            bin_dirs=[str(self.fake_dir), PLUGINS],
            **settings,
        )
        self.socket_path = self.settings.ipc_socket("network")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.socket_path)
        os.chmod(self.socket_path, 0o666)
        self.listener.listen(128)
        self.worker: subprocess.Popen[bytes] | None = None
        self._supervisors: list[Supervisor] = []

    # -- the worker -----------------------------------------------------------------------------------

    def start(self) -> int:
        """Start a worker; return its pid when it has said hello."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        numbers = [str(self.listener.fileno()), str(theirs.fileno())]
        with (self.root / "worker.log").open("ab") as errors:
            self.worker = subprocess.Popen(
                [*self.enter, sys.executable, "-m", __name__, self._settings_text(), *numbers],
                pass_fds=[int(number) for number in numbers],
                stderr=errors,
                cwd=Path(__file__).parents[2],
            )
        theirs.close()
        supervisor = Supervisor(ours)
        supervisor.start()
        self._supervisors.append(supervisor)
        assert supervisor.ready.wait(20), self.log()
        return self.worker.pid

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the worker a signal and wait for its end; return its exit code."""
        assert self.worker is not None
        self.worker.send_signal(number)
        code = self.worker.wait(20)
        self.worker = None
        return code

    def client(self, timeout: float = 60.0) -> CriClient:
        """A new client, to be closed by the caller."""
        return CriClient(self.socket_path, timeout=timeout)

    def log(self) -> str:
        """What the workers logged so far."""
        return (self.root / "worker.log").read_text()

    @property
    def enter(self) -> tuple[str, ...]:
        """The command before a command that is to run in the node's network namespace."""
        return ("nsenter", f"--net={self.netns}")

    def _settings_text(self) -> str:
        return msgspec.json.encode(self.settings).decode()

    # -- configuration and fake plugins ---------------------------------------------------------------

    def write_conf(self, name: str, document: object) -> Path:
        """Write a configuration file and return its path."""
        path = self.conf_dir / name
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    def host_local(self, subnet: str = SUBNET, **more: Any) -> dict[str, Any]:
        """An `ipam` section whose addresses are kept in this node's directory."""
        return {
            "type": "host-local",
            "ranges": [[{"subnet": subnet}]],
            "dataDir": str(self.addresses),
            **more,
        }

    def bridge(self, **more: Any) -> dict[str, Any]:
        """A plugin entry of the bridge plugin."""
        keys: dict[str, Any] = {
            "type": "bridge",
            "bridge": "bhtest0",
            "isGateway": True,
            "ipam": self.host_local(),
        }
        return {**keys, **more}

    def bridge_conf(self, *more: dict[str, Any], version: str = "1.0.0", name: str = "testnet") -> Path:
        """Write a list with the bridge plugin and further ones."""
        return self.write_conf(
            "10-test.conflist", {"cniVersion": version, "name": name, "plugins": [self.bridge(), *more]}
        )

    def fake(self, name: str, script: str) -> Path:
        """Install a shell script as a plugin; it only injects faults before or after the real ones."""
        path = self.fake_dir / name
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        return path

    def held_addresses(self, network_name: str = "testnet") -> list[str]:
        """Addresses that host-local holds."""
        directory = self.addresses / network_name
        names = os.listdir(directory) if directory.is_dir() else []
        return sorted(name for name in names if name[0].isdigit())

    # -- looking into it ------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command in the node's own network namespace; return its standard output."""
        return _output(*self.enter, *command, check=check)

    def run_in(self, pod: network.PodNetwork, *command: str, check: bool = True) -> str:
        """Run a command in a pod's namespaces."""
        flags = [f"--{kind}={path}" for kind, path in pod.namespaces.items()]
        return _output("nsenter", *flags, *command, check=check)

    @contextlib.contextmanager
    def listening(
        self, pod: network.PodNetwork, port: int, *, family: int = socket.AF_INET
    ) -> Iterator[None]:
        """A TCP server in a pod that says "hello from the pod" to everybody."""
        code = (
            f"import socket; s = socket.create_server(('', {port}), family={family:d}); print(flush=True)\n"
            "while True: s.accept()[0].sendall(b'hello from the pod')"
        )
        command = ["nsenter", f"--net={pod.namespaces['net']}", sys.executable, "-c", code]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                yield
            finally:
                server.kill()

    def dial(self, address: str, port: int) -> str:
        """What a TCP server says to the node, "" if it cannot be reached."""
        code = f"import socket as s; print(s.create_connection(({address!r}, {port}), 3).recv(99).decode())"
        return self.run(sys.executable, "-c", code, check=False).strip()

    def links(self) -> set[str]:
        """Names of the links of the node, without loopback."""
        return {link["ifname"] for link in json.loads(self.run("ip", "-j", "link"))} - {"lo"}

    def firewall(self) -> list[str]:
        """Rules that plugins made, in both families."""
        saved = self.run("iptables-save").splitlines() + self.run("ip6tables-save").splitlines()
        return [line for line in saved if line.startswith("-A")]

    # -- the end --------------------------------------------------------------------------------------

    def scope(self) -> Scope:
        """What a test may leave behind on this node."""
        return Scope(
            mounts_under=(self.pins,),
            directories=(self.pins, self.records),
            host_local=(str(self.addresses / "testnet"),),
            titles=(str(self.root),),
        )

    def close(self) -> None:
        """Remove everything, whatever the test left."""
        if self.worker is not None:
            self.kill()
        for supervisor in self._supervisors:
            supervisor.join(10)
        self.listener.close()
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            target = line.split(" ")[4]
            if target.startswith(str(self.root) + "/"):
                subprocess.run(["umount", "-l", target], check=False)
        shutil.rmtree(self.root)


@contextlib.contextmanager
def node(**settings: Any) -> Iterator[Node]:
    """A node that is gone afterwards."""
    made = Node(**settings)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def serving(made: Node, *, settle: float = 5.0) -> Iterator[CriClient]:
    """A worker on the node and a client of it; nothing may be left when the block ends well."""
    leaks = Leaks(made.scope(), settle=settle)
    with leaks:
        made.start()
        with made.client() as client:
            yield client
        made.kill(signal.SIGTERM)


def pod_setup(pod_id: str = "pod0", **more: Any) -> network.PodSetup:
    """A request as `cri` sends it."""
    fields: dict[str, Any] = {
        "pod_id": pod_id,
        "name": f"name-of-{pod_id}",
        "namespace": "default",
        "uid": f"uid-of-{pod_id}",
        "namespaces": ["net", "ipc", "uts"],
        "hostname": f"host-of-{pod_id}",
    }
    return network.PodSetup(**{**fields, **more})


def wait_for(what: Any, timeout: float = 20.0) -> None:
    """Wait until a callable returns something true."""
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def _output(*command: str, check: bool) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def _worker(settings: str, listener_fd: int, control_fd: int) -> None:
    context = boot.Context(
        kind="network",
        settings=msgspec.json.decode(settings, type=NetworkSettings),
        log=Log("network", level="debug"),
        listener=socket.socket(fileno=listener_fd),
        control=socket.socket(fileno=control_fd),
    )
    declared = TABLE["network"].sandbox
    assert declared is not None
    places = {"run_root": context.settings.run_root, "root": context.settings.root}
    boot.main(network_main, context, lambda: sandbox.enter(declared, sandbox.Identity(0, 0), places))


if __name__ == "__main__":
    _worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
