"""Fields of mounts, security context and process through the whole daemon, with both runtimes."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.daemon import Node
from tests.support.images import served
from tests.support.kubelet import SHELL, Kubelet, refusal
from tests.support.registry import busybox_image, make_image, make_layer, push

HANDLERS = ("crun", "runc")
Security = pb.LinuxContainerSecurityContext
Type = pb.SecurityProfile.ProfileType
#: A runtime of the time before "rro" and `features`.
OLD = Path("/tmp/bh-old-crun")
OLD_RUNTIME = """#!/bin/sh
case "$*" in
--version) echo crun version 1.3;;
features) exit 1;;
*) exec crun "$@";;
esac
"""
CONFIG = f"""
[containers]
default_env = ["FROM_NODE=1", "SHARED=node"]
default_ulimits = ["nofile=123:456", "core=0"]
[runtimes.crun]
allowed_annotations = ["example.com/*", "run.oci.*"]
[runtimes.old]
path = "{OLD}"
"""


GROUPS = b"root:x:0:\nadm:x:4:app\napp:x:1000:\n"
USERS = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    machine.enter()
    OLD.write_text(OLD_RUNTIME)
    OLD.chmod(0o755)
    with (
        contextlib.ExitStack() as stack,
        served(larger_files=1) as images,
        Node(registries=images.registries_conf, bridge="bhfld1", config=CONFIG) as node,
    ):
        stack.callback(OLD.unlink)
        made = Kubelet(node, images)
        config = {
            "Cmd": ["sh"],
            "Env": ["PATH=/bin", "SHARED=image", "FROM_IMAGE=1"],
            "StopSignal": "SIGQUIT",
            "User": "app",
        }
        layers = [*busybox_image().layers, make_layer({"etc/passwd": USERS, "etc/group": GROUPS})]
        push(images.registry, "test/app", "1", make_image(layers, config=config))
        for name in ("busybox", "app"):
            made.pull(name)
        yield made


@pytest.fixture(autouse=True)
def clean(kubelet: Kubelet) -> Iterator[None]:
    yield
    kubelet.clear()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A directory with a mount of its own in it."""
    tmp_path.chmod(0o755)
    (tmp_path / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "below", tmp_path / "below"], check=True)
    (tmp_path / "program").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "program").chmod(0o755)
    yield tmp_path
    subprocess.run(["umount", tmp_path / "below"], check=True)


def linux(**fields: Any) -> pb.LinuxContainerConfig:
    return pb.LinuxContainerConfig(security_context=Security(**fields))


def bind(volume: Path, **fields: Any) -> list[pb.Mount]:
    return [pb.Mount(container_path="/v", host_path=str(volume), **fields)]


# -- mounts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", HANDLERS)
def test_mount_options_are_in_force(kubelet: Kubelet, handler: str, volume: Path) -> None:
    wanted = ["noexec", "nosuid", "nodev", "noatime"]
    container_id = kubelet.running(handler, mounts=bind(volume, mount_options=wanted))
    assert set(wanted) <= kubelet.mount_options(container_id, "/v")
    assert kubelet.fails(container_id, *SHELL, "/v/program")
    assert kubelet.execute(container_id, *SHELL, "touch /v/made; ls /v/made") == "/v/made\n"


@pytest.mark.parametrize("handler", HANDLERS)
def test_an_unknown_mount_option_is_refused(kubelet: Kubelet, handler: str, volume: Path) -> None:
    error = refusal(lambda: kubelet.created(handler, mounts=bind(volume, mount_options=["size=1g"])))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_mount_options_are_claimed(kubelet: Kubelet) -> None:
    status = kubelet.node.runtime.Status(pb.StatusRequest(), timeout=10)
    assert status.features.mount_options
    assert status.features.supplemental_groups_policy


def test_recursive_read_only_is_honoured_where_it_is_claimed_and_refused_elsewhere(
    kubelet: Kubelet, volume: Path
) -> None:
    status = kubelet.node.runtime.Status(pb.StatusRequest(), timeout=10)
    claims = {h.name: h.features.recursive_read_only_mounts for h in status.runtime_handlers}
    assert claims == {"": True, "crun": True, "runc": True, "old": False}
    mounts = bind(volume, readonly=True, recursive_read_only=True)
    for handler in HANDLERS:
        container_id = kubelet.running(handler, mounts=mounts)
        assert kubelet.fails(container_id, "touch", "/v/below/x")
        plain = kubelet.running(handler, mounts=bind(volume, readonly=True))
        assert not kubelet.fails(plain, "touch", "/v/below/x")
    error = refusal(lambda: kubelet.created("old", mounts=mounts))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details().startswith("RROUnsupported: ")


