"""Runs in: bulkheadctl.

Upkeep of a node: reload, debug (stack dumps), prune, and bundle, an archive for whoever is asked for help.
Nothing of a bundle is secret: it holds what the other commands print, and the log.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator

import msgspec

from ipc.cri import api_pb2 as cri
from ipc.errors import Code, RemoteError
from ipc.messages.supervisor import ConfigGet, ConfigReload, HostInfoGet, WorkerDump, WorkerList
from supervisor.cli.checks import report
from supervisor.cli.checks.running import Running
from supervisor.cli.ctl.arguments import Commands, command
from supervisor.cli.ctl.connection import REFUSED, UNREACHABLE, Connection, CtlError
from supervisor.cli.ctl.output import as_data, size

SERVICE = "bulkhead.service"
LOG_LINES = 20_000


def register(commands: Commands) -> None:
    """Add this module's commands."""
    command(commands, "reload", reload, "Read the configuration again; say what changed")
    checking = command(commands, "check", check, "Look whether everything is as it should be; mend it")
    report.flags(checking)
    debug = command(commands, "debug", debug_worker, "Show where each thread of a kind's workers is")
    debug.add_argument("kind", help="such as cri; `bulkheadctl workers` names them all")
    pruning = command(commands, "prune", prune, "Remove images that no container uses, pinned ones excepted")
    pruning.add_argument("-n", "--dry-run", action="store_true", help="only say which")
    pruning.add_argument("--exited", action="store_true", help="remove containers that have ended, first")
    archive = command(commands, "bundle", bundle, "Write an archive of log and state, for support")
    archive.add_argument("file", nargs="?", help="FILE.tar.gz (default: bulkhead-HOST-TIME.tar.gz)")


def reload(connection: Connection, _options: argparse.Namespace) -> int:
    answer = connection.ask(ConfigReload())
    for fault in answer.faults:
        print(f"bulkheadctl: {fault}", file=sys.stderr)
    if answer.faults:
        raise CtlError("nothing was changed", REFUSED)
    print(f"changed: {' '.join(answer.changed) or 'nothing'}")
    for key in answer.refused:
        print(f"takes a restart: {key}")
    return 0


def check(connection: Connection, options: argparse.Namespace) -> int:
    try:
        found = report.check(Running(connection.run_root), deep=options.deep, repair=options.repair)
    except RemoteError as error:
        raise CtlError(error.text, UNREACHABLE if error.code is Code.UNAVAILABLE else REFUSED) from error
    return report.show(found, options.output)


def debug_worker(connection: Connection, options: argparse.Namespace) -> int:
    for line in connection.ask(WorkerDump(kind=options.kind)).lines:
        print(line)
    return 0


# -- prune ------------------------------------------------------------------------------------------------


def prune(connection: Connection, options: argparse.Namespace) -> int:
    if options.exited:
        _remove_exited(connection, dry=options.dry_run)
    freed = 0
    for image in _unused(connection):
        name = next(iter(image.repo_tags or image.repo_digests), image.id)
        if not options.dry_run:
            request = cri.RemoveImageRequest(image=cri.ImageSpec(image=image.id))
            connection.call(connection.images.RemoveImage, request)
        freed += image.size
        print(f"{'would delete' if options.dry_run else 'deleted'}: {name} ({size(image.size)})")
    print(f"{'would free' if options.dry_run else 'freed'} up to {size(freed)}")
    return 0


def _remove_exited(connection: Connection, *, dry: bool) -> None:
    selector = cri.ContainerFilter(state=cri.ContainerStateValue(state=cri.CONTAINER_EXITED))
    request = cri.ListContainersRequest(filter=selector)
    for one in connection.call(connection.runtime.ListContainers, request).containers:
        if not dry:
            removal = cri.RemoveContainerRequest(container_id=one.id)
            connection.call(connection.runtime.RemoveContainer, removal)
        print(f"{'would remove' if dry else 'removed'}: container {one.id}")


