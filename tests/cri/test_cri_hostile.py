"""What an image or a request may try against the node, each through the whole daemon, with both runtimes."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.daemon import Node
from tests.support.images import served
from tests.support.kubelet import SHELL, Kubelet, refusal
from tests.support.registry import Layer, busybox_image, layer_of_tar, make_image, make_layer, push

HANDLERS = ("crun", "runc")
Security = pb.LinuxContainerSecurityContext
#: Where the links of the hostile image lead to, on the node and, if all is well, inside the container.
AIM = Path("/tmp/bh-hostile-aim")
UP = "../../../../../../.."
#: Labels and an environment that other runtimes have obeyed.
LABELS = {
    "io.kubernetes.cri.container-type": "sandbox",
    "org.systemd.property.ExecStartPost": "'touch /tmp/bh-hostile-aim/label'",
    "run.oci.hooks.stderr": f"{AIM}/label",
    "io.cri-containerd.image": "x",
    "com.example.harmless": "1",
}
NAMED_BY_NUMBERS = (
    b"root:x:0:0::/:/bin/sh\n1000:x:0:0::/:/bin/sh\n4294967296:x:0:0::/:/bin/sh\n"
    b"100000000000000:x:0:0::/:/bin/sh\n-1:x:0:0::/:/bin/sh\n"
)


def links(targets: dict[str, str]) -> Layer:
    files: dict[str, bytes | tarfile.TarInfo] = {f"{AIM}/inside".lstrip("/"): b""}
    for name, target in targets.items():
        files[name] = made = tarfile.TarInfo(name)
        made.type, made.linkname = tarfile.SYMTYPE, target
    return make_layer(files)


def hole(size: int, name: str) -> Layer:
    """A layer with one file that is a hole."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, name)
        path.parent.mkdir()
        with path.open("wb") as file:
            file.truncate(size)
        command = ["tar", "-cS", "--owner=0", "--group=0", name]
        return layer_of_tar(subprocess.run(command, cwd=directory, check=True, capture_output=True).stdout)


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    machine.enter()
    with (
        served(larger_files=1) as images,
        Node(registries=images.registries_conf, bridge="bhhos0") as node,
    ):
        made = Kubelet(node, images)
        base = busybox_image().layers
        aims = {
            "etc/passwd": f"{AIM}/passwd",
            "etc/group": f"{AIM}/group",
            "etc/mtab": f"{AIM}/mtab",
            "etc/hosts": f"{AIM}/hosts",
            "etc/resolv.conf": f"{AIM}/resolv.conf",
            "out": str(AIM),
            "loop": "/loop",
        }
        config = {
            "Cmd": ["sleep", "1000"],
            "Env": ["PATH=/bin", "NOTIFY_SOCKET=/run/x", "LD_PRELOAD=/x"],
            "Labels": LABELS,
            "Volumes": {"/out/declared": {}},
            "WorkingDir": "out/cwd",
        }
        kinds: dict[str, Any] = {
            "links": (links(aims), config),
            "numbers": (make_layer({"etc/passwd": NAMED_BY_NUMBERS}), {"Cmd": ["id"], "Env": ["PATH=/bin"]}),
            "volume": (
                make_layer({"x": b""}),
                {"Cmd": ["true"], "Env": ["PATH=/bin"], "Volumes": {f"{UP}{AIM}": {}}},
            ),
            "giant": (hole(1 << 30, "etc/passwd"), {"Cmd": ["true"], "Env": ["PATH=/bin"]}),
        }
        for name, (layer, image_config) in kinds.items():
            push(images.registry, f"test/{name}", "1", make_image([*base, layer], config=image_config))
        for name in ("busybox", *kinds):
            made.pull(name)
        yield made


@pytest.fixture(autouse=True)
def clean(kubelet: Kubelet) -> Iterator[None]:
    """The aim of the links: a directory of the node that must stay as it is."""
    AIM.mkdir()
    (AIM / "passwd").write_text("evil:x:4711:4711::/:/bin/sh\n")
    (AIM / "group").write_text("evil:x:4711:\n")
    before = contents()
    try:
        yield
        kubelet.clear()
        assert contents() == before
    finally:
        shutil.rmtree(AIM)


