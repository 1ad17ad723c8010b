"""Mounts: defaults, the pod's files, and what a CRI mount means."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError
from ipc.messages.storage import MountSourceInfo, PodFiles
from tests.support import spec_inputs as make

Security = api_pb2.LinuxContainerSecurityContext
PRIVATE, SLAVE, SHARED = (
    api_pb2.PROPAGATION_PRIVATE,
    api_pb2.PROPAGATION_HOST_TO_CONTAINER,
    api_pb2.PROPAGATION_BIDIRECTIONAL,
)


def mount(target: str, source: str = "/src", **fields: Any) -> api_pb2.Mount:
    return api_pb2.Mount(container_path=target, host_path=source, **fields)


def built(
    *mounts: api_pb2.Mount,
    sources: list[MountSourceInfo] | None = None,
    security: Security | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    found = sources if sources is not None else [make.source(m.host_path, shared=True) for m in mounts]
    config = make.container(security, mounts=list(mounts))
    changes.setdefault("rootfs", make.rootfs(mounts=found))
    result: list[dict[str, Any]] = make.spec(config, **changes)["mounts"]
    return result


def at(mounts: list[dict[str, Any]], destination: str) -> dict[str, Any]:
    (found,) = [each for each in mounts if each["destination"] == destination]
    return found


def test_default_mounts_come_first_and_in_order() -> None:
    destinations = [each["destination"] for each in built()]
    kernel = ["/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup"]
    assert destinations[:6] == kernel
    assert set(destinations[6:]) == {"/dev/shm", "/etc/resolv.conf", "/etc/hostname", "/etc/hosts"}


@pytest.mark.parametrize(("privileged", "access"), [(False, "ro"), (True, "rw")])
def test_sysfs_and_cgroup_are_writable_for_privileged_containers_only(privileged: bool, access: str) -> None:
    sandbox = make.privileged_sandbox() if privileged else make.sandbox()
    mounts = built(security=Security(privileged=privileged), sandbox=sandbox)
    assert access in at(mounts, "/sys")["options"]
    assert access in at(mounts, "/sys/fs/cgroup")["options"]


@pytest.mark.parametrize(("readonly", "access"), [(False, "rw"), (True, "ro")])
def test_files_of_the_pod_are_writable_where_the_root_is(readonly: bool, access: str) -> None:
    mounts = built(security=Security(readonly_rootfs=readonly))
    for path in ("/etc/resolv.conf", "/etc/hostname", "/etc/hosts"):
        assert access in at(mounts, path)["options"]
    assert "rw" in at(mounts, "/dev/shm")["options"]


def test_files_that_the_request_mounts_itself_are_its_own() -> None:
    mounts = built(mount("/etc/hosts", "/kubelet/hosts"), mount("/dev/shm", "/big"))
    assert at(mounts, "/etc/hosts")["source"] == "/kubelet/hosts"
    assert at(mounts, "/dev/shm")["source"] == "/big"


def test_files_that_the_pod_does_not_have_are_not_mounted() -> None:
    files = PodFiles(directory="/d", shm="", resolv_conf="", hostname="/d/hostname", hosts="")
    destinations = {each["destination"] for each in built(pod_files=files)}
    assert "/etc/hostname" in destinations
    assert not {"/etc/resolv.conf", "/etc/hosts"} & destinations


@pytest.mark.parametrize(
    ("mode", "kind", "origin"),
    [
        (api_pb2.POD, "bind", f"/run/bulkhead/pods/{make.POD_ID}/shm"),
        (api_pb2.NODE, "bind", "/dev/shm"),
        (api_pb2.CONTAINER, "tmpfs", "shm"),
    ],
)
def test_shared_memory_follows_the_ipc_namespace(mode: Any, kind: str, origin: str) -> None:
    options = api_pb2.NamespaceOption(ipc=mode)
    found = at(built(security=Security(namespace_options=options)), "/dev/shm")
    assert (found["type"], found["source"]) == (kind, origin)


def test_dev_of_the_host_brings_all_that_is_below() -> None:
    destinations = [each["destination"] for each in built(mount("/dev", "/dev"))]
    assert not {"/dev/pts", "/dev/mqueue"} & set(destinations)
    assert destinations.count("/dev") == 1


def test_sys_of_the_host_brings_its_cgroups() -> None:
    destinations = [each["destination"] for each in built(mount("/sys", "/sys"))]
    assert "/sys/fs/cgroup" not in destinations


def test_resolv_conf_is_mounted_over_a_volume_at_etc() -> None:
    destinations = [each["destination"] for each in built(mount("/etc", "/volume"))]
    assert destinations.index("/etc") < destinations.index("/etc/resolv.conf")


def test_requested_mounts_are_sorted_by_depth_and_otherwise_keep_their_order() -> None:
    mounts = built(
        mount("/a/b/c", "/1"), mount("/z", "/2"), mount("/a/b", "/3"), mount("/a", "/4"), mount("/y", "/5")
    )
    order = [each["destination"] for each in mounts if each["source"][1:].isdigit()]
    assert order == ["/z", "/a", "/y", "/a/b", "/a/b/c"]


@pytest.mark.parametrize(
    ("propagation", "option", "root"),
    [(PRIVATE, "rprivate", "rprivate"), (SLAVE, "rslave", "rslave"), (SHARED, "rshared", "rshared")],
)
def test_propagation_is_an_option_of_the_mount_and_of_the_root(
    propagation: Any, option: str, root: str
) -> None:
    config = make.container(mounts=[mount("/a", propagation=propagation), mount("/b")])
    sources = [make.source("/real", shared=True), make.source("/b")]
    spec = make.spec(config, rootfs=make.rootfs(mounts=sources))
    found = at(spec["mounts"], "/a")
    assert found["source"] == "/real"
    assert found["options"][:3] == ["rbind", option, "rw"]
    assert spec["linux"]["rootfsPropagation"] == root


def test_shared_source_is_needed_for_bidirectional() -> None:
    with pytest.raises(RemoteError, match="shared") as refused:
        built(mount("/a", propagation=SHARED), sources=[make.source("/src", slave=True)])
    assert refused.value.code is Code.FAILED_PRECONDITION


def test_shared_or_slave_source_is_needed_for_host_to_container() -> None:
    built(mount("/a", propagation=SLAVE), sources=[make.source("/src", slave=True)])
    with pytest.raises(RemoteError, match="shared or slave"):
        built(mount("/a", propagation=SLAVE), sources=[make.source("/src")])


def test_readonly_and_options_are_passed_on_and_flags_of_the_source_stay() -> None:
    request = mount("/a", readonly=True, mount_options=["noexec", "nosuid"])
    found = at(built(request, sources=[make.source("/src", locked_flags=["nosuid", "nodev", "ro"])]), "/a")
    assert found["options"] == ["rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"]


@pytest.mark.parametrize("option", ["ro", "rw", "remount", "bind", "size=1g", "mand", "", "rshared"])
def test_unknown_mount_option_is_refused(option: str) -> None:
    with pytest.raises(RemoteError, match="mount_options"):
        built(mount("/a", mount_options=[option]))


def test_recursive_read_only_needs_the_runtime() -> None:
    request = mount("/a", readonly=True, recursive_read_only=True)
    able = make.runtime(recursive_read_only=True)
    assert "rro" in at(built(request, runtime=able), "/a")["options"]
    with pytest.raises(RemoteError) as refused:
        built(request)
    assert refused.value.reason == "RROUnsupported"
    assert refused.value.message.startswith("RROUnsupported: ")


@pytest.mark.parametrize("fields", [{"readonly": False}, {"readonly": True, "propagation": SLAVE}])
def test_recursive_read_only_needs_readonly_and_private_propagation(fields: dict[str, Any]) -> None:
    with pytest.raises(RemoteError, match="recursive_read_only needs") as refused:
        built(mount("/a", recursive_read_only=True, **fields), runtime=make.runtime(recursive_read_only=True))
    assert refused.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("target", ["", "relative", "/", "//", "/a/../b", "/..", "/a\0b"])
def test_destination_that_is_not_a_clean_absolute_path_is_refused(target: str) -> None:
    with pytest.raises(RemoteError) as refused:
        built(mount(target))
    assert refused.value.code is Code.INVALID_ARGUMENT


def test_destination_is_cleaned() -> None:
    assert at(built(mount("//a/./b//")), "/a/b")


def test_relabelling_on_a_node_with_selinux_is_noted() -> None:
    config = make.container(mounts=[mount("/a", selinux_relabel=True)])
    found = make.rootfs(mounts=[make.source("/src")])
    assert make.built(config, rootfs=found).degraded == ()
    assert any(
        "label" in note for note in make.built(config, rootfs=found, host=make.host(selinux=True)).degraded
    )


def test_answer_of_storage_with_other_mounts_is_our_bug() -> None:
    with pytest.raises(RemoteError) as refused:
        built(mount("/a"), sources=[])
    assert refused.value.code is Code.INTERNAL
