"""Runs in: the tests. Metrics out of a snapshot, and facts out of /proc."""

from __future__ import annotations

import os

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ipc.messages.cri import RPC_BUCKETS, ContainerCount, CriInfo, PullState, RpcCount
from ipc.messages.supervisor import InFlight, SandboxReport, WorkerState
from workers.ops import metrics, processes
from workers.ops.snapshot import Snapshot

WORKERS = [
    WorkerState(kind="cri", name="cri", state="ready", pid=10, restarts=2, last_ping_ms=1500, queued=4,
                requests=[InFlight(type="a.b.c", age_ms=2500)],
                sandbox=SandboxReport(uid=1, gid=1, degraded=["landlock: not in this kernel"])),
    WorkerState(kind="image", name="image", state="idle"),
    WorkerState(kind="stream", name="stream", state="ready", pid=13, restarts=3, lagged=4),
    WorkerState(kind="stream", name="stream", state="draining", pid=14),
    WorkerState(kind="monitor", name="monitor a", state="ready", pid=11),
    WorkerState(kind="monitor", name="monitor b", state="ready", pid=12),
]  # fmt: skip
PROCESSES = {
    10: processes.Process(resident=100, shared=40, virtual=1000, cpu=1.5, threads=3, descriptors=9),
    11: processes.Process(resident=10, shared=5, virtual=50, cpu=0.25, threads=1),
    12: processes.Process(resident=10, shared=5, virtual=50, cpu=0.25, threads=1),
}
CRI = CriInfo(
    pods={"ready": 3},
    containers={"running": 5, "exited": 1},
    pulls=[PullState(reference="x", started_at_ns=1, bytes_total=10, bytes_done=4, layers=2, layers_done=1)],
    rpcs=[RpcCount(name="RunPodSandbox", total=7, errors=1, seconds=2.5, buckets=[*range(7), *[7] * 8])],
    pulls_succeeded=4,
    pulls_failed=1,
    pull_failures={"NOT_FOUND": 1},
    pull_seconds=2.5,
    pulled_bytes=99,
    layers={"fetched": 3, "present": 1},
    operations=2,
    counts=[
        ContainerCount(
            namespace="n", pod="p", container="c", oom_kills=2, log_bytes_dropped=7, log_bytes_unsure=5
        )
    ],
    oom_kills=3,
    log_bytes_dropped=8,
    log_bytes_unsure=6,
    events_sent=6,
    events_dropped=5,
    event_clients=1,
)