def contents() -> dict[str, bytes]:
    return {str(each): each.read_bytes() if each.is_file() else b"" for each in AIM.rglob("*")}


def refused(code: grpc.StatusCode, step: Callable[[], Any]) -> str:
    error = refusal(step)
    assert error.code() is code, error.details()
    return error.details() or ""


INVALID = grpc.StatusCode.INVALID_ARGUMENT


# -- images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", HANDLERS)
def test_links_of_an_image_lead_nowhere_but_inside_it(kubelet: Kubelet, handler: str, tmp_path: Path) -> None:
    """Nor does what is mounted or made through them: volumes, mounts, the working directory, pod files."""
    (tmp_path / "seen").write_text("yes\n")
    mounts = [
        pb.Mount(container_path="/out/mounted", host_path=str(tmp_path)),
        pb.Mount(container_path="/out/file", host_path=str(tmp_path / "seen")),
    ]
    container_id = kubelet.running(handler, image="links", mounts=mounts)
    script = f"cat {AIM}/mounted/seen {AIM}/file; ls -d {AIM}/declared {AIM}/cwd; wc -l < /etc/hosts"
    lines = kubelet.execute(container_id, *SHELL, script).split()
    assert lines[:4] == ["yes", "yes", f"{AIM}/cwd", f"{AIM}/declared"]
    assert int(lines[4]) > 1
    status = kubelet.status(container_id)
    assert status.state == pb.ContainerState.CONTAINER_RUNNING
    for name in ("evil", "root"):
        security = pb.LinuxContainerConfig(security_context=Security(run_as_username=name))
        refused(INVALID, lambda: kubelet.created(handler, image="links", linux=security))  # noqa: B023
    looped = [pb.Mount(container_path="/loop/x", host_path=str(tmp_path))]
    assert refusal(lambda: kubelet.created(handler, image="links", mounts=looped)).code() is not INVALID


def test_links_and_volumes_that_climb_out_of_an_image_are_refused(kubelet: Kubelet) -> None:
    image = make_image([*busybox_image().layers, links({"etc/passwd": f"{UP}{AIM}/passwd"})])
    push(kubelet.images.registry, "test/climbing", "1", image)
    assert "points out of the image" in refused(INVALID, lambda: kubelet.pull("climbing"))
    assert "VOLUME" in refused(INVALID, lambda: kubelet.created(image="volume"))


@pytest.mark.parametrize("handler", HANDLERS)
def test_labels_of_an_image_steer_no_runtime(kubelet: Kubelet, handler: str) -> None:
    container_id = kubelet.created(handler, image="links", labels=LABELS, annotations=LABELS)
    request = pb.ContainerStatusRequest(container_id=container_id, verbose=True)
    answer = kubelet.node.runtime.ContainerStatus(request, timeout=20)
    spec = json.loads(answer.info["info"])["runtimeSpec"]
    told = {key: value for key, value in spec["annotations"].items() if LABELS.get(key) == value}
    assert told == {}
    assert spec["annotations"]["io.kubernetes.cri.container-type"] == "container"
    assert dict(answer.status.labels) == LABELS


def test_a_giant_passwd_costs_its_container_and_nothing_else(kubelet: Kubelet) -> None:
    named = pb.LinuxContainerConfig(security_context=Security(run_as_username="app"))
    assert "too large" in refused(INVALID, lambda: kubelet.created(image="giant", linux=named))
    workers = {worker.kind: worker for worker in kubelet.node.workers()}
    assert workers["storage"].restarts == 0
    numbered = pb.LinuxContainerConfig(security_context=Security(run_as_user=pb.Int64Value(value=5)))
    assert "too large" in refused(INVALID, lambda: kubelet.created(image="giant", linux=numbered))


