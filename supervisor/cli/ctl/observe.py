"""Runs in: bulkheadctl.

What happens, and what it costs: events (as they come), stats.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import UTC, datetime

import grpc

from ipc.cri import api_pb2 as cri
from supervisor.cli.ctl.arguments import USAGE, Commands, command, with_output
from supervisor.cli.ctl.connection import Connection, CtlError, rpc_error
from supervisor.cli.ctl.output import as_data, print_data, print_json, print_table, short, size


def register(commands: Commands) -> None:
    """Add this module's commands."""
    events = command(
        commands, "events", follow_events, "Show what happens to pods and containers, as it does"
    )
    events.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="for people, or programs"
    )
    events.add_argument(
        "-n", "--count", type=int, default=0, metavar="N", help="end after so many (default: go on)"
    )
    stats = command(commands, "stats", show_stats, "Show what running containers use")
    with_output(stats, ids=False)
    stats.add_argument("-p", "--pod", default="", help="only those of this pod sandbox")
    stats.add_argument("id", nargs="?", default="", help="only this one")


# -- events ------------------------------------------------------------------------------------------------


def follow_events(connection: Connection, options: argparse.Namespace) -> int:
    """One line an event, whole at once, so that a pipe sees it."""
    if options.count < 0:
        raise CtlError("--count must not be below 0", USAGE)
    for number, event in enumerate(_events(connection), 1):
        if options.output == "json":
            print_json(event)
        else:
            print(_line(event))
        sys.stdout.flush()
        if number == options.count:
            break
    return 0


def _events(connection: Connection) -> Iterator[cri.ContainerEventResponse]:
    stream = connection.runtime.GetContainerEvents(cri.GetEventsRequest())
    try:
        yield from stream
    except grpc.RpcError as error:
        raise rpc_error(error, connection.socket) from error


def _line(event: cri.ContainerEventResponse) -> str:
    when = datetime.fromtimestamp(event.created_at / 1e9, UTC).isoformat(timespec="milliseconds")
    what = cri.ContainerEventType.Name(event.container_event_type).split("_")[1].lower()
    pod = event.pod_sandbox_status
    where = f"{pod.metadata.namespace}/{pod.metadata.name}"
    if event.container_id == pod.id:
        return f"{when} {what:8} pod       {short(event.container_id)} {where}"
    named = (one for one in event.containers_statuses if one.id == event.container_id)
    one = next(named, cri.ContainerStatus())
    code = f" exit code {one.exit_code}" if what == "stopped" else ""
    return (
        f"{when} {what:8} container {short(event.container_id)} {one.metadata.name or '-'} of {where}{code}"
    )


# -- stats -------------------------------------------------------------------------------------------------


def show_stats(connection: Connection, options: argparse.Namespace) -> int:
    wanted = cri.ContainerStatsFilter(id=options.id, pod_sandbox_id=options.pod)
    answer = connection.call(
        connection.runtime.ListContainerStats, cri.ListContainerStatsRequest(filter=wanted)
    )
    found = sorted(answer.stats, key=lambda one: -one.memory.working_set_bytes.value)
    if options.output != "table":
        print_data([as_data(one) for one in found], options.output)
    else:
        headers = ("CONTAINER ID", "NAME", "CPU %", "CPU TIME", "MEMORY", "SWAP", "DISK", "FILES")
        print_table(headers, (_row(one) for one in found))
    return 0


def _row(one: cri.ContainerStats) -> tuple[str, ...]:
    return (
        short(one.attributes.id),
        one.attributes.metadata.name,
        f"{one.cpu.usage_nano_cores.value / 1e7:.1f}" if one.cpu.HasField("usage_nano_cores") else "-",
        f"{one.cpu.usage_core_nano_seconds.value / 1e9:.2f}s",
        size(one.memory.working_set_bytes.value),
        size(one.swap.swap_usage_bytes.value) if one.HasField("swap") else "-",
        size(one.writable_layer.used_bytes.value),
        str(one.writable_layer.inodes_used.value),
    )