def samples(snapshot: Snapshot) -> dict[str, float]:
    """Samples as `name{label=value,...}`."""
    text = metrics.render(snapshot, "1.2.3").decode()
    return {
        f"{sample.name}{{{','.join(f'{k}={v}' for k, v in sorted(sample.labels.items()))}}}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bulkhead_build_info{version=1.2.3}", 1),
        ("bulkhead_source_up{source=cri}", 1),
        ("bulkhead_workers{kind=monitor,state=ready}", 2),
        ("bulkhead_worker_up{kind=cri}", 1),
        ("bulkhead_worker_up{kind=image}", 0),
        ("bulkhead_worker_restarts_total{kind=cri}", 2),
        ("bulkhead_worker_restarts_total{kind=stream}", 3),
        ("bulkhead_attach_laggards_total{}", 4),
        ("bulkhead_worker_requests_in_flight{kind=cri}", 1),
        ("bulkhead_worker_oldest_request_seconds{kind=cri}", 2.5),
        ("bulkhead_worker_ping_age_seconds{kind=cri}", 1.5),
        ("bulkhead_worker_sandbox_degraded{kind=cri}", 1),
        ("bulkhead_processes{kind=monitor}", 2),
        ("bulkhead_process_resident_memory_bytes{kind=monitor}", 20),
        ("bulkhead_process_private_memory_bytes{kind=cri}", 60),
        ("bulkhead_process_cpu_seconds{kind=cri}", 1.5),
        ("bulkhead_process_threads{kind=monitor}", 2),
        ("bulkhead_pods{state=ready}", 3),
        ("bulkhead_containers{state=exited}", 1),
        ("bulkhead_image_pulls_total{result=failed}", 1),
        ("bulkhead_image_pulls_in_progress{}", 1),
        ("bulkhead_image_pulls_in_progress_bytes{}", 4),
        ("bulkhead_image_pull_failures_total{code=NOT_FOUND}", 1),
        ("bulkhead_image_pull_seconds_total{}", 2.5),
        ("bulkhead_image_pull_bytes_total{}", 99),
        ("bulkhead_image_layers_total{result=present}", 1),
        ("bulkhead_operations_in_progress{}", 2),
        ("bulkhead_container_events_total{}", 6),
        ("bulkhead_container_events_dropped_total{}", 5),
        ("bulkhead_container_event_clients{}", 1),
        ("bulkhead_oom_kills_total{}", 3),
        ("bulkhead_log_dropped_bytes_total{}", 8),
        ("bulkhead_log_unsure_bytes_total{}", 6),
        ("bulkhead_container_oom_kills{container=c,namespace=n,pod=p}", 2),
        ("bulkhead_container_log_dropped_bytes{container=c,namespace=n,pod=p}", 7),
        ("bulkhead_container_log_unsure_bytes{container=c,namespace=n,pod=p}", 5),
        ("bulkhead_worker_queue_depth{kind=cri}", 4),
        ("bulkhead_process_open_descriptors{kind=cri}", 9),
        ("bulkhead_rpc_errors_total{rpc=RunPodSandbox}", 1),
        ("bulkhead_rpc_duration_seconds_count{rpc=RunPodSandbox}", 7),
        ("bulkhead_rpc_duration_seconds_sum{rpc=RunPodSandbox}", 2.5),
        ("bulkhead_rpc_duration_seconds_bucket{le=0.0025,rpc=RunPodSandbox}", 1),
        ("bulkhead_rpc_duration_seconds_bucket{le=+Inf,rpc=RunPodSandbox}", 7),
    ],
)
def test_each_fact_is_a_sample(name: str, value: float) -> None:
    assert samples(Snapshot(workers=WORKERS, processes=PROCESSES, cri=CRI))[name] == value


def test_a_kind_without_a_ping_has_no_age_of_one() -> None:
    assert "bulkhead_worker_ping_age_seconds{kind=image}" not in samples(Snapshot(workers=WORKERS))


def test_who_does_not_answer_is_named_and_his_part_left_out() -> None:
    found = samples(Snapshot(trouble={"cri": "gone"}, workers=WORKERS))
    assert found["bulkhead_source_up{source=cri}"] == 0
    assert found["bulkhead_source_up{source=supervisor}"] == 1
    assert not any("pods" in name for name in found)


def test_an_rpc_without_buckets_counts_all_the_same() -> None:
    info = CriInfo(
        pods={}, containers={}, pulls=[], rpcs=[RpcCount(name="Version", total=2, errors=0, seconds=1)]
    )
    found = samples(Snapshot(cri=info))
    assert found["bulkhead_rpc_duration_seconds_count{rpc=Version}"] == 2
    assert sum("_bucket" in name for name in found) == len(RPC_BUCKETS) + 1


def test_a_process_with_a_strange_name_is_read_right() -> None:
    stat = "7 (a) b) R 1 7 7 0 -1 4194304 1 0 0 0 250 50 0 0 20 0 4 0 100 4096 1 18446744073709551615\n"
    process = processes.parse(stat, "10 5 2 1 0 3 0\n")
    page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    assert process == processes.Process(
        resident=5 * page, shared=2 * page, virtual=10 * page, cpu=300 / tick, threads=4
    )


def test_this_process_is_read_and_one_that_is_gone_is_none() -> None:
    me = processes.read(os.getpid())
    assert me is not None
    assert me.resident > me.shared > 0
    assert me.cpu > 0
    assert me.descriptors is None or me.descriptors == pytest.approx(len(os.listdir("/proc/self/fd")), abs=3)
    assert processes.read(2**22 + 1) is None
