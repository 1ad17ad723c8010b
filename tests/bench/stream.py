"""Runs in: `make bench`.

Streaming sessions over SPDY: how long an exec takes from its token to its exit code, against the runtime's
exec by hand; how fast much output comes out of an exec and out of a forwarded port, against containerd
with the same client, in turns; what 200 sessions cost on which nothing moves.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from urllib.parse import urlsplit

from ipc.cri import api_pb2 as cri
from tests.bench import beside
from tests.bench.bench_monitor import memory_of
from tests.bench.figures import Figure, at_most, timed
from tests.bench.world import Pods
from tests.support import machine
from tests.support.daemon import Node
from tests.support.monitor_process import children_of
from tests.support.stream_clients import Spdy

ROUNDS, WARM = 40, 5
SIZE = 1 << 30
TURNS = 5
PORT = 7000
SESSIONS = 200
SERVE = f"truncate -s {SIZE} /big; exec nc -ll -p {PORT} -e cat /big"
_CHUNK = 1 << 20


def measure() -> list[Figure]:
    """All of it."""
    machine.enter()
    with beside.running() as both:
        ours, theirs = Side(both.ours("crun")), Side(both.theirs("crun"))
        return [
            _round_trip(both.node, ours),
            *(_throughput(name, ours, theirs) for name in ("exec", "port-forward")),
            _idle(both.node, ours),
        ]


class Side:
    """A node with a container that has something to give."""

    def __init__(self, pods: Pods) -> None:
        self._pods = pods
        self._pod = pods.run("stream")
        self.container = pods.create(self._pod, "stream", ["sh", "-c", SERVE])
        pods.start(self.container)
        pods.execute(
            self.container, "sh", "-c", f"until grep -q :{PORT:X} /proc/net/tcp*; do sleep 0.1; done"
        )

    def execute(self, *command: str) -> Spdy:
        """A session of `command`, all its streams open."""
        request = cri.ExecRequest(container_id=self.container, cmd=command, stdout=True, stderr=True)
        client = _connected(self._pods.runtime.Exec(request, timeout=60).url, "v4.channel.k8s.io")
        client.open("error", "stdout", "stderr")
        return client

    def forward(self) -> Spdy:
        """A session with one connection to the port."""
        request = cri.PortForwardRequest(pod_sandbox_id=self._pod)
        client = _connected(self._pods.runtime.PortForward(request, timeout=60).url, "portforward.k8s.io")
        for stream, kind in ((1, "error"), (3, "data")):
            headers = {"streamtype": kind, "port": str(PORT), "requestid": "1"}
            client.sock.sendall(client.headers.syn_stream(stream, headers))
        return client

    def much(self, name: str) -> float:
        """The seconds in which all of it has come."""
        client: list[Spdy] = []
        opened: Callable[[], Spdy] = self.forward if name == "port-forward" else self._cat
        seconds = timed(lambda: _drain(opened, client))
        client[0].sock.close()
        return seconds

    def _cat(self) -> Spdy:
        return self.execute("cat", "/big")


def _connected(url: str, protocol: str) -> Spdy:
    parts = urlsplit(url)
    sock = socket.create_connection((str(parts.hostname), parts.port or 0), timeout=60)
    return Spdy.connect(sock, parts.path, protocol)


def _drain(opened: Callable[[], Spdy], clients: list[Spdy]) -> None:
    """Read until SIZE bytes of stream 3 are there; frames are walked over, nothing is kept."""
    clients.append(opened())
    sock = clients[0].sock
    assert isinstance(sock, socket.socket)
    buffer, come = bytearray(), 0
    while come < SIZE:
        piece = sock.recv(_CHUNK)
        assert piece, f"{come} bytes came"
        buffer += piece
        come += _walk(buffer)


def _walk(buffer: bytearray) -> int:
    """Take whole frames off; how many bytes of stream 3 were in them."""
    at, found = 0, 0
    while len(buffer) - at >= 8:
        first, second = struct.unpack_from(">II", buffer, at)
        size = second & 0xFFFFFF
        if len(buffer) - at - 8 < size:
            break
        found += size if first == 3 else 0
        at += 8 + size
    del buffer[:at]
    return found


# -- figures ------------------------------------------------------------------------------------------------


def _round_trip(node: Node, ours: Side) -> Figure:
    def session() -> None:
        client = ours.execute("true")
        client.to_end()
        assert client.text("error") == b'{"status":"Success"}', client.text("error")
        client.sock.close()

    root = str(node.run_root / "runtimes" / "crun")
    bare = ["/usr/bin/crun", "--root", root, "exec", ours.container, "true"]
    mine, floor = [], []
    for _ in range(WARM + ROUNDS):
        mine.append(timed(session))
        floor.append(timed(lambda: subprocess.run(bare, check=True, stdin=subprocess.DEVNULL)))
    median, by_hand = (statistics.median(column[WARM:]) for column in (mine, floor))
    return at_most("exec of true, token to exit code, against crun exec by hand", median, by_hand, 2)


def _throughput(name: str, ours: Side, theirs: Side) -> Figure:
    columns: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for column, side in zip(columns, (ours, theirs), strict=True):
            column.append(side.much(name))
    mine, peers = (SIZE / (1 << 20) / statistics.median(column) for column in columns)
    return Figure(
        f"throughput of {name}, against containerd",
        f"{mine:.0f} MiB/s",
        f"{peers:.0f} MiB/s",
        f"{mine / peers:.2f}",
        "at least 1",
        mine >= peers,
    )


def _idle(node: Node, ours: Side) -> Figure:
    """What a session adds to the worker's and the hand's own memory."""
    with ExitStack() as stack:
        _open(1, ours, stack)
        before = _memory(node)
        _open(SESSIONS, ours, stack)
        each = (_memory(node) - before) / SESSIONS * 1024
        assert len(node.pids("stream")) == 1
    name = f"one of {SESSIONS} idle sessions in one worker, private"
    return Figure(name, f"{each:.0f} kB", "-", "-", "at most 100 kB", each <= 100)


def _open(count: int, ours: Side, stack: ExitStack) -> None:
    for _ in range(count):
        client = ours.execute("sh", "-c", "echo ready; exec sleep 1000")
        stack.callback(client.sock.close)
        while client.text("stdout") != b"ready\n":
            client.frame()


def _memory(node: Node) -> float:
    """MB of the worker's own and of the monitors' own, with what they have forked of themselves."""
    keepers = node.pids("monitor")
    program = os.readlink(f"/proc/{keepers[0]}/exe")
    hands = [pid for keeper in keepers for pid in children_of(keeper) if _runs(pid, program)]
    return sum(memory_of(pid)[0] for pid in (*node.pids("stream"), *keepers, *hands))


def _runs(pid: int, program: str) -> bool:
    return os.readlink(f"/proc/{pid}/exe") == program