# -- who, with what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", HANDLERS)
def test_supplemental_groups_follow_the_policy_and_the_status_tells_them(
    kubelet: Kubelet, handler: str, tmp_path: Path
) -> None:
    merge = linux(run_as_user=pb.Int64Value(value=1000), supplemental_groups=[77])
    container_id = kubelet.running(handler, linux=merge, image="app")
    user = kubelet.status(container_id).user.linux
    inside = {int(group) for group in kubelet.execute(container_id, "id", "-G").split()}
    assert (user.uid, user.gid) == (1000, 1000)
    assert set(user.supplemental_groups) == inside
    assert {4, 77} <= inside
    strict = linux(
        run_as_user=pb.Int64Value(value=1000),
        supplemental_groups=[77],
        supplemental_groups_policy=pb.SupplementalGroupsPolicy.Strict,
    )
    container_id = kubelet.running(handler, linux=strict, image="app")
    assert sorted(kubelet.status(container_id).user.linux.supplemental_groups) == [77, 1000]
    assert sorted(kubelet.execute(container_id, "id", "-G").split(), key=int) == ["77", "1000"]


@pytest.mark.parametrize("handler", HANDLERS)
def test_environment_comes_from_node_image_and_request_in_this_order(kubelet: Kubelet, handler: str) -> None:
    envs = [pb.KeyValue(key="MINE", value="süß".encode()), pb.KeyValue(key="FROM_NODE", value=b"2")]
    text = kubelet.output(handler, "env", image="app", envs=envs)
    lines = set(text.splitlines())
    assert {"SHARED=image", "FROM_IMAGE=1", "FROM_NODE=2", "MINE=süß"} <= lines


