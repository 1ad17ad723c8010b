"""Namespaces, cgroups, limits, devices, hidden paths, annotations."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError
from ipc.settings import Runtime
from tests.support import spec_inputs as make
from workers.cri.spec import cgroups
from workers.cri.spec.build import oci_version
from workers.cri.spec.linux import MASKED_PATHS, READONLY_PATHS

Security = api_pb2.LinuxContainerSecurityContext
Resources = api_pb2.LinuxContainerResources
ID = make.CONTAINER_ID


def linux(config: api_pb2.ContainerConfig | None = None, **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = make.spec(config, **changes)["linux"]
    return result


def namespaces(options: api_pb2.NamespaceOption | None = None, **changes: Any) -> dict[str, str]:
    security = Security(namespace_options=options) if options is not None else Security()
    found = linux(make.container(security), **changes)["namespaces"]
    assert len({each["type"] for each in found}) == len(found)
    return {each["type"]: each.get("path", "") for each in found}


def test_container_joins_the_namespaces_of_its_pod() -> None:
    assert namespaces() == {
        "mount": "",
        "network": make.PINNED["net"],
        "uts": make.PINNED["uts"],
        "ipc": make.PINNED["ipc"],
        "pid": make.PINNED["pid"],
        "cgroup": "",
    }


def test_node_modes_use_the_nodes_namespaces() -> None:
    options = api_pb2.NamespaceOption(network=api_pb2.NODE, ipc=api_pb2.NODE, pid=api_pb2.NODE)
    assert namespaces(options) == {"mount": "", "cgroup": ""}


def test_container_modes_make_new_ones() -> None:
    options = api_pb2.NamespaceOption(ipc=api_pb2.CONTAINER, pid=api_pb2.CONTAINER)
    found = namespaces(options)
    assert (found["ipc"], found["pid"]) == ("", "")


def test_options_of_the_sandbox_count_where_the_container_has_none() -> None:
    options = api_pb2.NamespaceOption(network=api_pb2.NODE, pid=api_pb2.CONTAINER)
    sandbox = make.sandbox(api_pb2.LinuxSandboxSecurityContext(namespace_options=options))
    found = namespaces(sandbox=sandbox, namespaces={"ipc": "/ipc"})
    assert found == {"mount": "", "ipc": "/ipc", "pid": "", "cgroup": ""}


def test_pod_mode_in_a_pod_on_the_node_is_the_node() -> None:
    options = api_pb2.NamespaceOption(network=api_pb2.NODE, ipc=api_pb2.NODE, pid=api_pb2.NODE)
    sandbox = make.sandbox(api_pb2.LinuxSandboxSecurityContext(namespace_options=options))
    assert namespaces(api_pb2.NamespaceOption(), sandbox=sandbox, namespaces={}) == {
        "mount": "",
        "cgroup": "",
    }


def test_target_joins_the_other_container() -> None:
    options = api_pb2.NamespaceOption(pid=api_pb2.TARGET, target_id="other")
    assert namespaces(options, target_pid_namespace="/proc/9/ns/pid")["pid"] == "/proc/9/ns/pid"
    with pytest.raises(RemoteError, match="no PID namespace to join"):
        namespaces(options)


@pytest.mark.parametrize("missing", ["net", "ipc", "uts", "pid"])
def test_namespace_that_the_pod_should_have_and_has_not_is_refused(missing: str) -> None:
    with pytest.raises(RemoteError, match="to share") as refused:
        namespaces(namespaces={key: path for key, path in make.PINNED.items() if key != missing})
    assert refused.value.code is Code.FAILED_PRECONDITION


def test_cgroup_namespace_is_for_v2_and_the_unprivileged() -> None:
    assert "cgroup" not in namespaces(host=make.host(cgroup_version=1))
    privileged = make.container(Security(privileged=True))
    found = linux(privileged, sandbox=make.privileged_sandbox())["namespaces"]
    assert {"type": "cgroup"} not in found


@pytest.mark.parametrize(
    ("driver", "parent", "oci", "relative"),
    [
        ("cgroupfs", "/kubepods/burstable/podX", f"/kubepods/burstable/podX/bulkhead-{ID}", ""),
        ("cgroupfs", "kubepods//podX/", f"/kubepods/podX/bulkhead-{ID}", ""),
        ("cgroupfs", "", f"/bulkhead/bulkhead-{ID}", ""),
        ("cgroupfs", "a-b.slice", f"/a.slice/a-b.slice/bulkhead-{ID}", ""),
        ("cgroupfs", "/a.slice/a-b.slice", f"/a.slice/a-b.slice/bulkhead-{ID}", ""),
        (
            "systemd",
            "kubepods-podX.slice",
            f"kubepods-podX.slice:bulkhead:{ID}",
            "/kubepods.slice/kubepods-podX.slice",
        ),
        (
            "systemd",
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podX_Y.slice",
            f"kubepods-besteffort-podX_Y.slice:bulkhead:{ID}",
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podX_Y.slice",
        ),
        (
            "systemd",
            "/kubepods/burstable/pod1-2",
            f"kubepods-burstable-pod1_2.slice:bulkhead:{ID}",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
        ),
        ("systemd", "", f"system.slice:bulkhead:{ID}", "/system.slice"),
        ("systemd", "/", f"-.slice:bulkhead:{ID}", ""),
    ],
)
def test_cgroup_path_in_both_drivers_and_spellings(driver: str, parent: str, oci: str, relative: str) -> None:
    made = make.built(sandbox=make.sandbox(cgroup_parent=parent), host=make.host(cgroup_driver=driver))
    assert msgspec.json.decode(made.spec)["linux"]["cgroupsPath"] == oci
    assert made.systemd_cgroup is (driver == "systemd")
    assert made.cgroup_path == (f"{relative}/bulkhead-{ID}.scope" if driver == "systemd" else oci)


def test_default_parent_is_that_of_the_configuration() -> None:
    found = cgroups.cgroup_path("cgroupfs", "", "/mine", "x")
    assert found.oci == found.relative == "/mine/bulkhead-x"


@pytest.mark.parametrize("parent", ["/a/../b", "..", "a:b", "/a\nb", "/a\0", "a--b.slice"])
@pytest.mark.parametrize("driver", ["systemd", "cgroupfs"])
def test_cgroup_parent_that_is_no_name_is_refused(driver: str, parent: str) -> None:
    with pytest.raises(RemoteError, match="cgroup_parent"):
        cgroups.cgroup_path(driver, parent, "", ID)


def limits(resources: Resources, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = linux(make.container(resources=resources), **changes)["resources"]
    return {key: value for key, value in found.items() if key != "devices"}


def test_limits_that_are_not_set_are_not_there() -> None:
    assert limits(Resources()) == {}
    zero = [api_pb2.HugepageLimit(page_size=size, limit=0) for size in ("2MB", "1GB")]
    assert limits(Resources(hugepage_limits=zero), host=make.host(cgroup_controllers=[])) == {}


def test_limits_are_passed_on() -> None:
    resources = Resources(
        cpu_period=100_000,
        cpu_quota=-1,
        cpu_shares=2,
        memory_limit_in_bytes=2**20,
        memory_swap_limit_in_bytes=2**21,
        cpuset_cpus="0-1,3",
        cpuset_mems="0",
        unified={"memory.high": "max"},
        hugepage_limits=[
            api_pb2.HugepageLimit(page_size="2MB", limit=2**64 - 1),
            api_pb2.HugepageLimit(page_size="1GB", limit=0),
        ],
    )
    assert limits(resources) == {
        "cpu": {"shares": 2, "period": 100_000, "cpus": "0-1,3", "mems": "0"},
        "memory": {"limit": 2**20, "swap": 2**21},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 2**63 - 1}, {"pageSize": "1GB", "limit": 0}],
        "unified": {"memory.high": "max"},
    }


def test_swap_limit_without_swap_is_noted_if_it_gives_some() -> None:
    host = make.host(swap=False)
    equal = make.container(resources=Resources(memory_limit_in_bytes=2**20, memory_swap_limit_in_bytes=2**20))
    made = make.built(equal, host=host)
    assert msgspec.json.decode(made.spec)["linux"]["resources"]["memory"] == {"limit": 2**20}
    assert made.degraded == ()
    more = make.container(resources=Resources(memory_limit_in_bytes=2**20, memory_swap_limit_in_bytes=2**21))
    assert any("swap" in note for note in make.built(more, host=host).degraded)


@pytest.mark.parametrize(
    "fields",
    [
        {"cpu_quota": -2},
        {"cpu_shares": -1},
        {"cpu_period": -1},
        {"memory_limit_in_bytes": -2},
        {"memory_limit_in_bytes": 1024},
        {"memory_swap_limit_in_bytes": 2**20},
        {"memory_limit_in_bytes": 2**21, "memory_swap_limit_in_bytes": 2**20},
        {"cpuset_cpus": "0,a"},
        {"cpuset_mems": "0-"},
        {"hugepage_limits": [api_pb2.HugepageLimit(page_size="2", limit=1)]},
        {"unified": {"../x.y": "1"}},
        {"unified": {"cgroup": "1"}},
    ],
)
def test_limit_that_is_none_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RemoteError) as refused:
        limits(Resources(**fields))
    assert refused.value.code is Code.INVALID_ARGUMENT


def test_limits_that_the_node_cannot_hold_are_refused() -> None:
    pages = Resources(hugepage_limits=[api_pb2.HugepageLimit(page_size="2MB", limit=1)])
    for resources, host in (
        (pages, make.host(cgroup_controllers=["memory"])),
        (Resources(unified={"memory.high": "1"}), make.host(cgroup_version=1)),
    ):
        with pytest.raises(RemoteError) as refused:
            limits(resources, host=host)
        assert refused.value.code is Code.FAILED_PRECONDITION


def test_devices_are_denied_but_for_the_default_ones() -> None:
    rules = linux()["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    opened = {(rule.get("major"), rule.get("minor")) for rule in rules[1:] if "r" in rule["access"]}
    assert opened == {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None)}
    assert linux()["devices"] == []


def test_requested_device_gets_a_node_and_a_rule() -> None:
    config = make.container(
        devices=[
            api_pb2.Device(host_path="/dev/fuse", container_path="/dev/myfuse", permissions="rw"),
            api_pb2.Device(host_path="/dev/snd"),
        ]
    )
    found = [
        make.device("/dev/fuse", 10, 229, mode=0o666, gid=3),
        make.device("/dev/snd", 116, 1, suffix="/seq"),
        make.device("/dev/snd", 116, 2, suffix="/by-path/x", type="c"),
    ]
    made = linux(config, rootfs=make.rootfs(devices=found))
    assert made["devices"][0] == {
        "path": "/dev/myfuse",
        "type": "c",
        "major": 10,
        "minor": 229,
        "fileMode": 0o666,
        "uid": 0,
        "gid": 3,
    }
    assert [node["path"] for node in made["devices"][1:]] == ["/dev/snd/seq", "/dev/snd/by-path/x"]
    assert {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"} in made["resources"][
        "devices"
    ]


@pytest.mark.parametrize("permissions", ["x", "rr", "rwx", "r,w"])
def test_device_permissions_are_letters_of_rwm(permissions: str) -> None:
    config = make.container(devices=[api_pb2.Device(host_path="/dev/fuse", permissions=permissions)])
    with pytest.raises(RemoteError, match="permissions"):
        linux(config, rootfs=make.rootfs(devices=[make.device("/dev/fuse", 10, 229)]))


def test_device_that_was_not_found_is_refused() -> None:
    with pytest.raises(RemoteError, match="not a device of this node"):
        linux(make.container(devices=[api_pb2.Device(host_path="/dev/gone")]))


def test_privileged_container_has_all_devices() -> None:
    config = make.container(
        Security(privileged=True), devices=[api_pb2.Device(host_path="/dev/fuse", container_path="/dev/f2")]
    )
    found = [make.device("/dev/fuse", 10, 229), make.device("/dev/kmsg", 1, 11)]
    made = linux(config, sandbox=make.privileged_sandbox(), rootfs=make.rootfs(devices=found))
    assert {node["path"] for node in made["devices"]} == {"/dev/fuse", "/dev/kmsg", "/dev/f2"}
    assert made["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    noted = make.built(make.container(Security(privileged=True)), sandbox=make.privileged_sandbox())
    assert any("devices" in note for note in noted.degraded)


def test_hidden_paths_are_the_requests_else_the_default() -> None:
    made = linux()
    assert (made["maskedPaths"], made["readonlyPaths"]) == (list(MASKED_PATHS), list(READONLY_PATHS))
    own = linux(make.container(Security(masked_paths=["/a//b", "/a/b"], readonly_paths=["/c"])))
    assert (own["maskedPaths"], own["readonlyPaths"]) == (["/a/b"], ["/c"])


def test_nothing_is_hidden_from_a_privileged_container() -> None:
    security = Security(privileged=True, masked_paths=["/a"], readonly_paths=["/b"])
    made = linux(make.container(security), sandbox=make.privileged_sandbox())
    assert made["maskedPaths"] == made["readonlyPaths"] == []


@pytest.mark.parametrize("path", ["a", "/a/../b"])
def test_hidden_path_that_is_not_absolute_is_refused(path: str) -> None:
    with pytest.raises(RemoteError, match="masked_paths"):
        linux(make.container(Security(masked_paths=[path])))


def test_annotations_are_passed_on_as_allowed_and_never_those_that_runtimes_act_on() -> None:
    own = {
        "example.com/a": "1",
        "example.com/b": "2",
        "exact": "3",
        "exactly": "4",
        "run.oci.handler": "wasm",
        "run.oci.hooks.stdout": "/x",
        "org.systemd.property.ExecStart": "x",
        "org.criu.config": "/x",
        "module.wasm.image/variant": "x",
        "bundle": "/x",
        "io.kubernetes.cri.container-type": "sandbox",
    }
    config = make.container(
        annotations=own, image=api_pb2.ImageSpec(image="sha256:1", user_specified_image="busybox")
    )
    ours = {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.container-name": "main",
        "io.kubernetes.cri.sandbox-id": make.POD_ID,
        "io.kubernetes.cri.sandbox-name": "pod",
        "io.kubernetes.cri.sandbox-namespace": "ns",
        "io.kubernetes.cri.sandbox-uid": "u1",
        "io.kubernetes.cri.image-id": "sha256:" + "a" * 64,
        "io.kubernetes.cri.image-name": "busybox",
    }
    assert make.spec(config)["annotations"] == ours
    pod = make.sandbox(annotations={"example.com/a": "the pod's", "example.com/pod": "5", "other": "6"})
    crun = Runtime(name="crun", path="/c", root="/r", allowed_annotations=["example.com/*", "exact"])
    everything = Runtime(name="crun", path="/c", root="/r", allowed_annotations=["*"])
    passed = {"example.com/a": "1", "example.com/b": "2", "exact": "3", "example.com/pod": "5"}
    made = make.spec(config, sandbox=pod, settings=make.settings(runtimes=[crun]))
    assert made["annotations"] == ours | passed
    made = make.spec(config, sandbox=pod, settings=make.settings(runtimes=[everything]))
    assert made["annotations"] == ours | passed | {"exactly": "4", "other": "6"}


def test_systemd_is_told_to_make_no_group_below_the_containers_scope() -> None:
    key = "run.oci.systemd.subgroup"
    config = make.container(annotations={key: "elsewhere"})
    everything = make.settings(
        runtimes=[Runtime(name="crun", path="/c", root="/r", allowed_annotations=["*"])]
    )
    made = make.spec(config, host=make.host(cgroup_driver="systemd"), settings=everything)
    assert made["annotations"][key] == ""
    assert key not in make.spec(config, settings=everything)["annotations"]


def test_systemd_knows_the_limits_that_it_would_else_undo() -> None:
    limits = Resources(
        cpu_quota=33_333,
        cpu_period=100_000,
        memory_limit_in_bytes=64 << 20,
        memory_swap_limit_in_bytes=80 << 20,
        unified={"pids.max": "40", "memory.high": "max", "memory.oom.group": "1"},
    )
    made = make.spec(make.container(resources=limits), host=make.host(cgroup_driver="systemd"))
    prefix = "org.systemd.property."
    found = {k.removeprefix(prefix): v for k, v in made["annotations"].items() if k.startswith(prefix)}
    assert found == {
        "CollectMode": "'inactive-or-failed'",
        "CPUQuotaPerSecUSec": "uint64 340000",
        "CPUQuotaPeriodUSec": "uint64 100000",
        "MemoryMax": f"uint64 {64 << 20}",
        "MemorySwapMax": f"uint64 {16 << 20}",
        "MemoryHigh": f"uint64 {2**64 - 1}",
        "TasksMax": "uint64 40",
    }


def test_only_systemd_is_told_of_limits_and_on_v1_in_the_words_of_v1() -> None:
    limits = {"memory": {"limit": 1 << 20, "swap": 2 << 20}, "cpu": {"quota": 50_000, "shares": 512}}
    assert cgroups.unit_properties(limits, make.host(cgroup_driver="cgroupfs")) == {}
    on_v1 = make.host(cgroup_driver="systemd", cgroup_version=1)
    expected = {"MemoryLimit": 1 << 20, "CPUQuotaPerSecUSec": 500_000}
    assert cgroups.unit_properties(limits, on_v1) == expected
    assert cgroups.unit_properties({"memory": {"limit": -1}}, on_v1) == {"MemoryLimit": 2**64 - 1}
    assert cgroups.unit_properties({}, on_v1) == {}


def test_no_limit_is_told_to_systemd_as_its_infinity() -> None:
    limits = {"memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1}}
    found = cgroups.unit_properties(limits, make.host(cgroup_driver="systemd"))
    assert found == dict.fromkeys(("CPUQuotaPerSecUSec", "MemoryMax", "MemorySwapMax"), 2**64 - 1)


def test_labels_of_the_image_go_nowhere() -> None:
    image = make.image_config(Labels={"run.oci.handler": "x", "evil": "yes"}, Cmd=["sh"])
    assert b"evil" not in make.built(image_config=image).spec


def test_root_is_read_only_on_request() -> None:
    assert make.spec()["root"] == {"path": "/rootfs", "readonly": False}
    assert make.spec(make.container(Security(readonly_rootfs=True)))["root"]["readonly"] is True


@pytest.mark.parametrize(
    ("newest", "version"),
    [
        ("1.0.2", "1.0.2"),
        ("1.0.2-dev", "1.0.2"),
        ("1.1.0", "1.1.0"),
        ("1.2.1+dev", "1.0.2"),
        ("1.2.1", "1.1.0"),
        ("", "1.0.2"),
        ("x", "1.0.2"),
    ],
)
def test_version_is_one_that_the_runtime_reads(newest: str, version: str) -> None:
    assert oci_version(newest) == version
