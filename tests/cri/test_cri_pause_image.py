"""A configured pause image runs as the sandbox container of each pod: real image, real CNI, real runtimes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.daemon import Node, alive, wait_for
from tests.support.images import served
from tests.support.kubelet import Kubelet, refusal
from tests.support.registry import Image, make_image, make_layer, push
from workers.cri.names import sandbox_id

#: It reaps, because it is process 1 of pods that share their PID namespace.
PAUSE = """
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void reap(int number) { while (waitpid(-1, 0, WNOHANG) > 0) ; }
int main(void) { signal(SIGCHLD, reap); for (;;) pause(); }
"""


def pause_image() -> Image:
    with tempfile.TemporaryDirectory(prefix="bh-pause-") as directory:
        binary = Path(directory) / "pause"
        command = ["gcc", "-static", "-Os", "-s", "-x", "c", "-", "-o", str(binary)]
        subprocess.run(command, input=PAUSE, text=True, check=True)
        layer = make_layer({"pause": binary.read_bytes()}, mode=0o755)
    return make_image([layer], config={"Entrypoint": ["/pause"], "User": "65535:65535"})


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    machine.enter()
    with served(larger_files=1) as images:
        push(images.registry, "test/pause", "1", pause_image())
        # the key belongs to the [image] table, which the node's configuration ends with
        config = f'pause_image = "{images.address}/test/pause:1"\n'
        config += "[restart]\nfailed_deaths = 10000\nmax_delay = 1.0\nreset_after = 1.0\n"
        with Node(config=config, registries=images.registries_conf, bridge="bhpause0") as node:
            found = Kubelet(node, images)
            found.pull("busybox")
            yield found


@pytest.fixture(autouse=True)
def clean(kubelet: Kubelet) -> Iterator[None]:
    yield
    kubelet.clear()


def pod(kubelet: Kubelet, *, shared_pid: bool) -> Any:
    config = kubelet.sandbox()
    mode = pb.NamespaceMode.POD if shared_pid else pb.NamespaceMode.CONTAINER
    config.linux.security_context.namespace_options.pid = mode
    return config


def pause_pid(kubelet: Kubelet, pod_id: str) -> int:
    """The pid of a pod's sandbox container."""
    path = kubelet.node.run_root / "monitors" / sandbox_id(pod_id) / "state.json"
    return int(json.loads(path.read_text())["pid"])


def namespace(pid: int, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def pod_of(kubelet: Kubelet) -> Any:
    [found] = kubelet.node.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=10).items
    return found


def containers(kubelet: Kubelet) -> list[str]:
    answer = kubelet.node.runtime.ListContainers(pb.ListContainersRequest(), timeout=10)
    return [one.id for one in answer.containers]


def container_pid(kubelet: Kubelet, container_id: str) -> int:
    path = kubelet.node.run_root / "monitors" / container_id / "state.json"
    return int(json.loads(path.read_text())["pid"])


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_with_a_shared_pid_namespace_it_is_process_1(kubelet: Kubelet, handler: str) -> None:
    container = kubelet.running(handler, sandbox=pod(kubelet, shared_pid=True))
    pid = pause_pid(kubelet, pod_of(kubelet).id)
    assert kubelet.execute(container, "cat", "/proc/1/comm") == "pause\n"
    for kind in ("pid", "net", "ipc", "uts"):
        assert namespace(container_pid(kubelet, container), kind) == namespace(pid, kind)
    assert not kubelet.node.pids("init")
    kubelet.execute(container, "sh", "-c", "(sleep 0.05 &) ; true")  # an orphan for process 1
    wait_for(lambda: "sleep 0.05" not in kubelet.execute(container, "ps", "-o", "args"), "it is reaped")


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_with_a_pid_namespace_for_each_it_holds_the_others(kubelet: Kubelet, handler: str) -> None:
    container = kubelet.running(handler, sandbox=pod(kubelet, shared_pid=False))
    pid = pause_pid(kubelet, pod_of(kubelet).id)
    assert kubelet.execute(container, "cat", "/proc/1/comm") == "sleep\n"
    assert namespace(container_pid(kubelet, container), "pid") != namespace(pid, "pid")
    for kind in ("net", "ipc", "uts"):
        assert namespace(container_pid(kubelet, container), kind) == namespace(pid, kind)


