"""What CDI devices, hooks, image volumes and VOLUMEs make of a spec, and what storage is asked for them."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError
from ipc.messages import storage
from ipc.messages.storage import CdiEdits, CdiMount, CdiNode, Hook
from tests.support import spec_inputs as make
from workers.cri.spec import request

Security = api_pb2.LinuxContainerSecurityContext
VOLUME = api_pb2.Mount(
    container_path="/v", readonly=True, image=api_pb2.ImageSpec(image="x"), image_sub_path="a/b"
)


def asked(config: api_pb2.ContainerConfig | None = None, **changes: Any) -> storage.ContainerCreate:
    fields: dict[str, Any] = {
        "container_id": "c",
        "pod_id": "p",
        "image_id": "i",
        "config": config or make.container(),
        "sandbox": make.sandbox(),
        "image_config": make.image_config(),
    }
    return request.container_create(**(fields | changes))


# -- what storage is asked --------------------------------------------------------------------------------


def test_cdi_devices_of_field_and_annotations_are_asked_for_once_each() -> None:
    config = make.container(
        CDI_devices=[api_pb2.CDIDevice(name="v.com/c=1")],
        annotations={
            "cdi.k8s.io/b": "v.com/c=3",
            "cdi.k8s.io/a": "v.com/c=2, v.com/c=1",
            "other": "v.com/c=4",
        },
    )
    assert asked(config).cdi_devices == ["v.com/c=1", "v.com/c=2", "v.com/c=3"]


def test_cdi_devices_of_an_image_or_a_pod_are_nobodys() -> None:
    image = make.image_config(Labels={"cdi.k8s.io/a": "v.com/c=1"}, Cmd=["sh"])
    pod = make.sandbox(annotations={"cdi.k8s.io/a": "v.com/c=1"})
    assert asked(image_config=image, sandbox=pod).cdi_devices == []


def test_hooks_are_chosen_by_program_annotations_and_mounts() -> None:
    mounts = [api_pb2.Mount(container_path="/a", host_path="/b")]
    config = make.container(command=["/bin/x", "y"], annotations={"a": "1"}, mounts=mounts)
    facts = asked(config).hook_facts
    assert facts == storage.HookFacts(command="/bin/x", annotations={"a": "1"}, bind_mounts=True)


def test_an_image_volume_is_asked_for_by_the_images_id() -> None:
    plain = api_pb2.Mount(container_path="/a", host_path="/b")
    sources = asked(make.container(mounts=[plain, VOLUME]), mount_images=["", "sha256:1"]).mounts
    assert [(s.path, s.image_id, s.sub_path) for s in sources] == [("/b", "", ""), ("", "sha256:1", "a/b")]


def test_volumes_of_the_image_are_directories_to_make() -> None:
    def directories(volumes: Any) -> list[str]:
        return asked(image_config=make.image_config(Volumes=volumes)).directories

    assert directories({"/b//c/": {}, "a": {}, "/": {}}) == ["/a", "/b/c"]
    assert directories(None) == []
    for bad in ("/a/../b", "/a\0b"):
        with pytest.raises(RemoteError, match="VOLUME"):
            directories({bad: {}})
    with pytest.raises(RemoteError, match="VOLUME"):
        directories({f"/{number}": {} for number in range(257)})


def test_mounts_are_relabelled_on_request_where_there_is_selinux() -> None:
    options = api_pb2.SELinuxOption(level="s0:c1,c2")
    config = make.container(
        Security(selinux_options=options),
        mounts=[
            api_pb2.Mount(container_path="/a", host_path="/a", selinux_relabel=True),
            api_pb2.Mount(container_path="/b", host_path="/b"),
        ],
    )
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    assert [source.relabel for source in asked(config, selinux=True).mounts] == [label, ""]
    assert [source.relabel for source in asked(config).mounts] == ["", ""]


# -- what the spec becomes --------------------------------------------------------------------------------


def spec(edits: CdiEdits, config: api_pb2.ContainerConfig | None = None, **more: Any) -> dict[str, Any]:
    return make.spec(config, rootfs=make.rootfs(cdi=edits, **more))


def test_variables_of_cdi_win() -> None:
    config = make.container(
        envs=[api_pb2.KeyValue(key="A", value=b"1"), api_pb2.KeyValue(key="B", value=b"1")]
    )
    env = spec(CdiEdits(env=["A=2", "C=x=y", "A=3"]), config)["process"]["env"]
    assert {"A=3", "B=1", "C=x=y"} <= set(env)
    assert sum(entry.startswith("A=") for entry in env) == 1


def test_nodes_of_cdi_are_made_and_allowed_and_belong_to_the_process() -> None:
    nodes = [
        CdiNode(path="/dev/a", type="c", major=1, minor=2, permissions="r"),
        CdiNode(path="/dev/b", type="b", major=3, minor=4, permissions="rwm", uid=9, gid=8, mode=0o600),
        CdiNode(path="/dev/p", type="p", major=0, minor=0, permissions=""),
    ]
    made = spec(CdiEdits(nodes=nodes), uid=5, gid=6)["linux"]
    assert made["devices"] == [
        {"path": "/dev/a", "type": "c", "major": 1, "minor": 2, "uid": 5, "gid": 6},
        {"path": "/dev/b", "type": "b", "major": 3, "minor": 4, "fileMode": 0o600, "uid": 9, "gid": 8},
        {"path": "/dev/p", "type": "p", "uid": 5, "gid": 6},
    ]
    assert made["resources"]["devices"][-2:] == [
        {"allow": True, "type": "c", "major": 1, "minor": 2, "access": "r"},
        {"allow": True, "type": "b", "major": 3, "minor": 4, "access": "rwm"},
    ]


def test_mounts_of_cdi_replace_those_at_their_place_and_stand_by_depth() -> None:
    config = make.container(
        mounts=[api_pb2.Mount(container_path=path, host_path=path) for path in ("/a", "/a/b/c", "/x")]
    )
    sources = [make.source(path) for path in ("/a", "/a/b/c", "/x")]
    added = [
        CdiMount(destination="/a/b", source="/cdi", type="bind", options=["rbind"]),
        CdiMount(destination="/x", source="/mine", type="bind", options=["bind", "ro"]),
    ]
    made = spec(CdiEdits(mounts=added), config, mounts=sources)["mounts"]
    order = [mount["destination"] for mount in made if mount["destination"][1] in "ax"]
    assert order == ["/a", "/x", "/a/b", "/a/b/c"]
    assert [mount["source"] for mount in made if mount["destination"] == "/x"] == ["/mine"]
    assert [mount["destination"] for mount in made[:4]] == ["/proc", "/dev", "/dev/pts", "/dev/mqueue"]


def test_groups_and_rdt_of_cdi_are_added() -> None:
    made = spec(CdiEdits(additional_gids=[44, 0, 44], intel_rdt={"closID": "a"}), gid=0)
    assert made["process"]["user"]["additionalGids"] == [0, 44]
    assert made["linux"]["intelRdt"] == {"closID": "a"}


def test_hooks_stand_in_their_stages_without_what_is_not_set() -> None:
    hooks = {"prestart": [Hook(path="/a"), Hook(path="/b", args=["b", "c"], env=["X=1"], timeout=3)]}
    made = make.spec(rootfs=make.rootfs(hooks=hooks))["hooks"]
    assert made == {
        "prestart": [
            {"path": "/a"},
            {"path": "/b", "args": ["b", "c"], "env": ["X=1"], "timeout": 3},
        ]
    }
    assert "hooks" not in make.spec()


def test_an_image_volume_is_a_read_only_bind_without_rights() -> None:
    source = make.source("/run/v/0/a", locked_flags=["ro", "nosuid", "nodev"])
    made = make.spec(make.container(mounts=[VOLUME]), rootfs=make.rootfs(mounts=[source]))["mounts"]
    (mount,) = [each for each in made if each["destination"] == "/v"]
    assert (mount["type"], mount["source"]) == ("bind", "/run/v/0/a")
    assert mount["options"] == ["rbind", "rprivate", "ro", "nosuid", "nodev"]


def test_names_with_nul_bytes_reach_no_spec() -> None:
    image = api_pb2.ImageSpec(image="x", user_specified_image="a\0b")
    with pytest.raises(RemoteError) as refused:
        asked(make.container(image=image))
    assert refused.value.code is Code.INVALID_ARGUMENT
