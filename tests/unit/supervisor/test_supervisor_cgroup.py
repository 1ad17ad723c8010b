"""Groups: what is mounted, where a pod's parent lies, limits on v1 and v2 (in directories that pretend)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor import cgroup
from supervisor.cgroup import Groups, Hierarchies
from supervisor.table import Limits

HYBRID = """tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0
cgroup2 /nowhere/unified cgroup2 rw 0 0
"""


def test_a_hybrid_host_counts_as_version_one() -> None:
    found = cgroup.detect(HYBRID)
    assert found.version == 1
    assert found.controllers == ("cpu", "cpuacct", "memory", "pids")
    assert found.roots() == [f"/sys/fs/cgroup/{name}" for name in ("memory", "pids", "cpu,cpuacct")]


def test_a_unified_host_counts_as_version_two(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    found = cgroup.detect(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n")
    assert (found.version, found.roots()) == (2, [str(tmp_path)])


def test_a_host_without_any_cgroup_mount_is_told_of_and_no_error() -> None:
    groups = Groups(cgroup.detect("proc /proc proc rw 0 0\n"), "bulkhead")
    groups.prepare()
    groups.make(groups.worker("cri"), Limits(1, 1))
    assert groups.degraded


@pytest.mark.parametrize(
    ("version", "mounts", "name", "text"),
    [
        (1, "memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
        (2, "", "memory.events", "low 0\noom 4\noom_kill 3\noom_group_kill 0\n"),
    ],
)
def test_kills_for_want_of_memory_are_counted(
    tmp_path: Path, version: int, mounts: str, name: str, text: str
) -> None:
    groups = Groups(Hierarchies(version, {mounts: str(tmp_path)}, ()), "bulkhead")
    assert groups.oom_kills("/bulkhead/cri") == 0, "there is no such group"
    (tmp_path / "bulkhead/cri").mkdir(parents=True)
    (tmp_path / "bulkhead/cri" / name).write_text(text)
    assert groups.oom_kills("/bulkhead/cri") == 3


@pytest.mark.parametrize(
    ("parent", "path"),
    [
        ("/kubepods/burstable/pod1", "/kubepods/burstable/pod1"),
        ("a-b-pod1.slice", "/a.slice/a-b.slice/a-b-pod1.slice"),
        ("/kubepods.slice/kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice"),
        ("system.slice", "/system.slice"),
        ("x/", "/x"),
    ],
)
def test_a_cgroup_parent_is_a_path_or_a_slice(parent: str, path: str) -> None:
    assert cgroup.parent_path(parent) == path


def test_a_cgroup_parent_may_not_lead_elsewhere() -> None:
    with pytest.raises(ValueError, match="leads elsewhere"):
        cgroup.parent_path("/a/../b")


def test_instances_have_names_of_their_own() -> None:
    assert cgroup.instance_name("/run/bulkhead") == "bulkhead"
    assert cgroup.instance_name("/tmp/a") != cgroup.instance_name("/tmp/b")


def test_limits_of_version_one_stand_in_each_hierarchy(tmp_path: Path) -> None:
    mounts = {name: str(tmp_path / name) for name in ("memory", "pids", "cpu")}
    groups = Groups(Hierarchies(1, mounts, ("cpu", "memory", "pids")), "bulkhead")
    groups.make(groups.worker("image"), Limits(memory=1 << 20, pids=7, cpu_weight=50))
    written = {
        str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert written == {
        "memory/bulkhead/image/memory.limit_in_bytes": str(1 << 20),
        "pids/bulkhead/image/pids.max": "7",
        "cpu/bulkhead/image/cpu.shares": "512",
    }
    assert groups.degraded == []


def test_limits_of_version_two_and_its_controllers(tmp_path: Path) -> None:
    groups = Groups(Hierarchies(2, {"": str(tmp_path)}, ("memory", "pids")), "bulkhead")
    groups.prepare()
    groups.make(groups.worker("image"), Limits(memory=1 << 20, pids=7))
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids"
    assert (tmp_path / "bulkhead/cgroup.subtree_control").read_text() == "+memory +pids"
    assert (tmp_path / "bulkhead/image/memory.max").read_text() == str(1 << 20)
    assert groups.degraded == ["cgroup controller cpu is missing: its limits are not set"]


def test_a_delegated_base_is_our_own_group_or_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = tmp_path / "system.slice/bulkhead.service"
    (unit / "supervisor").mkdir(parents=True)
    hierarchies = Hierarchies(2, {"": str(tmp_path)}, ("memory",))
    monkeypatch.setattr(cgroup, "_is_delegated", lambda directory: directory == str(unit))
    for own in ("/system.slice/bulkhead.service", "/system.slice/bulkhead.service/supervisor"):
        monkeypatch.setattr(cgroup, "own_group", lambda own=own: own)
        assert cgroup.delegated_base(hierarchies) == "/system.slice/bulkhead.service"
    monkeypatch.setattr(cgroup, "own_group", lambda: "/user.slice")
    assert cgroup.delegated_base(hierarchies) == ""


def test_the_own_group_is_read_from_the_unified_line() -> None:
    assert cgroup.own_group("3:cpu:/a\n0::/b/c\n") == "/b/c"


def test_removing_takes_groups_below_along_and_absent_ones_are_gone(tmp_path: Path) -> None:
    groups = Groups(Hierarchies(2, {"": str(tmp_path)}, ()), "bulkhead")
    os.makedirs(tmp_path / "bulkhead/x/y")
    assert groups.remove("/bulkhead")
    assert groups.remove("/bulkhead")
    assert not (tmp_path / "bulkhead").exists()
