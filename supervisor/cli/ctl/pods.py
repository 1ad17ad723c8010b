"""Runs in: bulkheadctl.

Pod sandboxes: runp, pods, inspectp, stopp, rmp.
"""

from __future__ import annotations

import argparse

from ipc.cri import api_pb2 as cri
from supervisor.cli.ctl.arguments import USAGE, Commands, command, each, labels, load, with_output
from supervisor.cli.ctl.connection import Connection, CtlError
from supervisor.cli.ctl.output import ago, as_data, print_data, print_ids, print_json, print_table, short

STATES = {"ready": cri.SANDBOX_READY, "notready": cri.SANDBOX_NOTREADY}


def register(commands: Commands) -> None:
    """Add this module's commands."""
    runp = command(commands, "runp", run, "Run a pod sandbox from a JSON file (PodSandboxConfig)")
    runp.add_argument("config")
    runp.add_argument("--runtime", default="", help="runtime handler")
    listing = command(commands, "pods", list_pods, "List pod sandboxes")
    with_output(listing)
    listing.add_argument("--id", default="", help="only this one; the beginning of an id is enough")
    listing.add_argument("--state", choices=sorted(STATES), help="only those in this state")
    listing.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="only those that bear it"
    )
    inspect = command(commands, "inspectp", inspect_pod, "Show everything about a pod sandbox")
    inspect.add_argument("id")
    stop = command(commands, "stopp", stop_pods, "Stop pod sandboxes with all that runs in them")
    stop.add_argument("id", nargs="+")
    remove = command(commands, "rmp", remove_pods, "Remove pod sandboxes")
    remove.add_argument("-a", "--all", action="store_true", help="every pod there is")
    remove.add_argument("-f", "--force", action="store_true", help="stop them first, in order")
    remove.add_argument("id", nargs="*")


def run(connection: Connection, options: argparse.Namespace) -> int:
    config = load(options.config, cri.PodSandboxConfig())
    request = cri.RunPodSandboxRequest(config=config, runtime_handler=options.runtime)
    print(connection.call(connection.runtime.RunPodSandbox, request).pod_sandbox_id)
    return 0


def list_pods(connection: Connection, options: argparse.Namespace) -> int:
    selector = cri.PodSandboxFilter(id=options.id, label_selector=labels(options.label))
    if options.state:
        selector.state.state = STATES[options.state]
    answer = connection.call(connection.runtime.ListPodSandbox, cri.ListPodSandboxRequest(filter=selector))
    items = sorted(answer.items, key=lambda pod: -pod.created_at)
    if options.output != "table":
        print_data([as_data(pod) for pod in items], options.output)
    elif options.quiet:
        print_ids(pod.id for pod in items)
    else:
        _table(items)
    return 0


def _table(items: list[cri.PodSandbox]) -> None:
    headers = ("POD ID", "CREATED", "STATE", "NAME", "NAMESPACE", "ATTEMPT", "RUNTIME")
    print_table(
        headers,
        (
            (
                short(pod.id),
                ago(pod.created_at),
                cri.PodSandboxState.Name(pod.state).removeprefix("SANDBOX_").title(),
                pod.metadata.name,
                pod.metadata.namespace,
                str(pod.metadata.attempt),
                pod.runtime_handler or "(default)",
            )
            for pod in items
        ),
    )


def inspect_pod(connection: Connection, options: argparse.Namespace) -> int:
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=options.id, verbose=True)
    print_json(connection.call(connection.runtime.PodSandboxStatus, request))
    return 0


def stop_pods(connection: Connection, options: argparse.Namespace) -> int:
    def stop(one: str) -> object:
        return connection.call(
            connection.runtime.StopPodSandbox, cri.StopPodSandboxRequest(pod_sandbox_id=one)
        )

    return each(options.id, stop, "Stopped sandbox {}".format)


def remove_pods(connection: Connection, options: argparse.Namespace) -> int:
    if bool(options.id) == options.all:
        raise CtlError("rmp needs ids, or --all", USAGE)

    def remove(one: str) -> object:
        if options.force:
            stopping = cri.StopPodSandboxRequest(pod_sandbox_id=one)
            connection.call(connection.runtime.StopPodSandbox, stopping)
        request = cri.RemovePodSandboxRequest(pod_sandbox_id=one)
        return connection.call(connection.runtime.RemovePodSandbox, request)

    return each(_every(connection) if options.all else options.id, remove, "Removed sandbox {}".format)


def _every(connection: Connection) -> list[str]:
    answer = connection.call(connection.runtime.ListPodSandbox, cri.ListPodSandboxRequest())
    return [pod.id for pod in answer.items]
