"""What is too much, through the whole daemon: each flood has an end that is told, and a bound on memory, and
the node's other pods are served meanwhile."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import statistics
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from ipc.cri import rpc
from tests.support import machine
from tests.support.daemon import CGROUPS, Node, wait_for
from tests.support.images import served
from tests.support.kubelet import SHELL, Kubelet, refusal
from tests.support.monitor_process import children_of
from tests.support.registry import Layer, make_image, make_layer, push

MIB = 1 << 20
ENTRIES = 2_000
CONFIG = f"[storage]\nunpack_max_entries = {ENTRIES}\nunpack_max_bytes = {200 * MIB}\n"
PARENT = f"/bhflood-{os.getpid()}"
TASKS = 60
CLIENTS, EACH = 8, 100  # of the flood of requests
BOMB = 3 << 30


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    machine.enter()
    with (
        served(larger_files=1) as images,
        Node(registries=images.registries_conf + ENDLESS, config=CONFIG, bridge="bhflood0") as node,
    ):
        made = Kubelet(node, images)
        made.pull("busybox")
        yield made


@pytest.fixture(autouse=True)
def clean(kubelet: Kubelet) -> Iterator[None]:
    yield
    kubelet.node.remove_everything()
    assert kubelet.node._settled_leftovers() == []


class Watch:
    """Looks on while something floods: another pod's exec, and the memory of every process of the daemon."""

    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet = kubelet
        self._neighbour = kubelet.running()
        self._over = threading.Event()
        self.seconds: list[float] = []
        self.grown = 0
        self._before = self._memory()
        self.quiet = statistics.median(self._probe() for _ in range(5))

    def __enter__(self) -> Watch:
        self._threads = [threading.Thread(target=work) for work in (self._probes, self._weigh)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def check(self, megabytes: int) -> None:
        """The neighbour was served all the time, and memory has not grown by more."""
        assert self.seconds, "the neighbour was served at least once"
        assert statistics.median(self.seconds) < max(1.0, 10 * self.quiet)
        assert self.grown < megabytes * MIB, f"grown by {self.grown / MIB:.0f} MiB"

    def _probes(self) -> None:
        self.seconds.append(self._probe())
        while not self._over.wait(0.02):
            self.seconds.append(self._probe())

    def _probe(self) -> float:
        began = time.monotonic()
        assert self._kubelet.execute(self._neighbour, "echo", "here") == "here\n"
        return time.monotonic() - began

    def _weigh(self) -> None:
        while not self._over.wait(0.05):
            self.grown = max(self.grown, self._memory() - self._before)

    def _memory(self) -> int:
        """Private and anonymous memory of the daemon's processes and their children; no container's."""
        workers = [one for one in self._kubelet.node.workers() if one.pid]
        pids = {one.pid for one in workers}
        pids |= {pid for one in workers if one.kind in ("storage", "image") for pid in children_of(one.pid)}
        return sum(map(_anonymous, pids))


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def pulled(kubelet: Kubelet, image: str) -> Callable[[], object]:
    request = pb.PullImageRequest(image=pb.ImageSpec(image=image))
    return lambda: kubelet.node.images.PullImage(request, timeout=60)


# -- registries ---------------------------------------------------------------------------------------------


def bomb(size: int) -> bytes:
    """A gzip stream of zeros that claims to be a tar's first file, made of one repeated piece."""
    head = tarfile.TarInfo("zeros")
    head.size = size
    packer = zlib.compressobj(9, wbits=31)
    begin = packer.compress(head.tobuf()) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(16 * MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return begin + piece * (size // (16 * MIB))


def test_a_decompression_bomb_is_refused(kubelet: Kubelet) -> None:
    raw = bomb(BOMB)
    layer = make_layer({"x": b""})
    hostile = Layer(raw, layer.diff_id)
    push(kubelet.images.registry, "test/bomb", "1", make_image([hostile]))
    with Watch(kubelet) as watch:
        error = refusal(pulled(kubelet, kubelet.name("bomb")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
    watch.check(100)


def test_a_layer_of_too_many_files_is_refused(kubelet: Kubelet) -> None:
    many = make_layer({f"f{number}": b"" for number in range(ENTRIES + 1)})
    push(kubelet.images.registry, "test/many", "1", make_image([many]))
    with Watch(kubelet) as watch:
        error = refusal(pulled(kubelet, kubelet.name("many")))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
    watch.check(100)


class _Endless(socketserver.StreamRequestHandler):
    """A registry whose manifests have ten gigabytes: said so, or sent without a length."""

    said = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\n"

    def handle(self) -> None:
        if self.connection.recv(1, socket.MSG_PEEK) == b"\x16":  # TLS is tried first
            return
        path = self.rfile.readline().split()[1]
        while self.rfile.readline().strip():
            pass
        if b"/manifests/" not in path:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return
        length = b"Content-Length: %d\r\n" % (10 << 30) if b"/said/" in path else b"Connection: close\r\n"
        with contextlib.suppress(OSError):  # who reads has enough at some time
            self.wfile.write(self.said + length + b"\r\n")
            for _ in range(10 << 10):
                self.wfile.write(b" " * MIB)
                self.server.sent += MIB  # type: ignore[attr-defined]  # the test's own


PORT = 5991
ENDLESS = f'[[registry]]\nlocation = "127.0.0.1:{PORT}"\ninsecure = true\n'


@pytest.mark.parametrize("how", ["said", "sent"])
def test_a_manifest_of_ten_gigabytes_is_refused(kubelet: Kubelet, how: str) -> None:
    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True
        sent = 0

    with Server(("127.0.0.1", PORT), _Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Watch(kubelet) as watch:
            error = refusal(pulled(kubelet, f"127.0.0.1:{PORT}/{how}/image:1"))
        server.shutdown()
        assert server.sent < 100 * MIB
    assert "larger than the limit" in (error.details() or "")
    watch.check(50)


# -- containers ------------------------------------------------------------------------------------------


def test_a_fork_bomb_in_an_exec_has_its_pods_tasks_and_no_more(kubelet: Kubelet) -> None:
    group = CGROUPS / "pids" / PARENT.lstrip("/")
    group.mkdir()
    try:
        (group / "pids.max").write_text(str(TASKS))
        pod = kubelet.sandbox()
        pod.linux.cgroup_parent = PARENT
        container = kubelet.running("", sandbox=pod)
        script = "f() { f | f & }; f; sleep 2; echo survived"
        with Watch(kubelet) as watch:
            request = pb.ExecSyncRequest(container_id=container, cmd=[*SHELL, script], timeout=5)
            with contextlib.suppress(grpc.RpcError):  # its shell cannot fork either
                kubelet.node.runtime.ExecSync(request, timeout=20)
            assert int((group / "pids.current").read_text()) <= TASKS
        watch.check(50)
        kubelet.remove(container)
        wait_for(lambda: int((group / "pids.current").read_text()) == 0, "all of it has ended")
    finally:
        kubelet.clear()
        for parent in CGROUPS.glob(f"*{PARENT}"):
            with contextlib.suppress(OSError):
                parent.rmdir()


def test_a_flood_of_log_costs_no_memory_and_nobody_elses_time(kubelet: Kubelet) -> None:
    line = "x" * 99
    with Watch(kubelet) as watch:
        container = kubelet.running("", *SHELL, f"timeout 2 yes {line}; exit 0")
        kubelet.ended(container)
    path = Path(kubelet.status(container).log_path)
    assert path.stat().st_size > 50 * MIB  # it did flood
    path.unlink()
    watch.check(50)


# -- clients ---------------------------------------------------------------------------------------------


def test_a_client_that_floods_is_told_to_wait_and_others_are_served(kubelet: Kubelet) -> None:
    """More requests at a time than are served: those that hang about, waiting for something to end."""
    container = kubelet.running()
    codes: list[grpc.StatusCode] = []

    def flood(_number: int) -> None:
        with grpc.insecure_channel(
            f"unix:{kubelet.node.socket}", [("grpc.use_local_subchannel_pool", 1)]
        ) as to:
            runtime = rpc.runtime_client(to)
            request = pb.ExecSyncRequest(container_id=container, cmd=["sleep", "1"], timeout=30)
            lists = [
                runtime.ListContainers.future(pb.ListContainersRequest(), timeout=60) for _ in range(EACH)
            ]
            execs = [runtime.ExecSync.future(request, timeout=60) for _ in range(2)]
            calls: list[Any] = [*lists, *execs]
            codes.extend(call.code() for call in calls)

    with Watch(kubelet) as watch, ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(flood, range(CLIENTS)))
    assert len(codes) == CLIENTS * (EACH + 2)
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert codes.count(grpc.StatusCode.OK) > CLIENTS
    watch.check(150)
