"""Runs in: bulkheadctl.

Containers: create, start, stop, rm, ps, inspect, logs.
"""

from __future__ import annotations

import argparse

from ipc.cri import api_pb2 as cri
from supervisor.cli.ctl import logs
from supervisor.cli.ctl.arguments import Commands, command, each, labels, load, with_output
from supervisor.cli.ctl.connection import Connection, CtlError
from supervisor.cli.ctl.output import ago, as_data, print_data, print_ids, print_json, print_table, short

NOT_FOUND = "(NOT_FOUND)"  # how connection.py ends the sentence
STATES = {
    "created": cri.CONTAINER_CREATED,
    "running": cri.CONTAINER_RUNNING,
    "exited": cri.CONTAINER_EXITED,
    "unknown": cri.CONTAINER_UNKNOWN,
}


def register(commands: Commands) -> None:
    """Add this module's commands."""
    create = command(commands, "create", create_container, "Create a container in a pod from two JSON files")
    create.add_argument("pod", help="pod sandbox id")
    create.add_argument("config", help="ContainerConfig")
    create.add_argument("pod_config", help="PodSandboxConfig the pod was run with")
    start = command(commands, "start", start_containers, "Start created containers")
    start.add_argument("id", nargs="+")
    stop = command(commands, "stop", stop_containers, "Stop containers")
    stop.add_argument(
        *("--grace", "--timeout"), type=_seconds, default=10, help="seconds before SIGKILL (default: 10)"
    )
    stop.add_argument("id", nargs="+")
    remove = command(commands, "rm", remove_containers, "Remove containers (a running one is killed)")
    remove.add_argument("id", nargs="+")
    _register_views(commands)


def _register_views(commands: Commands) -> None:
    listing = command(commands, "ps", list_containers, "List containers (running ones; -a for all)")
    with_output(listing)
    listing.add_argument("-a", "--all", action="store_true", help="those that do not run, too")
    listing.add_argument("--id", default="", help="only this one; the beginning of an id is enough")
    listing.add_argument("-p", "--pod", default="", help="only those of this pod sandbox")
    listing.add_argument("--state", choices=sorted(STATES), help="only those in this state")
    listing.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="only those that bear it"
    )
    inspect = command(commands, "inspect", inspect_container, "Show everything about a container")
    inspect.add_argument("id")
    show = command(commands, "logs", show_logs, "Show a container's log")
    show.add_argument("-f", "--follow", action="store_true", help="go on until the container ends")
    show.add_argument("--tail", type=int, default=-1, help="only the last N lines")
    show.add_argument("--timestamps", action="store_true", help="with the time of each line")
    show.add_argument("id")


def _seconds(text: str) -> int:
    """An argument in whole seconds. Raises ValueError, which argparse puts into words."""
    seconds = int(text)
    if seconds < 0:
        raise ValueError(text)
    return seconds


def create_container(connection: Connection, options: argparse.Namespace) -> int:
    request = cri.CreateContainerRequest(
        pod_sandbox_id=options.pod,
        config=load(options.config, cri.ContainerConfig()),
        sandbox_config=load(options.pod_config, cri.PodSandboxConfig()),
    )
    print(connection.call(connection.runtime.CreateContainer, request).container_id)
    return 0


def start_containers(connection: Connection, options: argparse.Namespace) -> int:
    def start(one: str) -> object:
        return connection.call(connection.runtime.StartContainer, cri.StartContainerRequest(container_id=one))

    return each(options.id, start)


def stop_containers(connection: Connection, options: argparse.Namespace) -> int:
    def stop(one: str) -> object:
        request = cri.StopContainerRequest(container_id=one, timeout=options.grace)
        return connection.call(
            connection.runtime.StopContainer, request, timeout=options.grace + connection.timeout
        )

    return each(options.id, stop)


def remove_containers(connection: Connection, options: argparse.Namespace) -> int:
    def remove(one: str) -> object:
        return connection.call(
            connection.runtime.RemoveContainer, cri.RemoveContainerRequest(container_id=one)
        )

    return each(options.id, remove)


def list_containers(connection: Connection, options: argparse.Namespace) -> int:
    selector = cri.ContainerFilter(
        id=options.id, pod_sandbox_id=options.pod, label_selector=labels(options.label)
    )
    if options.state:
        selector.state.state = STATES[options.state]
    elif not options.all:
        selector.state.state = cri.CONTAINER_RUNNING
    answer = connection.call(connection.runtime.ListContainers, cri.ListContainersRequest(filter=selector))
    items = sorted(answer.containers, key=lambda container: -container.created_at)
    if options.output != "table":
        print_data([as_data(container) for container in items], options.output)
    elif options.quiet:
        print_ids(container.id for container in items)
    else:
        _table(items)
    return 0


def _table(items: list[cri.Container]) -> None:
    headers = ("CONTAINER", "IMAGE", "CREATED", "STATE", "NAME", "ATTEMPT", "POD ID")
    print_table(
        headers,
        (
            (
                short(one.id),
                one.image.user_specified_image or one.image.image or short(one.image_id),
                ago(one.created_at),
                cri.ContainerState.Name(one.state).removeprefix("CONTAINER_").title(),
                one.metadata.name,
                str(one.metadata.attempt),
                short(one.pod_sandbox_id),
            )
            for one in items
        ),
    )


def _status(connection: Connection, container: str) -> cri.ContainerStatusResponse:
    request = cri.ContainerStatusRequest(container_id=container, verbose=True)
    return connection.call(connection.runtime.ContainerStatus, request)


def inspect_container(connection: Connection, options: argparse.Namespace) -> int:
    print_json(_status(connection, options.id))
    return 0


def show_logs(connection: Connection, options: argparse.Namespace) -> int:
    status = _status(connection, options.id).status
    if not status.log_path:
        raise CtlError(f"container {options.id} has no log file")

    def running() -> bool:
        try:
            return _status(connection, options.id).status.state == cri.CONTAINER_RUNNING
        except CtlError as error:  # while nobody answers, its log still grows
            return NOT_FOUND not in str(error)

    logs.show(
        status.log_path,
        follow=options.follow,
        tail=options.tail,
        timestamps=options.timestamps,
        running=running,
    )
    return 0
