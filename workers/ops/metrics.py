"""Runs in: ops. Sans-IO.

A snapshot as Prometheus metrics. Processes are summed by kind, so that a node with hundreds of monitors
has as many series as one with none; /workers has each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from operator import attrgetter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ipc.messages.cri import RPC_BUCKETS, ContainerCount, CriInfo, RpcCount
from ipc.messages.supervisor import WorkerState
from workers.ops.processes import Process
from workers.ops.snapshot import Snapshot

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
SOURCES = ("supervisor", "cri")

Workers = list[WorkerState]
#: label values and a value, for each sample of a metric
Samples = Iterable[tuple[tuple[str, ...], float]]
_OfWorkers = Callable[[Workers], float | None]
_OfProcesses = Callable[[list[Process]], float | None]
_OfCri = Callable[[CriInfo], float]

#: name, help, value of the workers of one kind (None: nothing to tell)
WORKER_GAUGES: tuple[tuple[str, str, _OfWorkers], ...] = (
    ("worker_up", "Whether a process of this kind is ready.", lambda of: any(w.state == "ready" for w in of)),
    (
        "worker_requests_in_flight",
        "Requests being served.",
        lambda of: sum(len(worker.requests) for worker in of),
    ),
    (
        "worker_queue_depth",
        "Requests that wait for others to end.",
        lambda of: sum(worker.queued for worker in of),
    ),
    (
        "worker_oldest_request_seconds",
        "Age of the oldest request being served.",
        lambda of: max((r.age_ms / 1000 for worker in of for r in worker.requests), default=0.0),
    ),
    (
        "worker_ping_age_seconds",
        "Time since the last answered health ping, of the process that is furthest behind.",
        lambda of: max((w.last_ping_ms / 1000 for w in of if w.last_ping_ms >= 0), default=None),
    ),
    (
        "worker_sandbox_degraded",
        "Parts of the declared sandbox that this host lacks.",
        lambda of: max((len(worker.sandbox.degraded) for worker in of if worker.sandbox), default=0),
    ),
)

#: name, help, value of the live processes of one kind
PROCESS_GAUGES: tuple[tuple[str, str, _OfProcesses], ...] = (
    ("processes", "Live processes.", len),
    ("process_resident_memory_bytes", "Resident memory.", lambda of: sum(p.resident for p in of)),
    (
        "process_private_memory_bytes",
        "Resident memory that no file and no shared mapping backs.",
        lambda of: sum(p.resident - p.shared for p in of),
    ),
    ("process_virtual_memory_bytes", "Virtual memory.", lambda of: sum(p.virtual for p in of)),
    # a gauge: the processes that are counted come and go
    ("process_cpu_seconds", "CPU time of the processes that live now.", lambda of: sum(p.cpu for p in of)),
    ("process_threads", "Threads.", lambda of: sum(p.threads for p in of)),
    ("process_open_descriptors", "Open descriptors.", lambda of: _known(p.descriptors for p in of)),
)

#: name, help, value
CRI_GAUGES: tuple[tuple[str, str, _OfCri], ...] = (
    ("operations_in_progress", "Operations that change pods, containers or images.", lambda i: i.operations),
    ("image_pulls_in_progress", "Image pulls under way.", lambda i: len(i.pulls)),
    (
        "image_pulls_in_progress_bytes",
        "Bytes that pulls under way have fetched.",
        lambda i: sum(pull.bytes_done for pull in i.pulls),
    ),
    ("container_event_clients", "Clients that listen to container events.", lambda i: i.event_clients),
)
CRI_COUNTERS: tuple[tuple[str, str, _OfCri], ...] = (
    ("image_pull_seconds", "Time that image pulls took.", lambda i: i.pull_seconds),
    ("image_pull_bytes", "Bytes of layers that came over the network.", lambda i: i.pulled_bytes),
    ("container_events", "Container events sent.", lambda i: i.events_sent),
    (
        "container_events_dropped",
        "Container events that clients lost for being too slow.",
        lambda i: i.events_dropped,
    ),
    ("oom_kills", "Processes of containers that were killed for memory.", lambda i: i.oom_kills),
    (
        "log_dropped_bytes",
        "Bytes of containers' logs that could not be written.",
        lambda i: i.log_bytes_dropped,
    ),
    (
        "log_unsure_bytes",
        "Bytes of containers' logs that may be missing since a monitor died, at most.",
        lambda i: i.log_bytes_unsure,
    ),
)


def render(snapshot: Snapshot, version: str) -> bytes:
    """The text exposition of a snapshot."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot, version))
    return generate_latest(registry)


