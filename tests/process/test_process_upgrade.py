"""`bulkhead upgrade` on the whole daemon: two builds in turn under a load that notices nothing, builds that
are no good, and a supervisor that dies on the way.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from ipc.blocking import Client
from ipc.cri import api_pb2 as pb
from ipc.errors import RemoteError
from ipc.messages.supervisor import MonitorList, UpgradeBegin
from tests.support import machine
from tests.support.daemon import alive, wait_for
from tests.support.images import served
from tests.support.kubelet import SHELL, Kubelet
from tests.support.load import Load
from tests.support.stream_clients import WebSocket
from tests.support.trees import TreeNode

FIRST, SECOND = "1.37.0", "1.38.0"
AGE = 1.0
CODE_3 = "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done"
COUNTER = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.05; done"


@pytest.fixture(scope="module")
def node() -> Iterator[TreeNode]:
    machine.enter()
    with served(larger_files=1) as images:
        made = TreeNode(
            FIRST,
            registries=images.registries_conf,
            bridge="bhup0",
            config=f"[grpc]\nmax_connection_age = {AGE}\n",
        )
        with made:
            made.kubelet = Kubelet(made, images)  # type: ignore[attr-defined]  # one for the module
            made.kubelet.pull("busybox")  # type: ignore[attr-defined]
            add_fields(made.make_tree(SECOND))
            yield made


@pytest.fixture
def kubelet(node: TreeNode) -> Iterator[Kubelet]:
    found: Kubelet = node.kubelet  # type: ignore[attr-defined]
    yield found
    found.clear()


def add_fields(tree: Path) -> None:
    """What a later release may do: fields that this one does not know, in messages and in the heritage."""
    for name, field_before in (
        ("ipc/messages/monitor.py", '    reason: str = ""'),  # of the record of a container's end
        ("ipc/messages/supervisor.py", "    successions: int = 0"),  # of a monitor
        ("supervisor/heritage.py", '    why: str = ""'),  # of a worker that goes on
    ):
        path = tree / name
        before, found, after = path.read_text().partition(f"{field_before}")
        assert found, name
        path.write_text(f'{before}    novelty: str = "new"\n{found}{after}')


def session(kubelet: Kubelet, container: str) -> WebSocket:
    request = pb.ExecRequest(container_id=container, cmd=["cat"], stdin=True, stdout=True)
    parts = urlsplit(kubelet.node.runtime.Exec(request, timeout=10).url)
    assert parts.hostname is not None
    return WebSocket.connect(
        socket.create_connection((parts.hostname, parts.port or 0), timeout=20), parts.path
    )


def echo(web: WebSocket, text: bytes) -> None:
    web.send(0, text)
    while not web.channels[1].endswith(text):
        web.frame()


def pid_of(kubelet: Kubelet, container: str) -> int:
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    info: str = kubelet.node.runtime.ContainerStatus(request, timeout=10).info["info"]
    found = re.search(r'"pid":\s*(\d+)', info)
    assert found is not None
    return int(found[1])


def releases(node: TreeNode) -> dict[str, str]:
    """The build of each worker that serves."""
    return {w.kind: w.release for w in node.workers() if w.release and w.state == "ready"}


def monitors(node: TreeNode, container: str) -> list[int]:
    """The monitor of a container that lives, by the lock."""
    with Client(f"{node.run_root}/ipc/supervisor.sock", timeout=20) as client:
        states = client.call(MonitorList(container_id=container)).monitors
    return [state.pid for state in states if state.pid]


def open_files(pid: int) -> list[str]:
    return os.listdir(f"/proc/{pid}/fd")


def clients(kubelet: Kubelet, container: str) -> dict[str, Any]:
    sandbox = kubelet.sandbox()
    pod_id = kubelet.run_pod(sandbox)

    def lists(runtime: Any, _turn: int) -> None:
        assert runtime.ListContainers(pb.ListContainersRequest(), timeout=20).containers

    def probes(runtime: Any, _turn: int) -> None:
        request = pb.ExecSyncRequest(container_id=container, cmd=["true"], timeout=10)
        assert runtime.ExecSync(request, timeout=20).exit_code == 0

    def long_ones(runtime: Any, _turn: int) -> None:
        request = pb.ExecSyncRequest(container_id=container, cmd=["sleep", "2"], timeout=10)
        assert runtime.ExecSync(request, timeout=20).exit_code == 0

    def creates(runtime: Any, turn: int) -> None:
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=f"c{turn}"),
            image=pb.ImageSpec(image=kubelet.name("busybox")),
            command=["sleep", "1000"],
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=sandbox)
        made = runtime.CreateContainer(request, timeout=60).container_id
        runtime.StartContainer(pb.StartContainerRequest(container_id=made), timeout=60)
        runtime.StopContainer(pb.StopContainerRequest(container_id=made, timeout=0), timeout=60)
        runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=made), timeout=60)

    def events(runtime: Any, _turn: int) -> None:
        stream = runtime.GetContainerEvents(pb.GetEventsRequest())
        threading.Timer(1.5, stream.cancel).start()
        try:
            for _event in stream:
                pass  # an end in order, when the worker is exchanged, is no error
        except grpc.RpcError:
            assert stream.code() is grpc.StatusCode.CANCELLED, stream.details()

    return {"lists": lists, "probes": probes, "long": long_ones, "creates": creates, "events": events}


def test_nobody_notices_two_upgrades_under_load(node: TreeNode, kubelet: Kubelet) -> None:
    container = kubelet.running("", *SHELL, COUNTER)
    pid, supervisor = pid_of(kubelet, container), node.pids("supervisor")
    web = session(kubelet, container)
    echo(web, b"before\n")
    stubborn = kubelet.running("", *SHELL, "trap '' TERM; sleep 1000")
    later = ""
    load = Load(node._new_channel)
    files = open_files(supervisor[0])
    with load.running(**clients(kubelet, container)):
        for version in (SECOND, FIRST):
            # that takes longer than the old cri waits
            stop = pb.StopContainerRequest(container_id=stubborn, timeout=6)
            stopping = node.runtime.StopContainer.future(
                stop, timeout=20
            )  # that takes longer than a hand-over
            done = node.upgrade(version)
            assert done.returncode == 0, done.stderr + node.log_tail()
            assert f"is {version} now" in done.stdout
            echo(web, f"{version}\n".encode())
            assert set(releases(node).values()) == {version}
            assert node.pids("supervisor") == supervisor
            assert kubelet.execute(container, "echo", "hi") == "hi\n"
            later = later or kubelet.running(
                "", *SHELL, "trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done"
            )
            stopping.result()
    # the monitor of the later release, under the earlier one, and one of the earlier that succeeds it
    assert kubelet.execute(later, "echo", "hi") == "hi\n"
    kubelet.wait_for_log(later, "up")
    (dead,) = monitors(node, later)
    os.kill(dead, signal.SIGKILL)
    wait_for(lambda: monitors(node, later) not in ([], [dead]), "the monitor has a successor")
    node.runtime.StopContainer(pb.StopContainerRequest(container_id=later, timeout=10), timeout=20)
    assert kubelet.status(later).exit_code == 3
    assert kubelet.status(stubborn).exit_code == 137
    assert load.errors == []
    assert all(load.counts[name] > 1 for name in ("lists", "probes", "long", "creates"))
    assert pid_of(kubelet, container) == pid
    echo(web, b"after\n")
    web.sock.close()
    lines = kubelet.log(container).split()
    assert lines == [str(number) for number in range(len(lines))]
    wait_for(lambda: not drains(node), "the old workers end")
    wait_for(lambda: len(open_files(supervisor[0])) <= len(files), "no descriptor stays")
    kubelet.node.runtime.StopContainer(pb.StopContainerRequest(container_id=container), timeout=20)


def drains(node: TreeNode) -> list[str]:
    return [worker.name for worker in node.workers() if worker.state in {"draining", "stopping"}]


def test_a_build_that_is_no_good_changes_nothing(node: TreeNode, kubelet: Kubelet) -> None:
    wait_for(lambda: not drains(node), "the old workers end")
    before = {worker.kind: worker.pid for worker in node.workers()}
    broken = node.make_tree("1.39.0") / "workers/cri/main.py"
    text = broken.read_text()
    broken.write_text(text + "import nowhere\n")
    done = node.upgrade("1.39.0")
    assert done.returncode == 1
    assert "No module named 'nowhere'" in done.stderr
    broken.write_text(text.replace("def prepare(", "def unprepared("))
    node.write_launcher("/no/such/python")
    client = Client(f"{node.run_root}/ipc/supervisor.sock", timeout=20)
    with client, pytest.raises(RemoteError, match="not found"):
        client.call(UpgradeBegin())
    node.write_launcher(sys.executable)
    assert {worker.kind: worker.pid for worker in node.workers()} == before
    done = node.upgrade()  # it loads, but its cri does not come up
    assert done.returncode == 1
    assert "cri: the new worker is no good" in done.stderr
    assert node.pids("cri") == [before["cri"]]
    assert releases(node) | {"cri": FIRST} == releases(node)
    assert kubelet.execute(kubelet.running(""), "echo", "hi") == "hi\n"
    done = node.upgrade(FIRST)
    assert done.returncode == 0, done.stderr
    assert set(releases(node).values()) == {FIRST}
    assert node.pids("cri") != [before["cri"]]


def test_a_supervisor_that_is_killed_on_the_way_loses_nothing(node: TreeNode, kubelet: Kubelet) -> None:
    container = kubelet.running("", *SHELL, COUNTER)
    pid = pid_of(kubelet, container)
    upgrading = subprocess.Popen([str(node.launcher), "upgrade", *node.command()[2:]], stderr=subprocess.PIPE)
    wait_for(lambda: "worker started to replace another" in node.log_tail(30), "the workers are exchanged")
    os.kill(node.daemon.pid, signal.SIGKILL)  # type: ignore[union-attr]  # it runs
    node.restart_ended()
    upgrading.communicate()
    assert upgrading.returncode in {1, 3}
    assert alive(pid)
    assert pid_of(kubelet, container) == pid
    assert kubelet.execute(container, "echo", "hi") == "hi\n"
    lines = kubelet.log(container).split()
    assert lines == [str(number) for number in range(len(lines))]