def _unused(connection: Connection) -> list[cri.Image]:
    containers = connection.call(connection.runtime.ListContainers, cri.ListContainersRequest()).containers
    used = {name for one in containers for name in (one.image_id, one.image.image, one.image_ref)}
    images = connection.call(connection.images.ListImages, cri.ListImagesRequest()).images
    return [
        image
        for image in images
        if not image.pinned and used.isdisjoint((image.id, *image.repo_tags, *image.repo_digests))
    ]


# -- bundle -----------------------------------------------------------------------------------------------


def bundle(connection: Connection, options: argparse.Namespace) -> int:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = options.file or f"bulkhead-{platform.node()}-{stamp}.tar.gz"
    try:
        with open(path, "xb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            os.chmod(path, 0o600)
            for name, data in _parts(connection):
                member = tarfile.TarInfo(f"bulkhead/{name}")
                member.size, member.mtime, member.mode = len(data), int(time.time()), 0o600
                archive.addfile(member, io.BytesIO(data))
    except OSError as error:
        raise CtlError(f"cannot write {path}: {error.strerror}", REFUSED) from error
    print(path)
    return 0


def _parts(connection: Connection) -> Iterator[tuple[str, bytes]]:
    """Every file of the archive; where something cannot be had, the reason stands in its place."""
    runtime, images = connection.runtime, connection.images
    asked: tuple[tuple[str, Callable[[], object]], ...] = (
        ("version.json", lambda: as_data(connection.call(runtime.Version, cri.VersionRequest()))),
        ("status.json", lambda: as_data(connection.call(runtime.Status, cri.StatusRequest(verbose=True)))),
        ("pods.json", lambda: _without_notes(connection.call(runtime.ListPodSandbox, _PODS))),
        ("containers.json", lambda: _without_notes(connection.call(runtime.ListContainers, _ALL))),
        ("images.json", lambda: as_data(connection.call(images.ListImages, cri.ListImagesRequest()))),
        ("workers.json", lambda: msgspec.to_builtins(connection.ask(WorkerList()))),
        ("host.json", lambda: msgspec.to_builtins(connection.ask(HostInfoGet()))),
        ("config.toml", lambda: connection.ask(ConfigGet()).text),
    )
    for name, ask in asked:
        yield name, _answer(ask)
    for name, words in _PROGRAMS.items():
        yield name, _output(*words)


_PODS = cri.ListPodSandboxRequest()
_ALL = cri.ListContainersRequest()
#: Command lines of processes are left out: those of containers may hold secrets.
_PROGRAMS = {
    "log.txt": ("journalctl", "-u", SERVICE, "-n", str(LOG_LINES), "-o", "short-precise", "--no-pager"),
    "unit.txt": ("systemctl", "show", SERVICE),
    "processes.txt": ("ps", "-eo", "user,pid,ppid,stat,rss,etime,comm", "--forest"),
    "mounts.txt": ("cat", "/proc/self/mountinfo"),
    "links.txt": ("ip", "-details", "address"),
    "kernel.txt": ("uname", "-a"),
    "pressure.txt": ("head", "/proc/loadavg", *(f"/proc/pressure/{of}" for of in ("cpu", "io", "memory"))),
}


def _without_notes(message: object) -> object:
    """Lists name pods and containers with labels and annotations, which may say more than a support needs."""
    data = as_data(message)
    for items in data.values():
        for item in items if isinstance(items, list) else ():
            item.pop("annotations", None)
    return data


def _answer(ask: Callable[[], object]) -> bytes:
    try:
        found = ask()
    except CtlError as error:
        return f"{error}\n".encode()
    return (found if isinstance(found, str) else json.dumps(found, indent=2)).encode()


def _output(*words: str) -> bytes:
    try:
        done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{words[0]}: {error}\n".encode()
    return done.stdout + done.stderr
