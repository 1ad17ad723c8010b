"""cri's side of node resource plugins, without any: the gate, limits, facts."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ipc.cri import api_pb2 as pb
from workers.cri.nri import facts, limits
from workers.cri.nri.gate import Gate
from workers.cri.spec import cgroups
from workers.cri.state import Container, ContainerRecord, Phase, Pod, PodRecord


def test_events_pass_together_and_a_synchronization_alone_before_those_that_come_after_it() -> None:
    async def run() -> list[str]:
        gate, order = Gate(), list[str]()
        first_may_end = asyncio.Event()

        async def event(name: str, wait: asyncio.Event | None = None) -> None:
            async with gate.shared():
                order.append(f"+{name}")
                if wait is not None:
                    await wait.wait()
                order.append(f"-{name}")

        async def synchronize() -> None:
            async with gate.exclusive():
                order.append("+sync")
                await asyncio.sleep(0)
                order.append("-sync")

        tasks = [asyncio.create_task(event("a", first_may_end)), asyncio.create_task(event("b"))]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(synchronize()), asyncio.create_task(event("late"))]
        await asyncio.sleep(0.01)
        first_may_end.set()
        await asyncio.gather(*tasks)
        return order

    order = asyncio.run(run())
    assert order == ["+a", "+b", "-b", "-a", "+sync", "-sync", "+late", "-late"]


def test_an_event_that_is_cancelled_leaves_the_gate() -> None:
    async def run() -> None:
        gate = Gate()

        async def stay() -> None:
            async with gate.shared():
                await asyncio.Event().wait()

        task = asyncio.create_task(stay())
        await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(1), gate.exclusive():
            pass

    asyncio.run(run())


VALUES = st.integers(1, 2**40)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "cpu_shares": VALUES,
            "cpu_quota": VALUES,
            "memory_limit_in_bytes": VALUES,
            "cpuset_cpus": st.just("0-1"),
            "unified": st.dictionaries(st.sampled_from(["a.b", "c.d"]), st.just("max")),
        },
    )
)
def test_cris_limits_go_there_and_back(fields: dict[str, Any]) -> None:
    asked = pb.LinuxContainerResources(**fields)
    assert limits.to_cri(limits.to_oci(asked)) == asked
    assert limits.beyond(limits.to_oci(asked)) == {}
    assert limits.changes(limits.to_oci(asked), limits.to_oci(asked)) == {}


def test_what_plugins_change_is_put_over_what_was_asked_and_the_rest_goes_beyond() -> None:
    asked = pb.LinuxContainerResources(cpu_quota=-1, memory_limit_in_bytes=5)
    asked.hugepage_limits.add(page_size="2MB", limit=1)
    before = limits.to_oci(asked)
    after = {
        "cpu": {"quota": -1, "shares": 7},
        "memory": {"limit": 6, "reservation": 3},
        "pids": {"limit": 9},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 2}],
    }
    changed = limits.changes(before, after)
    assert changed == {
        "cpu": {"shares": 7},
        "memory": {"limit": 6, "reservation": 3},
        "pids": {"limit": 9},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 2}],
    }
    limits.override(asked, limits.to_cri(changed))
    assert (asked.cpu_quota, asked.cpu_shares, asked.memory_limit_in_bytes) == (-1, 7, 6)
    assert [one.limit for one in asked.hugepage_limits] == [2]
    assert limits.beyond(changed) == {"memory": {"reservation": 3}, "pids": {"limit": 9}}


def test_plugins_are_told_of_pods_and_containers_in_the_words_of_the_runtime_spec() -> None:
    config = pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="n", namespace="ns", uid="u"))
    config.linux.overhead.cpu_shares = 3
    record = PodRecord(id="p", created_at_ns=1, handler="crun", namespaces={"net": "/n", "ipc": "/i"})
    pod = facts.of_pod(Pod(record, config))
    assert pod.namespaces == {"network": "/n", "ipc": "/i"}
    assert msgspec.json.decode(pod.overhead) == {"cpu": {"shares": 3}}
    assert pod.resources == b""
    made = pb.ContainerConfig(metadata=pb.ContainerMetadata(name="main"))
    made.linux.security_context.seccomp.profile_type = pb.SecurityProfile.Localhost
    made.linux.security_context.seccomp.localhost_ref = "/x.json"
    container = Container(ContainerRecord(id="c", pod_id="p", created_at_ns=2, pid=7), made)
    assert facts.of_container(container, b"{}").pid == 0, "it has no process yet"
    container.record.phase = Phase.RUNNING
    told = facts.of_container(container, b"{}")
    assert (told.state, told.pid, told.seccomp_profile) == ("running", 7, "localhost//x.json")


def test_a_cgroups_path_that_a_plugin_sets_is_found_below_the_hierarchies() -> None:
    assert cgroups.relative("cgroupfs", "/a/b") == "/a/b"
    assert cgroups.relative("systemd", "a-b.slice:x:id") == "/a.slice/a-b.slice/x-id.scope"
