"""Runs in: bulkheadctl.

The node's processes: version, workers, restart.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import msgspec
import psutil

from ipc.cri import api_pb2 as cri
from ipc.messages.supervisor import JobState, WorkerList, WorkerRestart, WorkerState
from supervisor.cli.ctl.arguments import Commands, command, with_output
from supervisor.cli.ctl.connection import Connection
from supervisor.cli.ctl.output import CLEAR, duration, print_data, print_table, short, size

#: Requests that have no end to be waited for.
ENDLESS = frozenset({"GetContainerEvents"})


def register(commands: Commands) -> None:
    """Add this module's commands."""
    versions = command(commands, "version", version, "Show versions of the runtime and its API")
    with_output(versions, ids=False)
    workers = command(commands, "workers", show_workers, "Show every process of the map")
    with_output(workers, ids=False)
    workers.add_argument("--json", dest="output", action="store_const", const="json", help="as -o json")
    workers.add_argument("--sandbox", action="store_true", help="what holds in each worker")
    workers.add_argument("-w", "--watch", type=float, metavar="SECONDS", help="again and again, so often")
    restart = command(commands, "restart", restart_worker, "End one kind's workers in order, start them anew")
    restart.add_argument("kind", help="such as image; `bulkheadctl workers` names them all")


def version(connection: Connection, options: argparse.Namespace) -> int:
    answer = connection.call(connection.runtime.Version, cri.VersionRequest())
    if options.output != "table":
        print_data(answer, options.output)
        return 0
    print(f"Version:            {answer.version}")
    print(f"RuntimeName:        {answer.runtime_name}")
    print(f"RuntimeVersion:     {answer.runtime_version}")
    print(f"RuntimeApiVersion:  {answer.runtime_api_version}")
    return 0


def restart_worker(connection: Connection, options: argparse.Namespace) -> int:
    connection.ask(WorkerRestart(kind=options.kind))
    print(f"{options.kind}: restarted")
    return 0


# -- workers ----------------------------------------------------------------------------------------------


@dataclass
class Usage:
    """What /proc says of one process; -1 where it says nothing (it ended, or is not ours to read)."""

    rss: int = -1
    pss: int = -1
    cpu_seconds: float = -1.0
    descriptors: int = -1
    threads: int = -1
    capabilities: list[str] = field(default_factory=list)


def usage(pid: int) -> Usage:
    """Read the use of one process."""
    found = Usage()
    with contextlib.suppress(psutil.Error, FileNotFoundError):
        process = psutil.Process(pid)
        with process.oneshot():
            full = process.memory_full_info()
            found.rss, found.pss = full.rss, full.pss
            times = process.cpu_times()
            found.cpu_seconds = times.user + times.system
            found.threads = process.num_threads()
            found.descriptors = process.num_fds()
    return found


def show_workers(connection: Connection, options: argparse.Namespace) -> int:
    _show_workers(connection, options)
    while options.watch is not None:
        time.sleep(max(0.1, options.watch))
        print(CLEAR if sys.stdout.isatty() else "", end="\n")
        _show_workers(connection, options)
        sys.stdout.flush()
    return 0


def _show_workers(connection: Connection, options: argparse.Namespace) -> None:
    workers = connection.ask(WorkerList()).workers
    uses = {worker.pid: usage(worker.pid) for worker in workers if worker.pid}
    if options.output != "table":
        print_data([_as_json(worker, uses) for worker in workers], options.output)
    elif options.sandbox:
        _sandbox_table(workers)
    else:
        _table(workers, uses)


def _as_json(worker: WorkerState, uses: Mapping[int, Usage]) -> dict[str, object]:
    data: dict[str, object] = msgspec.to_builtins(worker)
    if worker.pid in uses:
        data["usage"] = asdict(uses[worker.pid])
    return data


def _table(workers: list[WorkerState], uses: Mapping[int, Usage]) -> None:
    headers: tuple[str, ...]
    headers = ("NAME", "PID", "STATE", "UPTIME", "RESTARTS", "UID", "CAPS", "PSS", "RSS", "CPU", "FDS",
               "REQUESTS", "LAST DEATH")  # fmt: skip
    rows = [_row(worker, uses.get(worker.pid, Usage())) for worker in workers]
    if len(releases(workers)) > 1:  # after an upgrade in place, as long as something of before runs
        headers = (*headers, "RELEASE")
        rows = [(*row, worker.release or "-") for row, worker in zip(rows, workers, strict=True)]
    print_table(headers, rows)


def releases(workers: list[WorkerState]) -> set[str]:
    """Every build that processes run which tell theirs."""
    return {worker.release for worker in workers if worker.release}


def _row(worker: WorkerState, use: Usage) -> tuple[str, ...]:
    up = duration(time.time() - worker.started_at_ns / 1e9) if worker.started_at_ns else "-"
    caps = "-" if worker.sandbox is None else str(len(worker.sandbox.capabilities))
    return (
        name_of(worker),
        str(worker.pid or "-"),
        worker.state,
        up if worker.pid else "-",
        str(worker.restarts),
        str(worker.uid),
        caps,
        *(("-", "-") if use.rss < 0 else (size(use.pss), size(use.rss))),
        "-" if use.cpu_seconds < 0 else f"{use.cpu_seconds:.2f}s",
        "-" if use.descriptors < 0 else str(use.descriptors),
        _requests(worker),
        worker.last_death or "-",
    )


def name_of(worker: WorkerState) -> str:
    """A monitor's or an init's name with the id as short as in other tables."""
    kind, _, identity = worker.name.partition(" ")
    return f"{kind} {short(identity)}" if identity else kind


def hanging(worker: WorkerState, seconds: float) -> list[str]:
    """What a worker and its children have been at for longer than that, a sentence each."""
    told = [f"{worker.kind}: {_job(job)}" for job in worker.jobs if job.age_ms >= seconds * 1000]
    if worker.state == "ready" and worker.last_ping_ms >= seconds * 1000:
        told.append(f"{worker.kind}: answers no pings for {worker.last_ping_ms / 1000:.0f} s")
    if told:
        return told
    slow = [one for one in worker.requests if one.age_ms >= seconds * 1000 and one.type not in ENDLESS]
    return [f"{worker.kind}: {one.doing or one.type} for {one.age_ms / 1000:.0f} s" for one in slow]


def _job(job: JobState) -> str:
    at = f"{job.name}: {job.doing}" if job.doing not in ("", job.name) else job.name
    return f"{at} for {job.age_ms / 1000:.0f} s{', killed, hangs in the kernel' if job.killed else ''}"


def _requests(worker: WorkerState) -> str:
    if not worker.requests:
        return _job(worker.jobs[0]) if worker.jobs else worker.doing or "-"
    oldest = max(worker.requests, key=lambda request: request.age_ms)
    what = f"{oldest.type} {oldest.age_ms / 1000:.1f}s"
    return f"{len(worker.requests)} ({what}{': ' + oldest.doing if oldest.doing else ''})"


def _sandbox_table(workers: list[WorkerState]) -> None:
    """What holds in each worker, as it has reported it, in the words of docs/sandbox.md."""
    from supervisor.sandbox.page import facts  # this command's alone
    from supervisor.table import TABLE

    rows = []
    for worker in workers:
        if worker.sandbox is not None:
            rows += [(worker.name, *fact) for fact in facts(TABLE[worker.kind], worker.sandbox).items()]
            rows.append((worker.name, "degraded", "; ".join(worker.sandbox.degraded) or "nothing"))
    print_table(("NAME", "WHAT", "HOLDS"), rows)
