"""Image volumes, VOLUMEs, CDI devices and OCI hooks through the whole daemon, with crun and with runc."""

from __future__ import annotations

import json
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ipc.cri import api_pb2 as pb
from tests.support import machine
from tests.support.daemon import Node, wait_for
from tests.support.images import Served, served
from tests.support.kubelet import SHELL, Kubelet, refusal
from tests.support.registry import busybox_image, make_image, make_layer, push

HANDLERS = ("crun", "runc")


def special(path: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.type, entry.linkname = kind, target
    return entry


#: An image volume with what a volume may have: a program, and links that want to lead out.
VOLUME_FILES: dict[str, bytes | tarfile.TarInfo] = {
    "data/": b"",
    "data/hello": b"from the image\n",
    "run": b"#!/bin/sh\necho it runs\n",
    "out": special("out", tarfile.SYMTYPE, "/etc"),
    "abs": special("abs", tarfile.SYMTYPE, "/data"),
    "fifo": special("fifo", tarfile.FIFOTYPE),
}


@pytest.fixture(scope="module")
def kubelet() -> Iterator[Kubelet]:
    machine.enter()
    with served(larger_files=1) as images, _node(images) as node:
        made = Kubelet(node, images)
        volume = make_image([make_layer(VOLUME_FILES, mode=0o755)])
        push(images.registry, "test/volume", "1", volume)
        declared = {"Cmd": ["sh"], "Volumes": {"/var/data": {}, "cache": {}, "/abs/x": {}}}
        push(images.registry, "test/declared", "1", busybox_image(config=declared))
        for name in ("busybox", "volume", "declared"):
            made.pull(name)
        yield made


def _node(images: Served) -> Node:
    node = Node(registries=images.registries_conf, bridge="bhfld0")
    for name in ("cdi", "cdi2", "hooks"):
        (node.root / name).mkdir()
    with node.config.open("a") as config:
        config.write(
            f'[containers]\ncdi_spec_dirs = ["{node.root}/cdi", "{node.root}/cdi2"]\n'
            f'hooks_dirs = ["{node.root}/hooks"]\n'
        )
    return node


@pytest.fixture(autouse=True)
def clean(kubelet: Kubelet) -> Iterator[None]:
    yield
    kubelet.clear()
    for name in ("cdi", "cdi2", "hooks"):
        for path in (kubelet.node.root / name).iterdir():
            path.unlink()


def image_mount(kubelet: Kubelet, **fields: Any) -> pb.Mount:
    image = pb.ImageSpec(image=kubelet.ids["volume"], user_specified_image=kubelet.name("volume"))
    chosen: dict[str, Any] = {"container_path": "/volume", "readonly": True, "image": image} | fields
    return pb.Mount(**chosen)


# -- image volumes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", HANDLERS)
def test_an_image_volume_is_mounted_read_only_and_its_programs_run(kubelet: Kubelet, handler: str) -> None:
    container_id = kubelet.running(handler, mounts=[image_mount(kubelet)])
    assert kubelet.execute(container_id, "cat", "/volume/data/hello") == "from the image\n"
    assert kubelet.execute(container_id, "/volume/run") == "it runs\n"
    assert kubelet.fails(container_id, "touch", "/volume/x")
    options = kubelet.mount_options(container_id, "/volume")
    assert {"ro", "nosuid", "nodev"} <= options


def test_status_says_which_image_a_volume_became(kubelet: Kubelet) -> None:
    image = pb.ImageSpec(image=kubelet.name("volume"))
    container_id = kubelet.running("", mounts=[image_mount(kubelet, image=image)])
    (mount,) = kubelet.status(container_id).mounts
    assert (mount.image.image, mount.image.image_ref) == (kubelet.name("volume"), kubelet.ids["volume"])
    assert (mount.container_path, mount.readonly) == ("/volume", True)


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize(
    ("sub_path", "listing"),
    [("data", "hello"), ("/data/", "hello"), ("abs", "hello"), ("data/hello", "/volume")],
)
def test_a_sub_path_is_what_is_seen(kubelet: Kubelet, handler: str, sub_path: str, listing: str) -> None:
    container_id = kubelet.running(handler, mounts=[image_mount(kubelet, image_sub_path=sub_path)])
    assert kubelet.execute(container_id, "ls", "/volume") == f"{listing}\n"


@pytest.mark.parametrize("sub_path", ["missing", "data/hello/x", "out", "out/passwd"])
def test_a_sub_path_that_the_image_lacks_is_refused_with_the_kubelets_word(
    kubelet: Kubelet, sub_path: str
) -> None:
    error = refusal(lambda: kubelet.running("", mounts=[image_mount(kubelet, image_sub_path=sub_path)]))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details().startswith("ImageVolumeMountFailed: ")
    assert sub_path in error.details()


@pytest.mark.parametrize(
    "fields",
    [
        {"readonly": False},
        {"host_path": "/etc"},
        {"image_sub_path": "../data"},
        {"image_sub_path": "fifo"},
        {"propagation": pb.MountPropagation.PROPAGATION_HOST_TO_CONTAINER},
    ],
)
def test_an_image_volume_that_cannot_be_is_refused(kubelet: Kubelet, fields: dict[str, Any]) -> None:
    error = refusal(lambda: kubelet.running("", mounts=[image_mount(kubelet, **fields)]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("ImageVolumeMountFailed: ")


def test_an_image_volume_of_an_image_that_is_not_here_is_refused(kubelet: Kubelet) -> None:
    image = pb.ImageSpec(image="localhost/none:1")
    error = refusal(lambda: kubelet.running("", mounts=[image_mount(kubelet, image=image)]))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details().startswith("ImageVolumeMountFailed: ")


def test_the_image_of_a_volume_is_in_use_also_after_storage_died(kubelet: Kubelet) -> None:
    container_id = kubelet.running(
        "", mounts=[image_mount(kubelet), image_mount(kubelet, container_path="/two")]
    )
    kubelet.node.kill_worker("storage")
    request = pb.RemoveImageRequest(image=pb.ImageSpec(image=kubelet.ids["volume"]))
    error = refusal(lambda: kubelet.node.images.RemoveImage(request, timeout=10))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert container_id[:12] in error.details()
    assert kubelet.execute(container_id, "cat", "/two/data/hello") == "from the image\n"


def test_image_volumes_go_with_a_container_whose_workers_died(kubelet: Kubelet) -> None:
    container_id = kubelet.running("", mounts=[image_mount(kubelet)])
    kubelet.node.kill_worker("cri")
    kubelet.node.kill_worker("storage")
    kubelet.node.wait_ready()
    kubelet.remove(container_id)
    mounts = Path("/proc/self/mountinfo")
    wait_for(lambda: "/volumes/" not in mounts.read_text(), "nothing of it is mounted")


# -- VOLUMEs of the image ---------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", HANDLERS)
def test_volumes_that_an_image_declares_are_directories(kubelet: Kubelet, handler: str) -> None:
    container_id = kubelet.running(handler, image="declared")
    assert (
        kubelet.execute(container_id, *SHELL, "ls -d /var/data /cache /abs/x")
        == "/abs/x\n/cache\n/var/data\n"
    )
    assert kubelet.execute(container_id, *SHELL, "touch /var/data/x && stat -c %a /cache") == "755\n"


# -- in a user namespace ----------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", HANDLERS)
def test_image_volumes_belong_to_the_root_of_the_pods_user_namespace(kubelet: Kubelet, handler: str) -> None:
    sandbox = kubelet.mapped_sandbox()
    users = sandbox.linux.security_context.namespace_options.userns_options
    mount = image_mount(kubelet, image_sub_path="data", uidMappings=users.uids, gidMappings=users.gids)
    container_id = kubelet.running(handler, sandbox=sandbox, mounts=[mount])
    assert kubelet.execute(container_id, "cat", "/volume/hello") == "from the image\n"
    assert kubelet.execute(container_id, "stat", "-c", "%u:%g", "/volume/hello") == "0:0\n"


@pytest.mark.parametrize("handler", HANDLERS)
def test_declared_volumes_belong_to_the_root_of_the_pods_user_namespace(
    kubelet: Kubelet, handler: str
) -> None:
    container_id = kubelet.running(handler, image="declared", sandbox=kubelet.mapped_sandbox())
    script = "stat -c %u:%g /var/data /cache && touch /cache/x"
    assert kubelet.execute(container_id, *SHELL, script) == "0:0\n0:0\n"


@pytest.mark.parametrize("handler", HANDLERS)
def test_nothing_is_masked_in_a_pod_with_a_user_namespace_that_masks_nothing(
    kubelet: Kubelet, handler: str
) -> None:
    container_id = kubelet.running(handler, sandbox=kubelet.mapped_sandbox())
    masked = kubelet.execute(container_id, *SHELL, "grep -c ' /proc/' /proc/self/mountinfo || true")
    assert masked == "0\n"


# -- CDI --------------------------------------------------------------------------------------------------


def write_cdi(kubelet: Kubelet, name: str = "v.json", directory: str = "cdi", **fields: Any) -> None:
    device = {
        "name": "zero",
        "containerEdits": {
            "env": ["CDI=yes", "PATH=/bin"],
            "deviceNodes": [{"path": "/dev/bh-zero", "hostPath": "/dev/zero", "permissions": "rw"}],
            "mounts": [
                {"hostPath": "/usr/share", "containerPath": "/cdi/mount", "options": ["ro", "nosuid", "bind"]}
            ],
            "additionalGids": [4242],
            "hooks": [
                {
                    "hookName": "createRuntime",
                    "path": "/bin/sh",
                    "args": ["sh", "-c", f"cat > {kubelet.node.root}/cdi-hook-state"],
                }
            ],
        },
    }
    made: dict[str, Any] = {"cdiVersion": "0.7.0", "kind": "vendor.com/thing", "devices": [device]}
    made["containerEdits"] = {"env": ["CDI_FILE=1", "CDI=no"]}
    # JSON is YAML too: what reads it goes by the name
    (kubelet.node.root / directory / name).write_text(json.dumps(made | fields))


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("by", ["field", "annotation"])
def test_a_cdi_device_changes_the_container(kubelet: Kubelet, handler: str, by: str) -> None:
    write_cdi(kubelet, "v.json" if by == "field" else "v.yaml")
    asked: dict[str, Any] = (
        {"CDI_devices": [pb.CDIDevice(name="vendor.com/thing=zero")]}
        if by == "field"
        else {"annotations": {"cdi.k8s.io/plugin_1": "vendor.com/thing=zero"}}
    )
    container_id = kubelet.running(handler, **asked)
    script = "echo $CDI $CDI_FILE $PATH; head -c 3 /dev/bh-zero | od -An -tx1; id -G; ls -d /cdi/mount/*"
    lines = kubelet.execute(container_id, *SHELL, script).splitlines()
    assert lines[0] == "yes 1 /bin"
    assert lines[1].split() == ["00", "00", "00"]
    assert "4242" in lines[2].split()
    assert len(lines) > 3
    assert {"ro", "nosuid"} <= kubelet.mount_options(container_id, "/cdi/mount")
    state = json.loads((kubelet.node.root / "cdi-hook-state").read_text())
    assert state["id"] == container_id


def test_a_cdi_device_that_nobody_describes_is_refused_with_what_was_skipped(kubelet: Kubelet) -> None:
    write_cdi(kubelet, kind="other.com/thing")
    (kubelet.node.root / "cdi" / "vendor.yaml").write_text("a: &a [1]\nb: *a\n")
    device = pb.CDIDevice(name="vendor.com/thing=zero")
    error = refusal(lambda: kubelet.running("", CDI_devices=[device]))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "vendor.com/thing=zero" in error.details()
    assert "vendor.yaml" in error.details()
    assert "it has an alias" in kubelet.node.log_tail(200)


def test_a_later_cdi_directory_overrides_and_a_double_is_refused(kubelet: Kubelet) -> None:
    write_cdi(kubelet)
    write_cdi(kubelet, directory="cdi2", containerEdits={"env": ["CDI_FILE=2"]})
    device = pb.CDIDevice(name="vendor.com/thing=zero")
    container_id = kubelet.running("", CDI_devices=[device])
    assert kubelet.execute(container_id, *SHELL, "echo $CDI_FILE") == "2\n"
    write_cdi(kubelet, "w.json", directory="cdi2")
    error = refusal(lambda: kubelet.running("", CDI_devices=[device]))
    assert "twice" in error.details()


def test_what_is_no_name_of_a_cdi_device_is_refused(kubelet: Kubelet) -> None:
    error = refusal(lambda: kubelet.running("", CDI_devices=[pb.CDIDevice(name="../x=y")]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


# -- OCI hooks --------------------------------------------------------------------------------------------

STAGES = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]


def write_hook(kubelet: Kubelet, name: str, when: dict[str, Any], stages: list[str], **fields: Any) -> Path:
    program = kubelet.node.root / "hook-program"
    said = kubelet.node.root / f"said-{name}"
    said.unlink(missing_ok=True)
    program.write_text('#!/bin/sh\ncat > /dev/null\necho "$2" >> "$1"\n')
    program.chmod(0o755)
    for stage in stages:
        hook = {"path": str(program), "args": ["hook", str(said), stage]}
        content = {"version": "1.0.0", "hook": hook, "when": when, "stages": [stage]} | fields
        (kubelet.node.root / "hooks" / f"{name}-{stage}.json").write_text(json.dumps(content))
    return said


@pytest.mark.parametrize("handler", HANDLERS)
def test_hooks_run_in_every_stage(kubelet: Kubelet, handler: str) -> None:
    said = write_hook(kubelet, "all", {"always": True}, STAGES)
    container_id = kubelet.running(handler)
    kubelet.remove(container_id)
    wait_for(lambda: said.read_text().split() == STAGES, "the last ones too, behind the answer")


def test_hooks_are_chosen_by_annotations_commands_and_bind_mounts(kubelet: Kubelet) -> None:
    cases: dict[str, dict[str, Any]] = {
        "annotation": {"annotations": {"^my.org/": "^(on|yes)$"}},
        "command": {"commands": ["^/bin/sl", "^sleep$"]},
        "mounts": {"hasBindMounts": True},
        "both": {"always": True, "annotations": {"^other$": ".*"}},
        "never": {"always": False},
        "nothing": {},
    }
    said = {name: write_hook(kubelet, name, when, ["prestart"]) for name, when in cases.items()}
    kubelet.running("", annotations={"my.org/a": "on"})
    ran = {name for name, path in said.items() if path.exists()}
    assert ran == {"annotation", "command"}


def test_hook_files_that_cannot_be_used_are_skipped_with_a_log_line(kubelet: Kubelet) -> None:
    good = write_hook(kubelet, "good", {"always": True}, ["prestart"])
    write_hook(kubelet, "old", {"always": True}, ["prestart"], version="0.1.0")
    write_hook(kubelet, "bad", {"annotations": {"(": ""}}, ["prestart"])
    (kubelet.node.root / "hooks" / "broken.json").write_text("{")
    os.mkfifo(kubelet.node.root / "hooks" / "fifo.json")
    kubelet.running("")
    assert good.exists()
    log = kubelet.node.log_tail(200)
    for name in ("old-prestart.json", "bad-prestart.json", "broken.json", "fifo.json"):
        assert any("OCI hook skipped" in line and name in line for line in log.splitlines()), name
    assert stat.S_ISFIFO((kubelet.node.root / "hooks" / "fifo.json").stat().st_mode)


def test_a_hook_that_fails_fails_the_container(kubelet: Kubelet) -> None:
    write_hook(kubelet, "fail", {"always": True}, ["prestart"], hook={"path": "/bin/false"})
    refusal(lambda: kubelet.running(""))
