"""Runs in: bulkheadctl. What shells offer where a command wants a pod, a container or an image.

`complete WHAT` prints a line each: the word, a tab, what it is. It is asked at every press of a key, so it
waits two seconds at most, and says nothing at all where nobody answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping

from ipc.cri import api_pb2 as cri
from supervisor.cli.ctl.arguments import Commands, command
from supervisor.cli.ctl.connection import Connection, CtlError
from supervisor.cli.ctl.output import short

TIMEOUT = 2.0  # seconds

#: Command -> the argument or flag -> what it names.
OFFERED: Mapping[str, Mapping[str, str]] = {
    **{name: {"ID": "pods"} for name in ("inspectp", "stopp", "rmp")},
    "pods": {"--id": "pods"},
    "create": {"POD": "pods"},
    "port-forward": {"POD": "pods"},
    **{name: {"ID": "containers"} for name in ("start", "stop", "rm", "inspect", "logs", "exec", "attach")},
    "stats": {"ID": "containers", "--pod": "pods"},
    "ps": {"--id": "containers", "--pod": "pods"},
    **{name: {"NAME": "images"} for name in ("images", "inspecti", "pull", "rmi")},
}


def register(commands: Commands) -> None:
    """Add this module's command."""
    parser = command(commands, "complete", complete, "List what a shell may offer, with a word for each")
    parser.add_argument("what", choices=sorted(_LISTS), help="of which kind")


def complete(connection: Connection, options: argparse.Namespace) -> int:
    """Print them. Nobody there is an empty list, not an error in the middle of somebody's command line."""
    connection.timeout = TIMEOUT
    try:
        for word, meaning in _LISTS[options.what](connection):
            print(f"{word}\t{meaning}")
    except CtlError as error:
        return error.exit_code
    return 0


def _pods(connection: Connection) -> Iterator[tuple[str, str]]:
    answer = connection.call(connection.runtime.ListPodSandbox, cri.ListPodSandboxRequest())
    for pod in answer.items:
        yield short(pod.id), f"{pod.metadata.namespace}/{pod.metadata.name}"


def _containers(connection: Connection) -> Iterator[tuple[str, str]]:
    pods = dict(_pods(connection))
    answer = connection.call(connection.runtime.ListContainers, cri.ListContainersRequest())
    for one in answer.containers:
        state = cri.ContainerState.Name(one.state).removeprefix("CONTAINER_").lower()
        yield short(one.id), f"{one.metadata.name} of {pods.get(short(one.pod_sandbox_id), '?')}, {state}"


def _images(connection: Connection) -> Iterator[tuple[str, str]]:
    answer = connection.call(connection.images.ListImages, cri.ListImagesRequest())
    for image in answer.images:
        for name in image.repo_tags or image.repo_digests:
            yield name, short(image.id.removeprefix("sha256:"))


_LISTS: Mapping[str, Callable[[Connection], Iterator[tuple[str, str]]]] = {
    "pods": _pods,
    "containers": _containers,
    "images": _images,
}
