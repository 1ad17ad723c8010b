"""What an update of a container's limits comes to."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError
from tests.support import spec_inputs as make
from workers.cri.spec import update

Resources = api_pb2.LinuxContainerResources
MIB = 1 << 20


def merged(old: dict[str, Any], asked: dict[str, Any]) -> api_pb2.LinuxContainerResources:
    return update.merged(Resources(**old), Resources(**asked))


@pytest.mark.parametrize(
    ("old", "asked", "new"),
    [
        ({"cpu_shares": 2}, {}, {"cpu_shares": 2}),
        ({"cpu_shares": 2}, {"cpu_quota": 5}, {"cpu_shares": 2, "cpu_quota": 5}),
        ({"cpu_quota": 5}, {"cpu_quota": -1}, {"cpu_quota": -1}),
        ({"cpuset_cpus": "0-3"}, {"cpuset_cpus": "1"}, {"cpuset_cpus": "1"}),
        ({"unified": {"a.b": "1", "c.d": "2"}}, {"unified": {"a.b": "3"}},
         {"unified": {"a.b": "3", "c.d": "2"}}),
        (
            {"memory_limit_in_bytes": MIB, "memory_swap_limit_in_bytes": MIB},
            {"memory_limit_in_bytes": 2 * MIB},
            {"memory_limit_in_bytes": 2 * MIB, "memory_swap_limit_in_bytes": 2 * MIB},
        ),
        (
            {"memory_limit_in_bytes": 2 * MIB, "memory_swap_limit_in_bytes": 3 * MIB},
            {"memory_limit_in_bytes": MIB},
            {"memory_limit_in_bytes": MIB, "memory_swap_limit_in_bytes": 3 * MIB},
        ),
    ],
)  # fmt: skip
def test_what_is_not_sent_stays(old: dict[str, Any], asked: dict[str, Any], new: dict[str, Any]) -> None:
    assert merged(old, asked) == Resources(**new)


def test_huge_pages_are_merged_by_their_size() -> None:
    def pages(**sizes: int) -> dict[str, Any]:
        found = [api_pb2.HugepageLimit(page_size=size, limit=limit) for size, limit in sizes.items()]
        return {"hugepage_limits": found}

    new = merged(pages(**{"2MB": 1, "1GB": 2}), pages(**{"1GB": 3}))
    assert new == Resources(**pages(**{"2MB": 1, "1GB": 3}))


def planned(old: dict[str, Any], asked: dict[str, Any], **host: Any) -> update.Update:
    spec = make.built(make.container(resources=Resources(**old))).spec
    new = merged(old, asked)
    return update.update(spec, new, Resources(**asked), make.host(**host))


def test_the_new_spec_differs_in_limits_and_score_alone() -> None:
    old: dict[str, Any] = {"cpu_shares": 2, "oom_score_adj": 5}
    before = msgspec.json.decode(make.built(make.container(resources=Resources(**old))).spec)
    done = planned(old, {"cpu_shares": 9, "memory_limit_in_bytes": 64 * MIB, "oom_score_adj": 7})
    after = msgspec.json.decode(done.spec)
    assert after["linux"]["resources"].pop("cpu") == {"shares": 9}
    assert after["linux"]["resources"].pop("memory") == {"limit": 64 * MIB}
    assert after["process"].pop("oomScoreAdj") == 7
    del before["linux"]["resources"]["cpu"], before["process"]["oomScoreAdj"]
    assert after == before
    assert msgspec.json.decode(done.resources) == {"cpu": {"shares": 9}, "memory": {"limit": 64 * MIB}}
    assert done.oom_score == 7


def test_no_quota_is_told_to_the_monitor_and_stands_in_no_spec() -> None:
    done = planned({"cpu_quota": 5, "cpu_shares": 3}, {"cpu_quota": -1})
    assert msgspec.json.decode(done.resources) == {"cpu": {"shares": 3, "quota": -1}}
    assert msgspec.json.decode(done.spec)["linux"]["resources"]["cpu"] == {"shares": 3}


def test_a_score_that_was_not_sent_is_left_alone() -> None:
    assert planned({"oom_score_adj": 5}, {"cpu_shares": 9}).oom_score is None


def test_a_score_is_as_low_as_the_node_lets_us_go() -> None:
    done = planned({}, {"oom_score_adj": -997}, oom_score_floor=100)
    assert done.oom_score == 100
    assert "CAP_SYS_RESOURCE" in done.degraded[0]


@pytest.mark.parametrize(
    ("asked", "host", "code"),
    [
        ({"cpu_shares": -1}, {}, Code.INVALID_ARGUMENT),
        ({"memory_limit_in_bytes": 100}, {}, Code.INVALID_ARGUMENT),
        ({"memory_swap_limit_in_bytes": MIB}, {}, Code.INVALID_ARGUMENT),
        ({"oom_score_adj": 2000}, {}, Code.INVALID_ARGUMENT),
        ({"unified": {"memory.high": "1"}}, {"cgroup_version": 1}, Code.FAILED_PRECONDITION),
    ],
)
def test_what_a_new_container_may_not_have_no_update_gives(
    asked: dict[str, Any], host: dict[str, Any], code: Code
) -> None:
    with pytest.raises(RemoteError) as caught:
        planned({}, asked, **host)
    assert caught.value.code is code