class _Collector:
    """What prometheus-client wants a source of metrics to be."""

    def __init__(self, snapshot: Snapshot, version: str) -> None:
        self._snapshot = snapshot
        self._version = version

    def collect(self) -> Iterable[Metric]:
        yield _gauge("build_info", "This release.", ["version"], [((self._version,), 1)])
        up = [((name,), name not in self._snapshot.trouble) for name in SOURCES]
        yield _gauge("source_up", "Whether this process answered for this scrape.", ["source"], up)
        if self._snapshot.workers:
            yield from _of_workers(self._snapshot)
        if self._snapshot.cri is not None:
            yield from _of_cri(self._snapshot.cri)


def _of_workers(snapshot: Snapshot) -> Iterator[Metric]:
    ordered = sorted(snapshot.workers, key=attrgetter("kind"))
    states = Counter((worker.kind, worker.state) for worker in ordered)
    yield _gauge("workers", "Processes of the map by state.", ["kind", "state"], sorted(states.items()))
    kinds = {kind: list(of) for kind, of in groupby(ordered, key=attrgetter("kind"))}
    # both are a kind's, and every process of it has them
    restarts = [((kind,), max(worker.restarts for worker in of)) for kind, of in kinds.items()]
    yield _counter("worker_restarts", "Restarts after a death.", ["kind"], restarts)
    lagged = max((worker.lagged for worker in kinds.get("stream", [])), default=0)
    yield _counter("attach_laggards", "Clients that did not keep up with output.", [], [((), lagged)])
    for name, text, of_workers in WORKER_GAUGES:
        values = [((kind,), of_workers(of)) for kind, of in kinds.items()]
        known = [(labels, value) for labels, value in values if value is not None]
        yield _gauge(name, text, ["kind"], known)
    live = {kind: _live(of, snapshot.processes) for kind, of in kinds.items()}
    for name, text, of_processes in PROCESS_GAUGES:
        sums = [((kind,), of_processes(of)) for kind, of in live.items()]
        yield _gauge(name, text, ["kind"], [(labels, value) for labels, value in sums if value is not None])


def _live(workers: Workers, processes: Mapping[int, Process]) -> list[Process]:
    return [processes[worker.pid] for worker in workers if worker.pid in processes]


def _of_cri(info: CriInfo) -> Iterator[Metric]:
    yield _gauge("pods", "Pod sandboxes by state.", ["state"], _by_label(info.pods))
    yield _gauge("containers", "Containers by state.", ["state"], _by_label(info.containers))
    ended = {"succeeded": info.pulls_succeeded, "failed": info.pulls_failed}
    yield _counter("image_pulls", "Image pulls ended.", ["result"], _by_label(ended))
    yield _counter("image_pull_failures", "Image pulls that failed.", ["code"], _by_label(info.pull_failures))
    yield _counter("image_layers", "Layers of pulled images.", ["result"], _by_label(info.layers))
    for name, text, value in CRI_GAUGES:
        yield _gauge(name, text, [], [((), value(info))])
    for name, text, value in CRI_COUNTERS:
        yield _counter(name, text, [], [((), value(info))])
    yield from _of_containers(info.counts)
    rpcs = sorted(info.rpcs, key=attrgetter("name"))
    errors = [((rpc.name,), rpc.errors) for rpc in rpcs]
    yield _counter("rpc_errors", "RPCs that ended with an error.", ["rpc"], errors)
    yield _durations(rpcs)


def _of_containers(counts: list[ContainerCount]) -> Iterator[Metric]:
    """Only of containers of which there is something to tell; gauges, since containers go."""
    labels = ["namespace", "pod", "container"]
    named = [((one.namespace, one.pod, one.container), one) for one in counts]
    ooms = [(name, one.oom_kills) for name, one in named]
    yield _gauge("container_oom_kills", "Processes that were killed for memory.", labels, ooms)
    lost = [(name, one.log_bytes_dropped) for name, one in named]
    yield _gauge("container_log_dropped_bytes", "Bytes of the log that were not written.", labels, lost)
    unsure = [(name, one.log_bytes_unsure) for name, one in named]
    yield _gauge("container_log_unsure_bytes", "Bytes of the log that may be missing.", labels, unsure)


def _known(values: Iterable[int | None]) -> float | None:
    """The sum of what is known, None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _by_label(counts: Mapping[str, int]) -> Samples:
    return [((label,), count) for label, count in sorted(counts.items())]


def _durations(rpcs: Iterable[RpcCount]) -> Metric:
    """The histogram, whose count is the number of RPCs ended."""
    family = HistogramMetricFamily("bulkhead_rpc_duration_seconds", "Time that RPCs took.", labels=["rpc"])
    for rpc in rpcs:
        counts = [float(count) for count in rpc.buckets] or [0.0] * len(RPC_BUCKETS)
        buckets = [*zip(map(str, RPC_BUCKETS), counts, strict=True), ("+Inf", float(rpc.total))]
        family.add_metric([rpc.name], buckets, rpc.seconds)
    return family


def _gauge(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    family = GaugeMetricFamily(f"bulkhead_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: list[str], samples: Samples) -> Metric:
    family = CounterMetricFamily(f"bulkhead_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
