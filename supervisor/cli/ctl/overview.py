"""Runs in: bulkheadctl.

The node at a glance: `status` on one screen, `top` live, per pod and per process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ipc.cri import api_pb2 as cri
from ipc.messages.supervisor import WorkerList, WorkerState
from supervisor.cli.ctl.arguments import Commands, command, with_output
from supervisor.cli.ctl.connection import Connection
from supervisor.cli.ctl.node import hanging, name_of, usage
from supervisor.cli.ctl.output import CLEAR, as_data, coloured, duration, print_data, print_table, short, size

SICK = {"failed", "backoff"}
#: Seconds at one thing after which the screen names it.
HANGS = 5.0


def register(commands: Commands) -> None:
    """Add this module's commands."""
    status = command(commands, "status", show_status, "Show the node on one screen", "info")
    with_output(status, ids=False)
    top = command(commands, "top", show_top, "Show what pods and processes use, live")
    top.add_argument("-d", "--delay", type=float, default=2.0, help="seconds between looks (default: 2)")
    top.add_argument("-n", "--rounds", type=int, default=0, help="so many tables, then end (default: no end)")


# -- status -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Screen:
    """What was asked for a status."""

    version: cri.VersionResponse
    status: cri.StatusResponse
    workers: list[WorkerState]
    pods: Mapping[str, int]
    containers: Mapping[str, int]
    images: int
    image_bytes: int
    free_bytes: int


def show_status(connection: Connection, options: argparse.Namespace) -> int:
    screen = _ask(connection)
    if options.output == "table":
        for line in _lines(screen):
            print(line)
        print()
        _conditions(screen)
    else:
        print_data(_as_data(screen), options.output)
    return 0 if healthy(screen) else 1


def _ask(connection: Connection) -> Screen:
    runtime, images = connection.runtime, connection.images
    pods = connection.call(runtime.ListPodSandbox, cri.ListPodSandboxRequest()).items
    containers = connection.call(runtime.ListContainers, cri.ListContainersRequest()).containers
    listed = connection.call(images.ListImages, cri.ListImagesRequest()).images
    use = connection.call(images.ImageFsInfo, cri.ImageFsInfoRequest()).image_filesystems
    return Screen(
        version=connection.call(runtime.Version, cri.VersionRequest()),
        status=connection.call(runtime.Status, cri.StatusRequest(verbose=True)),
        workers=connection.ask(WorkerList()).workers,
        pods=Counter(_word(cri.PodSandboxState.Name(pod.state)) for pod in pods),
        containers=Counter(_word(cri.ContainerState.Name(one.state)) for one in containers),
        images=len(listed),
        image_bytes=sum(one.used_bytes.value for one in use),
        free_bytes=_free(use[0].fs_id.mountpoint) if use else -1,
    )


def _word(name: str) -> str:
    return name.partition("_")[2].lower()


def _free(path: str) -> int:
    with contextlib.suppress(OSError):
        facts = os.statvfs(path)
        return facts.f_bavail * facts.f_frsize
    return -1


def healthy(screen: Screen) -> bool:
    """True if pods can be run and no worker is in trouble; a network that is still to come is no trouble."""
    ready = {condition.type: condition.status for condition in screen.status.status.conditions}
    return ready.get("RuntimeReady", False) and not any(worker.state in SICK for worker in screen.workers)


def _lines(screen: Screen) -> Iterator[str]:
    sick = [f"{worker.kind} ({worker.state})" for worker in screen.workers if worker.state in SICK]
    well = healthy(screen)
    word = coloured("healthy", "32") if well else coloured("in trouble", "31")
    yield f"Bulkhead {screen.version.runtime_version}  {word}{': ' + ', '.join(sick) if sick else ''}"
    yield f"  since       {_since(screen.workers)}"
    yield f"  pods        {_counts(screen.pods)}"
    yield f"  containers  {_counts(screen.containers)}"
    free = f", {size(screen.free_bytes)} free" if screen.free_bytes >= 0 else ""
    yield f"  images      {screen.images}, {size(screen.image_bytes)}{free}"
    yield f"  workers     {_workers(screen.workers)}"
    yield from _releases(screen.workers)
    for sentence in _hanging(screen.workers):
        yield f"  {coloured('hangs', '31')}       {sentence}"
    deaths = [worker for worker in screen.workers if worker.last_death]
    for kind, death in sorted({(worker.kind, worker.last_death) for worker in deaths}):
        yield f"  last death  {kind}: {death}"


def _releases(workers: list[WorkerState]) -> Iterator[str]:
    own = next((worker.release for worker in workers if worker.kind == "supervisor"), "")
    others = [worker for worker in workers if worker.release not in ("", own)]
    for kind, release in sorted({(worker.kind, worker.release) for worker in others}):
        yield f"  release     {kind}: still {release}"


