"""Runs in: storage.

The storage worker: its whole API is the table below. It owns layers, images, the root file systems of
containers and the files of pods; only `cri` may ask (and root, for repair). It has no network, forks a child
for whatever can take long or touches a name that an image or a user chose, and blocks on nothing but its own
database.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from ipc.loop import Loop
from ipc.messages import checking, storage
from ipc.serve import Call
from ipc.settings import StorageSettings
from ipc.table import ROOT, Handler, Handlers, table
from workers import boot

from .containers import Containers, SpecDirectories
from .database import Database
from .images import Images
from .layers import Layers
from .mounts import Progress, mounted_device
from .paths import Paths
from .pods import Pods
from .trouble import Children, answering

CALLERS = frozenset({"cri", ROOT})


@dataclass
class State:
    """What prepare leaves for run."""

    paths: Paths


class Storage:
    """The parts of the worker, wired."""

    def __init__(self, loop: Loop, paths: Paths, settings: StorageSettings, *, serves: bool = True) -> None:
        self.serves = serves
        self.jobs = Children(loop)
        self.paths = paths
        self.database = Database(paths.database)
        self.layers = Layers(loop, self.jobs, paths, self.database, settings)
        self.images = Images(self.database, self.layers, loop.call_soon)
        self.containers = Containers(
            loop,
            self.jobs,
            paths,
            database=self.database,
            layers=self.layers,
            images=self.images,
            source_timeout=settings.mount_source_timeout,
            directories=directories_of(settings),
        )
        self.pods = Pods(self.jobs, paths)
        self.device = mounted_device(paths.root)

    def use(self, settings: StorageSettings) -> None:
        """Work with these settings from now on; what has begun ends with those of before."""
        self.layers.use(settings)
        self.containers.source_timeout = settings.mount_source_timeout
        self.containers.directories = directories_of(settings)

    def reconcile(self) -> None:
        """Make rows and directories agree after whatever ended the last life."""
        self.layers.reconcile()
        self.images.reconcile()

    def queued(self) -> int:
        """Operations that wait for others on the same container or pod."""
        return self.containers.waiting() + self.pods.waiting()

    def fs_info(self, _call: Call, _body: storage.FsInfoGet) -> storage.FsInfo:
        """storage.fs.info"""
        used, entries = self.database.totals()
        layers_bytes, layers_inodes = self.containers.usages.totals()
        status = os.statvfs(self.paths.root)
        return storage.FsInfo(
            mountpoint=str(self.paths.root),
            used_bytes=used,
            used_inodes=entries,
            available_bytes=status.f_bavail * status.f_frsize,
            timestamp_ns=time.time_ns(),
            layers_bytes=layers_bytes,
            layers_inodes=layers_inodes,
            capacity_bytes=status.f_blocks * status.f_frsize,
            inodes=status.f_files,
            inodes_free=status.f_favail,
            device=self.device,
        )

    def inventory(self, _call: Call, _body: storage.InventoryList) -> storage.Inventory:
        """storage.inventory.list"""
        return storage.Inventory(containers=self.containers.inventory(), pods=self.pods.inventory())

    def check(self, call: Call, body: storage.StoreCheck) -> None:
        """storage.store.check"""
        self.jobs.run(
            call,
            inspect,
            str(self.paths.root),
            str(self.paths.mounts.parent),
            msgspec.to_builtins(body.known),
            body.deep,
            self.database.snapshot(),
            then=_findings,
            name="check of the store",
        )

    def mend(self, call: Call, body: storage.StoreMend) -> None:
        """storage.store.mend"""
        from .mending import Mender  # rare: an idle worker stays small

        call.doing = "mending what a check has found"
        Mender(self, body.known, body.findings, lambda findings: call.reply(checking.told(findings))).go_on()

    def handlers(self) -> Handlers:
        """The worker's table."""
        return table(
            Handler(storage.LayerBegin, answering(self.layers.begin), CALLERS),
            Handler(storage.LayerCommit, answering(self.layers.commit), CALLERS),
            Handler(storage.LayerAbort, answering(self.layers.abort), CALLERS),
            Handler(storage.ImagePut, answering(self.images.put), CALLERS),
            Handler(storage.ImageGet, answering(self.images.get), CALLERS),
            Handler(storage.ImageList, answering(self.images.list_all), CALLERS),
            Handler(storage.ImageRemove, answering(self.images.remove), CALLERS),
            Handler(storage.FsInfoGet, answering(self.fs_info), CALLERS),
            Handler(storage.UsageList, answering(self.containers.usages.list_all), CALLERS),
            Handler(storage.PodSetup, answering(self.pods.setup), CALLERS),
            Handler(storage.PodTeardown, answering(self.pods.teardown), CALLERS),
            Handler(storage.ContainerCreate, answering(self.containers.create), CALLERS),
            Handler(storage.CdiResolve, answering(self.containers.resolve_cdi), CALLERS),
            Handler(storage.IdmapProbe, answering(self.containers.probe), CALLERS),
            Handler(storage.ContainerRemove, answering(self.containers.remove), CALLERS),
            Handler(storage.ContainerUnmount, answering(self.containers.unmount), CALLERS),
            Handler(storage.InventoryList, answering(self.inventory), CALLERS),
            Handler(storage.StoreCheck, answering(self.check), CALLERS),
            Handler(storage.StoreMend, answering(self.mend), CALLERS),
        )


def directories_of(settings: StorageSettings) -> SpecDirectories:
    """The administrator's directories."""
    return SpecDirectories(cdi=settings.cdi_spec_dirs, hooks=settings.hooks_dirs)


def inspect(root: str, run_root: str, known: dict[str, list[str]], deep: bool, snapshot: bytes) -> Any:
    """In a child, which loads what only it needs: look at everything, beside the worker."""
    from . import check

    wanted = msgspec.convert(known, checking.Known)
    findings = check.inspect(root, run_root, wanted, deep=deep, snapshot=snapshot)
    return msgspec.to_builtins(checking.told(findings))


def _findings(value: Any) -> checking.Findings:
    return msgspec.convert(value, checking.Findings)


def prepare(context: boot.Context[StorageSettings]) -> State:
    """Make the directories while nothing is forbidden yet."""
    paths = Paths(context.settings.root, context.settings.run_root)
    paths.make()
    return State(paths)


def run(context: boot.Context[StorageSettings], state: State) -> None:
    """Serve until told to stop."""
    loop = Loop()
    worker = Storage(loop, state.paths, context.settings)
    worker.reconcile()

    def reload(settings: bytes) -> None:
        worker.use(msgspec.msgpack.decode(settings, type=StorageSettings))
        worker.jobs.renew()

    worker.jobs.let_stay(Progress)
    try:
        boot.serve(
            context, loop, worker.handlers(), on_reload=reload, queued=worker.queued, jobs=worker.jobs.states
        )
    finally:
        worker.jobs.kill_all()
        worker.database.close()