@pytest.mark.parametrize(
    ("security", "uid"),
    [
        (Security(run_as_user=pb.Int64Value(value=1000)), 1000),  # the number, whoever bears it as a name
        (Security(run_as_username="1000"), 0),  # the name, as it was asked for
        (Security(run_as_user=pb.Int64Value(value=2**32)), None),
        (Security(run_as_user=pb.Int64Value(value=-1)), None),
        (Security(run_as_username="4242"), None),
    ],
)
def test_names_that_look_like_numbers_are_names(
    kubelet: Kubelet, security: Security, uid: int | None
) -> None:
    linux = pb.LinuxContainerConfig(security_context=security)
    if uid is None:
        refused(INVALID, lambda: kubelet.created(image="numbers", linux=linux))
    else:
        assert kubelet.output("", "id -u", image="numbers", linux=linux) == f"{uid}\n"


# -- requests ---------------------------------------------------------------------------------------------

NAMES = ["a/b", "../x", "a\0b", "a\nb", "", "x" * (4 << 20)]


@pytest.mark.parametrize("name", NAMES, ids=["slash", "climbing", "nul", "newline", "empty", "4 MiB"])
def test_names_that_could_be_paths_are_refused(kubelet: Kubelet, name: str) -> None:
    for part in ("name", "namespace", "uid"):
        pod = kubelet.sandbox()
        setattr(pod.metadata, part, name)
        refused(INVALID, lambda: kubelet.run_pod(pod))  # noqa: B023
    pod = kubelet.sandbox()
    pod_id = kubelet.run_pod(pod)
    image = pb.ImageSpec(image=kubelet.name("busybox"))
    metadata = pb.ContainerMetadata(name=name)
    config = pb.ContainerConfig(metadata=metadata, image=image, command=["true"])
    request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod)
    refused(INVALID, lambda: kubelet.node.runtime.CreateContainer(request, timeout=60))
    for label in ({name: "x"}, {"x": name}):
        if len(name) > 4096:
            refused(INVALID, lambda: kubelet.run_pod(kubelet.sandbox(labels=label)))  # noqa: B023
    assert not kubelet.node.runtime.ListContainers(pb.ListContainersRequest(), timeout=20).containers


@pytest.mark.parametrize(
    "fields",
    [
        {"log_path": "../main.log"},
        {"log_path": "/etc/main.log"},
        {"log_path": "a/../../main.log"},
        {"log_path": "a\0"},
        {"working_dir": "/../x"},
        {"mounts": [pb.Mount(container_path="/a/../../b", host_path="/tmp")]},
        {"mounts": [pb.Mount(container_path="relative", host_path="/tmp")]},
        {"mounts": [pb.Mount(container_path="/a\0b", host_path="/tmp")]},
        {"mounts": [pb.Mount(container_path="/a", host_path="../../etc")]},
        {"devices": [pb.Device(container_path="/dev/../x", host_path="/dev/null", permissions="r")]},
        {"envs": [pb.KeyValue(key="A=B", value=b"x")]},
        {"command": ["a\0b"]},
    ],
    ids=lambda fields: json.dumps(str(fields))[1:40],
)
def test_paths_that_climb_are_refused(kubelet: Kubelet, fields: dict[str, Any]) -> None:
    pod = kubelet.sandbox()
    pod_id = kubelet.run_pod(pod)
    image = pb.ImageSpec(image=kubelet.name("busybox"))
    merged: dict[str, Any] = {"command": ["true"], "log_path": "main.log"} | fields
    config = pb.ContainerConfig(metadata=pb.ContainerMetadata(name="main"), image=image, **merged)
    request = pb.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod)
    refused(INVALID, lambda: kubelet.node.runtime.CreateContainer(request, timeout=60))


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_log_path_through_a_link_writes_nothing_outside(kubelet: Kubelet, handler: str) -> None:
    """The log directory is root's, but what lies in it may have come there by a pod's volume."""
    pod = kubelet.sandbox()
    directory = Path(pod.log_directory)
    directory.mkdir(parents=True)
    (directory / "main.log").symlink_to(AIM / "log")
    refusal(lambda: kubelet.running(handler, "echo", "hi", sandbox=pod))
    (directory / "main.log").unlink()
    container_id = kubelet.running(handler, sandbox=pod)
    (directory / "main.log").unlink()
    (directory / "main.log").symlink_to(AIM / "log")
    reopen = pb.ReopenContainerLogRequest(container_id=container_id)
    refusal(lambda: kubelet.node.runtime.ReopenContainerLog(reopen, timeout=20))