def _hanging(workers: list[WorkerState]) -> list[str]:
    """What hangs; of cri only if nobody else does, for it waits for the others."""
    of_cri = [sentence for worker in workers if worker.kind == "cri" for sentence in hanging(worker, HANGS)]
    others = [sentence for worker in workers if worker.kind != "cri" for sentence in hanging(worker, HANGS)]
    return others or of_cri


def _since(workers: list[WorkerState]) -> str:
    began = next((worker.started_at_ns for worker in workers if worker.kind == "supervisor"), 0)
    return duration(time.time() - began / 1e9) if began else "-"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"


def _workers(workers: list[WorkerState]) -> str:
    kinds = [worker for worker in workers if worker.kind not in ("supervisor", "monitor", "init")]
    outliving = Counter(worker.kind for worker in workers if worker.kind in ("monitor", "init"))
    text = _counts(Counter(worker.state for worker in kinds))
    restarts = {worker.kind: worker.restarts for worker in kinds}
    text += f"; restarts: {sum(restarts.values())}"
    return text + "".join(f"; {count} {kind}s" for kind, count in sorted(outliving.items()))


def _conditions(screen: Screen) -> None:
    print_table(
        ("CONDITION", "STATUS", "REASON", "MESSAGE"),
        ((c.type, str(c.status), c.reason or "-", c.message or "-") for c in screen.status.status.conditions),
    )
    print()
    print_table(
        ("HANDLER", "RECURSIVE READ-ONLY", "USER NAMESPACES"),
        (
            (
                h.name or "(default)",
                str(h.features.recursive_read_only_mounts),
                str(h.features.user_namespaces),
            )
            for h in screen.status.runtime_handlers
        ),
    )


def _as_data(screen: Screen) -> dict[str, object]:
    """As the CRI's Status has it, and what the screen has besides."""
    data: dict[str, object] = as_data(screen.status)
    info = data.get("info")
    data["info"] = {key: _parsed(value) for key, value in info.items()} if isinstance(info, dict) else {}
    data["healthy"] = healthy(screen)
    data["counts"] = {
        "pods": dict(screen.pods),
        "containers": dict(screen.containers),
        "images": screen.images,
    }
    data["imageBytes"], data["freeBytes"] = screen.image_bytes, screen.free_bytes
    return data


def _parsed(text: str) -> object:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


# -- top --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """CPU seconds and memory of everybody at one moment, by (kind, name)."""

    at: float
    cpu: Mapping[tuple[str, str], float]
    memory: Mapping[tuple[str, str], int]


def show_top(connection: Connection, options: argparse.Namespace) -> int:
    before = sample(connection)
    rounds = 0
    while options.rounds <= 0 or rounds < options.rounds:
        time.sleep(max(0.1, options.delay))
        now = sample(connection)
        if sys.stdout.isatty():
            print(CLEAR, end="")
        print_table(("KIND", "NAME", "CPU", "MEMORY"), rows(before, now))
        before, rounds = now, rounds + 1
        if not sys.stdout.isatty():
            print()
        sys.stdout.flush()
    return 0


def sample(connection: Connection) -> Sample:
    """Ask everybody."""
    cpu: dict[tuple[str, str], float] = {}
    memory: dict[tuple[str, str], int] = {}
    stats = connection.call(connection.runtime.ListPodSandboxStats, cri.ListPodSandboxStatsRequest()).stats
    for pod in stats:
        metadata = pod.attributes.metadata
        key = ("pod", f"{metadata.namespace}/{metadata.name} {short(pod.attributes.id)}")
        cpu[key] = pod.linux.cpu.usage_core_nano_seconds.value / 1e9
        memory[key] = pod.linux.memory.working_set_bytes.value
    for worker in connection.ask(WorkerList()).workers:
        if worker.pid:
            use = usage(worker.pid)
            key = ("process", f"{name_of(worker)} ({worker.pid})")
            cpu[key] = max(use.cpu_seconds, 0.0)
            memory[key] = max(use.pss if use.pss >= 0 else use.rss, 0)  # shared pages are shared out
    return Sample(time.monotonic(), cpu, memory)


def rows(before: Sample, now: Sample) -> list[tuple[str, str, str, str]]:
    """Pods first, within a kind those that use most CPU first; 100 % is one CPU."""
    seconds = max(now.at - before.at, 1e-3)
    used = {key: max(0.0, cpu - before.cpu.get(key, cpu)) / seconds for key, cpu in now.cpu.items()}
    ordered = sorted(used, key=lambda key: (key[0], -used[key], key[1]))
    return [(*key, f"{used[key] * 100:.1f}%", size(now.memory[key])) for key in ordered]
