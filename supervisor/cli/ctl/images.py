"""Runs in: bulkheadctl.

Images: images, inspecti, pull (with a progress bar), rmi, imagefsinfo.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator

import grpc
import msgspec

from ipc.cri import api_pb2 as cri
from ipc.messages.cri import PullState
from supervisor.cli.ctl.arguments import Commands, command, each, with_output
from supervisor.cli.ctl.connection import Connection, CtlError
from supervisor.cli.ctl.output import as_data, print_data, print_ids, print_json, print_table, short, size

WATCH_PULLS = "/bulkhead.v1.Operator/WatchPulls"


def register(commands: Commands) -> None:
    """Add this module's commands."""
    listing = command(commands, "images", list_images, "List images")
    with_output(listing)
    listing.add_argument("--digests", action="store_true", help="with the digests of manifests")
    listing.add_argument("name", nargs="?", default="")
    inspect = command(commands, "inspecti", inspect_image, "Show everything about an image")
    inspect.add_argument("name")
    pulling = command(commands, "pull", pull, "Pull an image")
    pulling.add_argument("name")
    pulling.add_argument("--creds", metavar="USER[:PASSWORD]", help="password is read from stdin if left out")
    pulling.add_argument("--no-progress", action="store_true", help="say only the result")
    remove = command(commands, "rmi", remove_images, "Remove images")
    remove.add_argument("name", nargs="+")
    with_output(command(commands, "imagefsinfo", image_fs_info, "Show what images occupy"), ids=False)


def list_images(connection: Connection, options: argparse.Namespace) -> int:
    request = cri.ListImagesRequest()
    if options.name:
        request.filter.image.image = options.name
    items = list(connection.call(connection.images.ListImages, request).images)
    if options.output != "table":
        print_data([as_data(image) for image in items], options.output)
    elif options.quiet:
        print_ids(image.id for image in items)
    else:
        _table(items, options.digests)
    return 0


def _table(items: list[cri.Image], digests: bool) -> None:
    rows = []
    for image in items:
        digest = next((ref.partition("@")[2] for ref in image.repo_digests), "<none>")
        names = [name.rpartition(":") for name in image.repo_tags] or [
            (image.repo_digests[0].partition("@")[0] if image.repo_digests else "<none>", "", "<none>")
        ]
        for name, _, tag in names:
            row = [name, tag, short(image.id), size(image.size)]
            rows.append([*row[:2], digest, *row[2:]] if digests else row)
    headers = ["IMAGE", "TAG", "IMAGE ID", "SIZE"]
    print_table([*headers[:2], "DIGEST", *headers[2:]] if digests else headers, sorted(rows))


def inspect_image(connection: Connection, options: argparse.Namespace) -> int:
    request = cri.ImageStatusRequest(image=cri.ImageSpec(image=options.name), verbose=True)
    answer = connection.call(connection.images.ImageStatus, request)
    if not answer.image.id:
        raise CtlError(f"no such image: {options.name}")
    print_json(answer)
    return 0


def pull(connection: Connection, options: argparse.Namespace) -> int:
    request = cri.PullImageRequest(image=cri.ImageSpec(image=options.name))
    if options.creds:
        user, separator, password = options.creds.partition(":")
        request.auth.username = user
        request.auth.password = password if separator else sys.stdin.readline().rstrip("\n")
    shown = sys.stderr.isatty() and not options.no_progress
    with _bar(connection, options.name) if shown else contextlib.nullcontext():
        answer = connection.call(connection.images.PullImage, request, timeout=max(connection.timeout, 3600))
    print(f"Image is up to date for {answer.image_ref}")
    return 0


@contextlib.contextmanager
def _bar(connection: Connection, name: str) -> Iterator[None]:
    """Draw the progress meanwhile, of the whole and of each layer.

    The bars are gone at the end: what is printed over them would be lost.
    """
    watch = connection.channel.unary_stream(
        WATCH_PULLS, request_serializer=bytes, response_deserializer=bytes
    )
    states = watch(b"")
    drawer = threading.Thread(target=_draw, args=(states, name), daemon=True)
    drawer.start()
    try:
        yield
    finally:
        states.cancel()
        drawer.join()


def _draw(states: Iterable[bytes], name: str) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        whole = bar.add_task(name, total=None)
        layers: dict[str, TaskID] = {}
        try:
            for state in _states_of(name, states):
                bar.update(whole, total=state.bytes_total or None, completed=state.bytes_done)
                for part in state.parts:
                    if part.digest not in layers:
                        layers[part.digest] = bar.add_task(f"  {short(part.digest)}", total=part.bytes_total)
                    bar.update(layers[part.digest], completed=part.bytes_done)
        except grpc.RpcError:
            return  # cancelled, or broken: the bars are a courtesy, the pull's own answer counts


def _states_of(name: str, states: Iterable[bytes]) -> Iterator[PullState]:
    """What is told of the pull of one image. Raises grpc.RpcError."""
    for data in states:
        for state in msgspec.json.decode(data, type=list[PullState]):
            if state.reference == name or state.reference.endswith((f"/{name}", f"/{name}:latest")):
                yield state


def remove_images(connection: Connection, options: argparse.Namespace) -> int:
    def remove(one: str) -> object:
        status = cri.ImageStatusRequest(image=cri.ImageSpec(image=one))
        if not connection.call(connection.images.ImageStatus, status).image.id:
            raise CtlError(f"no such image: {one}")
        request = cri.RemoveImageRequest(image=cri.ImageSpec(image=one))
        return connection.call(connection.images.RemoveImage, request)

    return each(options.name, remove, "Deleted: {}".format)


def image_fs_info(connection: Connection, options: argparse.Namespace) -> int:
    answer = connection.call(connection.images.ImageFsInfo, cri.ImageFsInfoRequest())
    if options.output != "table":
        print_data(answer, options.output)
        return 0
    print_table(
        ("OF", "MOUNT POINT", "USED", "INODES"),
        (
            (of, usage.fs_id.mountpoint, size(usage.used_bytes.value), str(usage.inodes_used.value))
            for of, usages in (
                ("images", answer.image_filesystems),
                ("containers", answer.container_filesystems),
            )
            for usage in usages
        ),
    )
    return 0