def test_nobody_sees_it_and_its_image_is_pulled_and_pinned(kubelet: Kubelet) -> None:
    container = kubelet.running(sandbox=pod(kubelet, shared_pid=True))
    assert containers(kubelet) == [container]
    hidden = sandbox_id(pod_of(kubelet).id)
    assert "no container has the id" in refusal(lambda: kubelet.status(hidden)).details()
    images = kubelet.node.images.ListImages(pb.ListImagesRequest(), timeout=10).images
    pinned = {name.rpartition("/")[2]: image.pinned for image in images for name in image.repo_tags}
    assert pinned == {"busybox:1": False, "pause:1": True}


def test_it_has_no_privilege(kubelet: Kubelet) -> None:
    kubelet.run_pod(pod(kubelet, shared_pid=True))
    pid = pause_pid(kubelet, pod_of(kubelet).id)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert status["Uid"].split() == ["65535"] * 4
    assert (status["CapEff"], status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")


def test_a_pod_whose_sandbox_container_is_killed_is_not_ready_and_makes_room(kubelet: Kubelet) -> None:
    config = pod(kubelet, shared_pid=True)
    container = kubelet.running(sandbox=config)
    pod_id = pod_of(kubelet).id
    os.kill(pause_pid(kubelet, pod_id), signal.SIGKILL)
    not_ready = pb.PodSandboxState.SANDBOX_NOTREADY
    wait_for(lambda: pod_of(kubelet).state == not_ready, "the pod is not ready")
    assert kubelet.ended(container).exit_code == 137  # the kernel ends the namespace with its init
    assert kubelet.run_pod(config) != pod_id


def test_it_runs_on_without_cri_and_its_end_is_noticed_by_the_next(kubelet: Kubelet) -> None:
    kubelet.running(sandbox=pod(kubelet, shared_pid=True))
    pod_id = pod_of(kubelet).id
    pid = pause_pid(kubelet, pod_id)
    for lost in (False, True):
        kubelet.node.kill_worker("cri")
        if lost:
            for path in (kubelet.node.run_root / "cri").glob("state.db*"):
                path.unlink()
        wait_for(kubelet.node.answers, "cri answers again")
        assert pod_of(kubelet).state == pb.PodSandboxState.SANDBOX_READY
        assert len(containers(kubelet)) == 1
        assert alive(pid)
        assert pause_pid(kubelet, pod_id) == pid
    os.kill(pid, signal.SIGKILL)
    not_ready = pb.PodSandboxState.SANDBOX_NOTREADY
    wait_for(lambda: pod_of(kubelet).state == not_ready, "the pod is not ready")


def test_stop_ends_it_and_remove_leaves_nothing(kubelet: Kubelet) -> None:
    kubelet.running(sandbox=pod(kubelet, shared_pid=True))
    pod_id = pod_of(kubelet).id
    pid = pause_pid(kubelet, pod_id)
    kubelet.node.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id), timeout=30)
    assert not alive(pid)
    request = pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id)
    kubelet.node.runtime.RemovePodSandbox(request, timeout=30)
    assert not (kubelet.node.run_root / "monitors" / sandbox_id(pod_id)).exists()


@pytest.mark.parametrize("shared_pid", [True, False])
@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_the_sandbox_container_is_in_the_pods_user_namespace(
    kubelet: Kubelet, handler: str, shared_pid: bool
) -> None:
    config = pod(kubelet, shared_pid=shared_pid)
    options = config.linux.security_context.namespace_options.userns_options
    options.mode = pb.NamespaceMode.POD
    for ranges in (options.uids, options.gids):
        ranges.add(host_id=300_000, container_id=0, length=65_536)
    pod_id = kubelet.run_pod(config, handler)
    pid = pause_pid(kubelet, pod_id)
    assert namespace(pid, "user") != os.readlink("/proc/self/ns/user")
    assert "Uid:\t365535\t365535" in Path(f"/proc/{pid}/status").read_text()