def test_a_value_that_an_oci_spec_cannot_carry_is_refused(kubelet: Kubelet) -> None:
    error = refusal(lambda: kubelet.created(envs=[pb.KeyValue(key="RAW", value=b"\xff\xfe")]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "RAW" in error.details()


@pytest.mark.parametrize("handler", HANDLERS)
def test_limits_of_the_configuration_are_the_containers(kubelet: Kubelet, handler: str) -> None:
    assert kubelet.output(handler, "ulimit -Sn; ulimit -Hn; ulimit -Sc").split() == ["123", "456", "0"]


@pytest.mark.parametrize("handler", HANDLERS)
def test_the_images_stop_signal_is_told_and_the_requests_wins(kubelet: Kubelet, handler: str) -> None:
    of_image = kubelet.created(handler, image="app")
    assert kubelet.status(of_image).stop_signal == pb.Signal.SIGNAL_SIGQUIT
    script = "trap 'echo got usr2; exit 5' USR2; echo ready; while :; do sleep 0.1; done"
    container_id = kubelet.running(handler, *SHELL, script, stop_signal=pb.Signal.SIGNAL_SIGUSR2)
    assert kubelet.status(container_id).stop_signal == pb.Signal.SIGNAL_SIGUSR2
    kubelet.wait_for_log(container_id, "ready")
    request = pb.StopContainerRequest(container_id=container_id, timeout=20)
    kubelet.node.runtime.StopContainer(request, timeout=60)
    assert kubelet.status(container_id).exit_code == 5
    assert "got usr2" in kubelet.log(container_id)


# -- confinement ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_seccomp_profile_of_the_node_is_in_force(kubelet: Kubelet, handler: str, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 27}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    seccomp = pb.SecurityProfile(profile_type=Type.Localhost, localhost_ref=str(profile))
    container_id = kubelet.running(handler, linux=linux(seccomp=seccomp))
    script = "mkdir /x 2>&1 || grep Seccomp: /proc/self/status"
    text = kubelet.execute(container_id, *SHELL, script)
    assert "File too large" in text
    assert text.split()[-1] == "2"


def test_a_seccomp_profile_that_is_not_there_is_refused(kubelet: Kubelet) -> None:
    seccomp = pb.SecurityProfile(profile_type=Type.Localhost, localhost_ref="/nowhere/p.json")
    error = refusal(lambda: kubelet.created(linux=linux(seccomp=seccomp)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_apparmor_that_the_node_has_not_is_refused_only_if_it_was_asked_for_by_name(kubelet: Kubelet) -> None:
    if Path("/sys/module/apparmor/parameters/enabled").exists():
        assert Path("/sys/module/apparmor/parameters/enabled").read_text().strip() != "Y"
    named = pb.SecurityProfile(profile_type=Type.Localhost, localhost_ref="some-profile")
    error = refusal(lambda: kubelet.created(linux=linux(apparmor=named)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "AppArmor" in error.details()
    for kind in (Type.RuntimeDefault, Type.Unconfined):
        kubelet.created(linux=linux(apparmor=pb.SecurityProfile(profile_type=kind)))


@pytest.mark.parametrize("handler", HANDLERS)
def test_masked_and_read_only_paths_are_those_of_the_request(kubelet: Kubelet, handler: str) -> None:
    paths = linux(masked_paths=["/proc/version"], readonly_paths=["/proc/sys"])
    container_id = kubelet.running(handler, linux=paths)
    assert kubelet.execute(container_id, "cat", "/proc/version") == ""
    assert "ro" in kubelet.mount_options(container_id, "/proc/sys")
    assert kubelet.execute(container_id, "head", "-c", "4", "/proc/interrupts") != ""
    ours = kubelet.running(handler)
    assert kubelet.execute(ours, "cat", "/proc/interrupts") == ""


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize(("permissions", "writable"), [("r", False), ("rw", True)])
def test_permissions_of_devices_are_in_force(
    kubelet: Kubelet, handler: str, permissions: str, writable: bool
) -> None:
    device = pb.Device(host_path="/dev/loop-control", container_path="/dev/mine", permissions=permissions)
    container_id = kubelet.running(handler, devices=[device])
    assert kubelet.execute(container_id, *SHELL, "exec 3< /dev/mine && echo read") == "read\n"
    assert kubelet.fails(container_id, *SHELL, "exec 3<> /dev/mine") is not writable


# -- annotations ------------------------------------------------------------------------------------------


def runtime_annotations(kubelet: Kubelet, container_id: str) -> dict[str, str]:
    request = pb.ContainerStatusRequest(container_id=container_id, verbose=True)
    info = kubelet.node.runtime.ContainerStatus(request, timeout=10).info["info"]
    found: dict[str, str] = json.loads(info)["runtimeSpec"]["annotations"]
    return {key: value for key, value in found.items() if not key.startswith("io.kubernetes.cri.")}


def test_a_runtime_is_told_the_annotations_that_its_handler_allows_and_no_dangerous_ones(
    kubelet: Kubelet,
) -> None:
    annotations = {
        "example.com/a": "1",
        "other.com/b": "2",
        "run.oci.keep_original_groups": "1",
        "org.systemd.property.ExecStart": "x",
    }
    allowed = kubelet.created("crun", annotations=annotations)
    assert runtime_annotations(kubelet, allowed) == {"example.com/a": "1"}
    assert dict(kubelet.status(allowed).annotations) == annotations
    none = kubelet.created("runc", annotations=annotations)
    assert runtime_annotations(kubelet, none) == {}


# -- images -----------------------------------------------------------------------------------------------


def test_an_image_for_a_handler_that_is_not_configured_is_refused(kubelet: Kubelet) -> None:
    image = pb.ImageSpec(image=kubelet.name("busybox"), runtime_handler="nobody")
    request = pb.PullImageRequest(image=image)
    error = refusal(lambda: kubelet.node.images.PullImage(request, timeout=10))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_status_of_a_pod_has_its_containers(kubelet: Kubelet) -> None:
    container_id = kubelet.running()
    pod_id = kubelet.node.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=10).items[0].id
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod_id)
    answer = kubelet.node.runtime.PodSandboxStatus(request, timeout=10)
    (status,) = answer.containers_statuses
    assert (status.id, status.state) == (container_id, pb.ContainerState.CONTAINER_RUNNING)
    assert answer.timestamp > status.started_at
