"""What plugins answer, put together: owners, removals, conflicts, and what the spec becomes."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages.nri import ContainerFacts, PodFacts
from ipc.nri import nri_pb2 as pb
from workers.nri import adjust, oci, resources
from workers.nri.owners import Conflict, Owners
from workers.nri.result import Adjustments, Updates

SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {
        "args": ["sleep", "1"],
        "env": ["PATH=/bin", "A=1"],
        "rlimits": [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        "oomScoreAdj": 100,
        "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
    },
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
        {"destination": "/data/sub", "type": "bind", "source": "/srv", "options": ["rbind"]},
    ],
    "annotations": {"old": "1"},
    "hooks": {"poststop": [{"path": "/bin/old", "timeout": 3}]},
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "network", "path": "/ns/net"}],
        "devices": [{"path": "/dev/a", "type": "c", "major": 1, "minor": 3, "fileMode": 438}],
        "resources": {
            "devices": [{"allow": False, "access": "rwm"}],
            "memory": {"limit": 100, "swap": 150},
            "cpu": {"shares": 10, "cpus": "0-1"},
        },
        "sysctl": {"net.a": "1"},
        "cgroupsPath": "/pods/x",
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "syscalls": [
                {
                    "names": ["clone"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 7, "valueTwo": 8, "op": "SCMP_CMP_MASKED_EQ"}],
                }
            ],
        },
    },
}


def shown(spec: dict[str, Any] | None = None, **facts: Any) -> pb.Container:
    data = msgspec.json.encode(spec or SPEC)
    one = ContainerFacts(id="c1", pod_id="p1", name="main", state="creating", spec=data, **facts)
    return oci.container(one, seccomp=True)


def answer(**fields: Any) -> pb.CreateContainerResponse:
    return pb.CreateContainerResponse(adjust=pb.ContainerAdjustment(**fields))


def adjusted(*answers: pb.CreateContainerResponse) -> dict[str, Any]:
    """The spec after these plugins; each must have seen what those before it did."""
    adjustments = Adjustments(shown())
    for number, one in enumerate(answers):
        adjustments.add(one, f"{number}-plugin")
    spec = copy.deepcopy(SPEC)
    assert adjust.apply(spec, adjustments.adjust) == []
    again = shown(spec)
    for field in ("annotations", "args", "env", "rlimits", "hooks"):
        assert _plain(getattr(again, field)) == _plain(getattr(adjustments.container, field)), field
    for field in ("namespaces", "devices", "sysctl", "cgroups_path", "oom_score_adj", "seccomp_policy"):
        ours, theirs = getattr(again.linux, field), getattr(adjustments.container.linux, field)
        assert _plain(ours) == _plain(theirs), field
    return spec


def _plain(value: Any) -> Any:
    """Without the order of what has keys."""
    if isinstance(value, str | int | bytes) or hasattr(value, "SerializeToString"):
        return value
    return dict(value) if hasattr(value, "items") else sorted(map(str, value))


def test_a_container_is_shown_with_all_that_its_spec_says() -> None:
    one = shown(seccomp_profile="localhost/x", labels={"l": "1"}, annotations={"mine": "2"})
    assert (one.id, one.pod_sandbox_id, one.name, one.state) == ("c1", "p1", "main", pb.CONTAINER_CREATED)
    assert dict(one.annotations) == {"old": "1", "mine": "2"}
    assert (one.user.uid, one.user.gid, list(one.user.additional_gids)) == (1, 2, [3])
    assert one.linux.seccomp_profile.localhost_ref == "x"
    assert one.linux.seccomp_policy.syscalls[0].args[0].value_two == 8
    assert one.linux.resources.memory.swap.value == 150
    assert one.hooks.poststop[0].timeout.value == 3
    pod = oci.pod(PodFacts(id="p", name="n", uid="u", namespace="ns", overhead=b'{"cpu":{"shares":5}}'))
    assert pod.linux.pod_overhead.cpu.shares.value == 5
    assert not pod.linux.HasField("pod_resources")


def test_every_kind_of_adjustment_lands_in_the_spec() -> None:
    linux = pb.LinuxContainerAdjustment(
        devices=[pb.LinuxDevice(path="/dev/b", type="b", major=7, minor=1)],
        cgroups_path="/pods/y",
        sysctl={"net.b": "2"},
        namespaces=[pb.LinuxNamespace(type="ipc", path="/ns/ipc")],
        net_devices={"eth7": pb.LinuxNetDevice(name="lan")},
        io_priority=pb.LinuxIOPriority(**{"class": pb.IOPRIO_CLASS_BE}, priority=4),
        scheduler=pb.LinuxScheduler(policy=pb.SCHED_FIFO, priority=5, flags=[pb.SCHED_FLAG_RESET_ON_FORK]),
        memory_policy=pb.LinuxMemoryPolicy(mode=pb.MPOL_BIND, nodes="0", flags=[pb.MPOL_F_STATIC_NODES]),
        seccomp_policy=pb.LinuxSeccomp(default_action="SCMP_ACT_ALLOW", architectures=["SCMP_ARCH_X86"]),
        oom_score_adj=pb.OptionalInt(value=7),
        rdt=pb.LinuxRdt(clos_id=pb.OptionalString(value="gold")),
    )
    linux.resources.memory.limit.value = 200
    linux.resources.pids.limit = 9
    linux.resources.unified["cpu.idle"] = "1"
    linux.resources.hugepage_limits.add(page_size="2MB", limit=4)
    spec = adjusted(
        answer(
            annotations={"new": "1"},
            mounts=[pb.Mount(destination="/data", source="/x", options=["rbind", "rslave"])],
            env=[pb.KeyValue(key="A", value="2")],
            args=["true"],
            hooks=pb.Hooks(create_runtime=[pb.Hook(path="/bin/h", args=["h"])]),
            rlimits=[pb.POSIXRlimit(type="RLIMIT_CORE", soft=1, hard=2)],
            linux=linux,
        )
    )
    assert spec["annotations"] == {"old": "1", "new": "1"}
    assert [one["destination"] for one in spec["mounts"]] == ["/proc", "/data", "/data/sub"]
    assert spec["mounts"][1] == {
        "destination": "/data",
        "type": "bind",
        "source": "/x",
        "options": ["rbind", "rslave"],
    }
    process = spec["process"]
    assert (process["args"], process["env"]) == (["true"], ["PATH=/bin", "A=2"])
    assert process["rlimits"] == [{"type": "RLIMIT_CORE", "soft": 1, "hard": 2}]
    assert process["oomScoreAdj"] == 7
    assert process["ioPriority"] == {"class": "IOPRIO_CLASS_BE", "priority": 4}
    assert process["scheduler"] == {
        "policy": "SCHED_FIFO",
        "priority": 5,
        "flags": ["SCHED_FLAG_RESET_ON_FORK"],
    }
    assert spec["hooks"]["createRuntime"] == [{"path": "/bin/h", "args": ["h"]}]
    got = spec["linux"]
    assert got["rootfsPropagation"] == "rslave"
    assert got["devices"][-1] == {"path": "/dev/b", "type": "b", "major": 7, "minor": 1}
    assert got["resources"]["devices"][-1] == {
        "allow": True,
        "type": "b",
        "access": "rwm",
        "major": 7,
        "minor": 1,
    }
    assert got["resources"]["memory"] == {"limit": 200, "swap": 200}, "swap counts memory too"
    assert got["resources"]["cpu"] == {"shares": 10, "cpus": "0-1"}
    assert got["resources"]["pids"] == {"limit": 9}
    assert got["resources"]["unified"] == {"cpu.idle": "1"}
    assert got["resources"]["hugepageLimits"] == [{"pageSize": "2MB", "limit": 4}]
    assert got["cgroupsPath"] == "/pods/y"
    assert got["sysctl"] == {"net.a": "1", "net.b": "2"}
    assert {"type": "ipc", "path": "/ns/ipc"} in got["namespaces"]
    assert got["netDevices"] == {"eth7": {"name": "lan"}}
    assert got["memoryPolicy"] == {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}
    assert got["seccomp"] == {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"]}
    assert got["intelRdt"] == {"closID": "gold"}
    wanted = pb.ContainerAdjustment(linux=linux)
    assert len(adjust.newer_than("1.0.2", wanted)) == 4
    assert len(adjust.newer_than("1.2.0-rc.1", wanted)) == 2
    assert adjust.newer_than("1.3.0", wanted) == []


def test_everything_with_a_key_can_be_removed() -> None:
    gone = answer(
        annotations={"-old": ""},
        mounts=[pb.Mount(destination="-/data/sub")],
        env=[pb.KeyValue(key="-A")],
        rlimits=[pb.POSIXRlimit(type="-RLIMIT_CORE")],
        linux=pb.LinuxContainerAdjustment(
            devices=[pb.LinuxDevice(path="-/dev/a")],
            sysctl={"-net.a": ""},
            namespaces=[pb.LinuxNamespace(type="-pid")],
            net_devices={"-eth1": pb.LinuxNetDevice()},
        ),
    )
    for spec in (adjusted(gone), adjusted(gone, answer())):
        assert spec["annotations"] == {}
        assert [one["destination"] for one in spec["mounts"]] == ["/proc"]
        assert spec["process"]["env"] == ["PATH=/bin"]
        assert spec["process"]["rlimits"] == spec["linux"]["devices"] == []
        assert spec["linux"]["sysctl"] == spec["linux"]["netDevices"] == {}
        assert spec["linux"]["namespaces"] == [{"type": "network", "path": "/ns/net"}]


SINGLE: dict[str, pb.CreateContainerResponse] = {
    "annotation": answer(annotations={"k": "v"}),
    "mount": answer(mounts=[pb.Mount(destination="/m", source="/s")]),
    "env": answer(env=[pb.KeyValue(key="K", value="v")]),
    "args": answer(args=["x"]),
    "rlimit": answer(rlimits=[pb.POSIXRlimit(type="RLIMIT_CPU")]),
    "cdi": answer(CDI_devices=[pb.CDIDevice(name="a/b=c")]),
    "device": answer(linux={"devices": [pb.LinuxDevice(path="/dev/x", type="c")]}),
    "sysctl": answer(linux={"sysctl": {"net.x": "1"}}),
    "namespace": answer(linux={"namespaces": [pb.LinuxNamespace(type="uts")]}),
    "net device": answer(linux={"net_devices": {"e": pb.LinuxNetDevice(name="f")}}),
    "cgroups path": answer(linux={"cgroups_path": "/x"}),
    "oom": answer(linux={"oom_score_adj": pb.OptionalInt(value=1)}),
    "io priority": answer(linux={"io_priority": pb.LinuxIOPriority(priority=1)}),
    "seccomp": answer(linux={"seccomp_policy": pb.LinuxSeccomp(default_action="SCMP_ACT_LOG")}),
    "scheduler": answer(linux={"scheduler": pb.LinuxScheduler(policy=pb.SCHED_RR)}),
    "memory policy": answer(linux={"memory_policy": pb.LinuxMemoryPolicy(nodes="0")}),
    "rdt": answer(linux={"rdt": pb.LinuxRdt(clos_id=pb.OptionalString(value="x"))}),
    "memory": answer(linux={"resources": {"memory": {"limit": {"value": 1}}}}),
    "cpu": answer(linux={"resources": {"cpu": {"quota": {"value": 1}}}}),
    "cpus": answer(linux={"resources": {"cpu": {"cpus": "0"}}}),
    "pids": answer(linux={"resources": {"pids": {"limit": 1}}}),
    "huge pages": answer(linux={"resources": {"hugepage_limits": [{"page_size": "2MB", "limit": 1}]}}),
    "unified": answer(linux={"resources": {"unified": {"a.b": "1"}}}),
    "class": answer(linux={"resources": {"rdt_class": {"value": "x"}}}),
}


@pytest.mark.parametrize("what", SINGLE)
def test_two_plugins_cannot_set_the_same_field(what: str) -> None:
    adjustments = Adjustments(shown())
    adjustments.add(SINGLE[what], "10-one")
    with pytest.raises(Conflict, match="plugins '10-one' and '20-two' both tried to set"):
        adjustments.add(SINGLE[what], "20-two")


def test_whoever_removes_first_may_set_what_another_one_has_set() -> None:
    spec = adjusted(
        answer(env=[pb.KeyValue(key="K", value="1")], args=["one"], annotations={"k": "1"}),
        answer(
            env=[pb.KeyValue(key="-K"), pb.KeyValue(key="K", value="2")],
            args=["", "two"],
            annotations={"-k": "", "k": "2"},
        ),
    )
    assert "K=2" in spec["process"]["env"]
    assert spec["process"]["args"] == ["two"]
    assert spec["annotations"]["k"] == "2"


def test_hooks_and_device_rules_add_up_and_have_all_their_owners() -> None:
    adjustments = Adjustments(shown())
    for name in ("one", "two"):
        adjustments.add(answer(hooks=pb.Hooks(prestart=[pb.Hook(path=f"/{name}")])), name)
    assert [hook.path for hook in adjustments.adjust.hooks.prestart] == ["/one", "/two"]
    assert adjustments.owners.of("c1", pb.OciHooks) == "one,two"


def limit(container_id: str, value: int, **fields: Any) -> pb.ContainerUpdate:
    update = pb.ContainerUpdate(container_id=container_id, **fields)
    update.linux.resources.memory.limit.value = value
    return update


def test_updates_of_others_merge_conflict_or_give_way() -> None:
    updates = Updates(Owners(), creating="new")
    updates.add([limit("a", 5)], "one")
    updates.add([pb.ContainerUpdate(container_id="a", linux={"resources": {"cpu": {"cpus": "1"}}})], "two")
    updates.add([limit("a", 6, ignore_failure=True)], "two")
    with pytest.raises(Conflict):
        updates.add([limit("a", 6)], "two")
    with pytest.raises(Conflict, match="being created"):
        updates.add([limit("new", 1)], "one")
    updates.evict([pb.ContainerEviction(container_id="b", reason="x")])
    wishes = updates.wishes()
    assert [(one.container_id, msgspec.json.decode(one.resources)) for one in wishes.updates] == [
        ("a", {"memory": {"limit": 5}, "cpu": {"cpus": "1"}})
    ]
    assert [(one.container_id, one.reason) for one in wishes.evictions] == [("b", "x")]


NUMBERS = st.integers(0, 2**62)
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "memory": st.fixed_dictionaries(
            {"limit": NUMBERS}, optional={"swap": NUMBERS, "swappiness": NUMBERS}
        ),
        "cpu": st.fixed_dictionaries(
            {"quota": NUMBERS}, optional={"cpus": st.just("0-3"), "shares": NUMBERS}
        ),
        "pids": st.fixed_dictionaries({"limit": NUMBERS}),
        "unified": st.dictionaries(st.sampled_from(["a.b", "c.d"]), st.just("1"), min_size=1),
        "hugepageLimits": st.lists(
            st.fixed_dictionaries({"pageSize": st.just("2MB"), "limit": NUMBERS}), min_size=1, max_size=1
        ),
        "devices": st.lists(
            st.fixed_dictionaries(
                {"allow": st.booleans()}, optional={"type": st.just("c"), "major": NUMBERS}
            ),
            min_size=1,
            max_size=2,
        ),
    },
)


@given(LIMITS, LIMITS)
def test_limits_go_there_and_back_and_the_later_ones_win(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert resources.to_oci(resources.to_interface(old)) == old
    merged = resources.merge(old, new)
    for part in ("memory", "cpu", "pids", "unified"):
        assert merged.get(part, {}) == {**old.get(part, {}), **new.get(part, {})}
    assert resources.merge(old, {}) == old
