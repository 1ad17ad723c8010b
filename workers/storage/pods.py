"""Runs in: storage, and (tear_down) in its children.

The files that all containers of a pod share: resolv.conf, hostname, hosts, and a tmpfs for /dev/shm. A file
that is there is left alone: it may be mounted in a container already. They are made in the worker itself:
three small files and a mount below run_root, which nobody else named. They are removed in a child, since
what a pod has left in its /dev/shm may take long to free.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ipc import kernel
from ipc.errors import RemoteError, internal, invalid
from ipc.messages import Empty
from ipc.messages.storage import PodFiles, PodSetup, PodTeardown
from ipc.serve import Call
from workers.jobs import Jobs

from . import mounts
from .paths import Paths, checked_id
from .serial import Done, Serial
from .trouble import told

MAX_HOST_FILE = 1024 * 1024
SHM_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
_HOSTS = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
fe00::0\tip6-mcastprefix
fe00::1\tip6-allnodes
fe00::2\tip6-allrouters
"""


class Pods:
    """The pods' directories below one run root."""

    def __init__(self, jobs: Jobs, paths: Paths) -> None:
        self._jobs = jobs
        self._paths = paths
        self._serial = Serial()

    def waiting(self) -> int:
        """How many operations wait for others on the same pod."""
        return self._serial.waiting()

    def setup(self, call: Call, body: PodSetup) -> None:
        """storage.pod.setup"""
        checked_id(body.pod_id, "pod")
        if not (0 <= body.owner_uid < 2**32 - 1 and 0 <= body.owner_gid < 2**32 - 1):
            raise invalid(f"pod {body.pod_id}: {body.owner_uid}:{body.owner_gid} cannot own its files")
        if any(c in body.hostname for c in "\0\n \t") or len(body.hostname) > 64 or body.shm_bytes < 0:
            raise invalid(f"pod {body.pod_id}: bad host name {body.hostname!r} or size of /dev/shm")
        directory = str(self._paths.pods / body.pod_id)
        self._serial.run(body.pod_id, lambda done: self._set_up(call, done, directory, body))

    @staticmethod
    def _set_up(call: Call, done: Done, directory: str, body: PodSetup) -> None:
        try:
            if not call.done:
                call.reply(set_up(directory, body))
        except RemoteError as error:
            call.fail(error)
        finally:
            done()

    def teardown(self, call: Call, body: PodTeardown) -> None:
        """storage.pod.teardown"""
        directory = str(self._paths.pods / checked_id(body.pod_id, "pod"))
        self._serial.run(body.pod_id, lambda done: self._tear_down(call, done, directory))

    def _tear_down(self, call: Call, done: Done, directory: str) -> None:
        def ended(outcome: Any) -> None:
            if isinstance(outcome, RemoteError):
                call.fail(outcome)
            else:
                call.reply(Empty())
            done()

        if call.done:
            done()
            return
        job = self._jobs.start(tear_down, directory, on_done=ended)
        call.doing = job.name
        call.on_abandon(job.kill)

    def discard(self, pod_id: str, then: Callable[[Any], object]) -> None:
        """Take away what is left of a pod that nobody knows; `then` gets RemoteError, or None."""

        def turn(done: Done) -> None:
            def ended(outcome: Any) -> None:
                then(outcome)
                done()

            self._jobs.start(tear_down, str(self._paths.pods / pod_id), on_done=ended)

        self._serial.run(pod_id, turn)

    def inventory(self) -> list[str]:
        """Every pod that there is anything of."""
        return sorted(os.listdir(self._paths.pods))


# -- in the worker ----------------------------------------------------------------------------------------


def set_up(directory: str, body: PodSetup) -> PodFiles:
    """Make the pod's files and its tmpfs; what is there stays."""
    with told("cannot write the pod's files"):
        _write_files(Path(directory), body)
    if body.shm_bytes:
        _mount_shm(Path(directory, "shm"), body)
    return PodFiles(
        directory=directory,
        shm=f"{directory}/shm" if body.shm_bytes else "",
        resolv_conf=f"{directory}/resolv.conf",
        hostname=f"{directory}/hostname",
        hosts=f"{directory}/hosts",
    )


def _write_files(home: Path, body: PodSetup) -> None:
    home.mkdir(mode=0o700, exist_ok=True)
    resolv_conf = body.resolv_conf if body.resolv_conf is not None else host_resolv_conf()
    owner = (body.owner_uid, body.owner_gid)
    _write_once(home / "resolv.conf", resolv_conf, owner)
    _write_once(home / "hostname", f"{body.hostname}\n".encode(), owner)
    _write_once(home / "hosts", hosts(body.hostname).encode(), owner)


def hosts(hostname: str) -> str:
    """hosts(5) of a pod; a kubelet brings its own, with the pod's address."""
    return f"{_HOSTS}127.0.1.1\t{hostname}\n" if hostname else _HOSTS


def host_resolv_conf(path: str = "/etc/resolv.conf") -> bytes:
    """The host's resolv.conf, empty if it has none."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_HOST_FILE)
    except FileNotFoundError:
        return b""


def _write_once(path: Path, data: bytes, owner: tuple[int, int]) -> None:
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.chmod(0o644)
    os.chown(temporary, *owner)
    temporary.rename(path)


def _mount_shm(path: Path, body: PodSetup) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    if mounts.is_mounted(path):
        return
    try:
        options = f"mode=1777,size={body.shm_bytes},uid={body.owner_uid},gid={body.owner_gid}"
        kernel.mount("shm", str(path), "tmpfs", SHM_FLAGS, options)
    except OSError as error:
        raise internal(f"cannot mount the pod's /dev/shm: {error.strerror}") from error


# -- in children ----------------------------------------------------------------------------------------


def tear_down(directory: str) -> None:
    """Unmount and remove everything of the pod. Absent is success."""
    home = Path(directory)
    mounts.unmount_all(home / "shm")
    mounts.remove_directory(home / "shm")
    if home.is_dir():
        for path in home.iterdir():
            path.unlink()
        home.rmdir()
