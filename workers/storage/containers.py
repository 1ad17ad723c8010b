"""Runs in: storage, and (build, dismantle) in its children.

Root file systems of containers: a writable layer below root, an overlay mounted below run_root, the user
resolved in what is mounted, the sources of its mounts looked at. All or nothing: what a failed create made
is taken away again, unless the container was there before.

A container's row is written before its directories and deleted after them, so its image is in use for as
long as there is anything of it. After a reboot the mounts are gone and the directories tell what there was.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ipc.errors import Code, RemoteError, not_found, precondition
from ipc.loop import Loop
from ipc.messages import Body, Empty
from ipc.messages.storage import (
    CdiResolve,
    CdiResolved,
    ContainerCreate,
    ContainerRemove,
    ContainerRootfs,
    ContainerUnmount,
    IdmapProbe,
    IdmapSupport,
    MountSource,
    MountSourceInfo,
)
from ipc.serve import Call
from workers.jobs import Job, Jobs

from . import cdi, hookfiles, idmap, mounts, relabel, users, volumes
from .commit import copy_looks
from .database import Database
from .devices import examine_devices, profile_loaded, read_profile
from .idmap import Mapped
from .images import Images
from .layers import Layers, LowerLayer
from .mounts import Progress
from .paths import Paths, checked_id
from .serial import Done, Serial
from .trouble import HOST_TROUBLE, contained, refusal, told
from .usage import Usages
from .volumes import VolumePlan

EMPTY_LINK = "empty"


class ContainerPlan(Body):
    """Everything that a child needs to build or dismantle one container's root."""

    writable: str  # <root>/containers/<id>
    mounted: str  # <run_root>/containers/<id>
    links: str
    lowers: list[LowerLayer]
    root: str
    volumes: list[VolumePlan] = []
    mapped: Mapped | None = None


class SpecDirectories(Body):
    """Where the node's administrator keeps what may change a container."""

    cdi: list[str] = []
    hooks: list[str] = []


class Containers:
    """The containers of one root directory. A reload changes `source_timeout` and `directories`."""

    def __init__(
        self,
        loop: Loop,
        jobs: Jobs,
        paths: Paths,
        *,
        database: Database,
        layers: Layers,
        images: Images,
        source_timeout: float,
        directories: SpecDirectories,
    ) -> None:
        self._loop = loop
        self._jobs = jobs
        self._paths = paths
        self.directories = directories
        self._database = database
        self._layers = layers
        self._images = images
        self.source_timeout = source_timeout
        self._serial = Serial()
        self.usages = Usages(loop, jobs, paths)
        self.usages.found(database.container_ids())

    # -- create ---------------------------------------------------------------------------------------

    def create(self, call: Call, body: ContainerCreate) -> None:
        """storage.container.create"""
        checked_id(body.container_id, "container")
        checked_id(body.pod_id, "pod")
        call.doing = "waiting for an earlier operation on the container"
        self._serial.run(body.container_id, lambda done: _guarded(call, done, self._create, body))

    def _create(self, call: Call, done: Done, body: ContainerCreate) -> None:
        image_id = self._images.find(body.image_id)
        if image_id is None:
            raise not_found(f"image {body.image_id} is not here")
        known = self._database.container(body.container_id)
        if known is not None and known != (body.pod_id, image_id):
            raise precondition(f"container {body.container_id} exists with another pod or image")
        chain = self._images.layers_of(image_id)
        plan = self._plan(body.container_id, self._layers.lowers(chain[-1]) if chain else [])
        plan.mapped = self._mapped(body)
        plan.volumes = self._volumes(body)
        if known is None:
            volume_images = [volume.image_id for volume in plan.volumes]
            self._database.add_container(body.container_id, body.pod_id, image_id, volume_images)
        self._build(call, done, body, plan, new=known is None)

    def _build(
        self, call: Call, done: Done, body: ContainerCreate, plan: ContainerPlan, *, new: bool
    ) -> None:
        shared = self._jobs.shared
        progress = shared if isinstance(shared, Progress) else Progress()

        def ended(outcome: Any) -> None:
            watch.cancel()
            if not isinstance(outcome, RemoteError):
                self.usages.made(body.container_id)
                call.reply(msgspec.convert(outcome, ContainerRootfs))
                done()
                return
            if new:
                self._dismantle(body.container_id, plan, lambda _: failed(outcome))
            else:
                failed(outcome)

        def failed(error: RemoteError) -> None:
            call.fail(error)
            done()

        finish = _once(ended)
        job = self._jobs.start(
            build, plan, body, self.directories, progress, on_done=finish, name="create container"
        )
        job.describe = functools.partial(progress.describe, job.name, job.since)
        call.doing = "making the container's root file system"
        call.on_abandon(job.kill)
        watch = _Watch(self._loop, self.source_timeout, job=job, progress=progress, call=call, finish=finish)

    def _volumes(self, body: ContainerCreate) -> list[VolumePlan]:
        """The image volumes of a request."""
        return [
            self._volume(position, source) for position, source in enumerate(body.mounts) if source.image_id
        ]

    def _volume(self, position: int, source: MountSource) -> VolumePlan:
        image_id = self._images.find(source.image_id)
        if image_id is None:
            raise volumes.failed(Code.NOT_FOUND, f"image {source.image_id} is not here")
        chain = self._images.layers_of(image_id)
        lowers = self._layers.lowers(chain[-1]) if chain else []
        return VolumePlan(position=position, image_id=image_id, sub_path=source.sub_path, lowers=lowers)

    # -- remove ---------------------------------------------------------------------------------------

    def remove(self, call: Call, body: ContainerRemove) -> None:
        """storage.container.remove"""
        checked_id(body.container_id, "container")
        self._serial.run(body.container_id, lambda done: _guarded(call, done, self._remove, body))

    def _remove(self, call: Call, done: Done, body: ContainerRemove) -> None:
        plan = self._plan(body.container_id, [])

        def dismantled(outcome: Any) -> None:
            _answer(call, outcome)
            done()

        self._dismantle(body.container_id, plan, dismantled)

    def discard(self, container_id: str, then: Callable[[Any], object]) -> None:
        """Take away what is left of a container that nobody knows; `then` gets RemoteError, or None."""

        def turn(done: Done) -> None:
            def ended(outcome: Any) -> None:
                then(outcome)
                done()

            self._dismantle(container_id, self._plan(container_id, []), ended)

        self._serial.run(container_id, turn)

    def _dismantle(self, container_id: str, plan: ContainerPlan, then: Callable[[Any], object]) -> None:
        grave = self._paths.fresh(f"container-{container_id[:16]}")

        def dismantled(outcome: Any) -> None:
            if isinstance(outcome, RemoteError):
                then(outcome)
                return
            then(self._forget(container_id))
            if outcome:  # after the answer: nobody waits for a grave to be emptied
                self._layers.delete([grave])

        self._jobs.start(dismantle, plan, str(grave), on_done=dismantled, name="remove container")

    def _forget(self, container_id: str) -> RemoteError | None:
        self.usages.gone(container_id)
        try:
            self._database.drop_container(container_id)
        except HOST_TROUBLE as error:
            return refusal(error, "cannot forget the container")
        with contained("dropping damaged images"):
            self._images.container_gone()
        return None

    def unmount(self, call: Call, body: ContainerUnmount) -> None:
        """storage.container.unmount"""
        checked_id(body.container_id, "container")
        self._serial.run(body.container_id, lambda done: _guarded(call, done, self._unmount, body))

    def _unmount(self, call: Call, done: Done, body: ContainerUnmount) -> None:
        def unmounted(outcome: Any) -> None:
            _answer(call, outcome)
            done()

        plan = self._plan(body.container_id, [])
        self._jobs.start(unmount_root, plan, on_done=unmounted, name="unmount container")

    def waiting(self) -> int:
        """How many operations wait for others on the same container."""
        return self._serial.waiting()

    # -- what there is --------------------------------------------------------------------------------

    def inventory(self) -> list[str]:
        """Every container that there is anything of."""
        found = self._database.container_ids()
        for directory in (self._paths.containers, self._paths.mounts):
            found.update(os.listdir(directory))
        return sorted(found)

    def _plan(self, container_id: str, lowers: list[LowerLayer]) -> ContainerPlan:
        return ContainerPlan(
            writable=str(self._paths.containers / container_id),
            mounted=str(self._paths.mounts / container_id),
            links=str(self._paths.links),
            lowers=lowers,
            root=str(self._paths.root),
        )

    def _mapped(self, body: ContainerCreate) -> Mapped | None:
        if not body.uid_mappings:
            return None
        pin = self._paths.namespaces / body.pod_id / "user"
        return Mapped(pin=str(pin), uids=body.uid_mappings, gids=body.gid_mappings)

    # -- devices for plugins --------------------------------------------------------------------------

    def resolve_cdi(self, call: Call, body: CdiResolve) -> None:
        """storage.cdi.resolve"""
        self._jobs.run(
            call,
            resolve_cdi,
            body.names,
            self.directories.cdi,
            then=lambda value: msgspec.convert(value, CdiResolved),
            timeout=self.source_timeout,
        )

    # -- user namespaces ------------------------------------------------------------------------------

    def probe(self, call: Call, _body: IdmapProbe) -> None:
        """storage.idmap.probe"""
        scratch = str(self._paths.fresh("probe"))
        root = str(self._paths.root)
        self._jobs.run(
            call, idmap.probe, root, scratch, then=lambda value: msgspec.convert(value, IdmapSupport)
        )


class _Watch:
    """Ends a build that hangs at one path for too long, and tells which."""

    def __init__(
        self,
        loop: Loop,
        timeout: float,
        *,
        job: Job,
        progress: Progress,
        call: Call,
        finish: Callable[[Any], None],
    ) -> None:
        self._loop, self._timeout, self._job = loop, timeout, job
        self._progress, self._call, self._finish = progress, call, finish
        self._seen = (0, loop.time())
        self._timer = loop.call_later(timeout / 8, self._look)

    def cancel(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        step, text = self._progress.read()
        now = self._loop.time()
        if step != self._seen[0]:
            self._seen = (step, now)
        elif now - self._seen[1] >= self._timeout:
            self._give_up(text)
            return
        self._call.doing = f"making the container's root file system: {text}"
        self._timer = self._loop.call_later(self._timeout / 8, self._look)

    def _give_up(self, text: str) -> None:
        """Not even SIGKILL may end a child that waits for a dead server: do not wait for its end."""
        error = RemoteError(Code.DEADLINE_EXCEEDED, f"{text}: no answer within {self._timeout:g} s")
        self._job.kill(error)
        self._finish(error)


def _once(function: Callable[[Any], None]) -> Callable[[Any], None]:
    called = False

    def once(value: Any) -> None:
        nonlocal called
        if not called:
            called = True
            function(value)

    return once


def _guarded(call: Call, done: Done, operation: Callable[[Call, Done, Any], None], body: Body) -> None:
    """Start an operation whose turn has come, unless nobody wants it any more."""
    if call.done:
        done()
        return
    try:
        operation(call, done, body)
    except RemoteError as error:
        call.fail(error)
        done()
    except HOST_TROUBLE as error:
        call.fail(refusal(error, f"storage cannot serve {call.type}"))
        done()


def _answer(call: Call, outcome: Any) -> None:
    call.fail(outcome) if isinstance(outcome, RemoteError) else call.reply(Empty())


# -- in children ----------------------------------------------------------------------------------------


def build(
    plan: ContainerPlan, body: ContainerCreate, directories: SpecDirectories, progress: Progress
) -> ContainerRootfs:
    """Make the root file system; done again, it finds what is there. Raises RemoteError, OSError."""
    _make_home(Path(plan.mounted), plan.mapped)
    infos = _sources(plan, body, progress)
    edits, hooks = cdi.resolve(body.cdi_devices, directories.cdi, progress)
    found_hooks = hookfiles.matching(body.hook_facts, directories.hooks, progress)
    devices = examine_devices(body.devices, progress, every=body.all_devices)
    profile = read_profile(body.seccomp_profile, progress)
    progress.at("the container's root file system")
    rootfs = Path(plan.mounted, "rootfs")
    with told("cannot make the container's root file system"):
        rootfs.mkdir(mode=0o700, exist_ok=True)
        if not mounts.is_mounted(rootfs):
            _mount(plan, rootfs)
    if plan.mapped is not None:
        progress.at("the container's id-mapped mounts")
        idmap.mount_volumes(plan.mapped, Path(plan.mounted), body.mounts, infos)
    progress.at("the image's /etc/passwd and /etc/group")
    root_fd = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        user = users.resolve(root_fd, body.user)
        owner = plan.mapped.owner(0, 0) if plan.mapped is not None else (0, 0)
        volumes.make_directories(root_fd, body.directories, owner)
    finally:
        os.close(root_fd)
    if plan.mapped is not None:
        plan.mapped.check(user.uid, [user.gid, *user.additional_gids])
    return ContainerRootfs(
        rootfs=str(rootfs),
        uid=user.uid,
        gid=user.gid,
        additional_gids=user.additional_gids,
        home=user.home,
        user_name=user.name,
        mounts=infos,
        devices=devices,
        seccomp_profile=profile,
        cdi=edits,
        hooks=hookfiles.merged(found_hooks, hooks),
        apparmor_loaded=profile_loaded(body.apparmor_profile, progress),
    )


def resolve_cdi(names: list[str], directories: list[str]) -> CdiResolved:
    """What CDI devices change. Raises RemoteError."""
    edits, hooks = cdi.resolve(names, directories, Progress())
    return CdiResolved(edits=edits, hooks=hooks)


def _sources(plan: ContainerPlan, body: ContainerCreate, progress: Progress) -> list[MountSourceInfo]:
    planned = {volume.position: volume for volume in plan.volumes}
    return [
        _volume_source(plan, planned[position], progress)
        if source.image_id
        else _host_source(source, progress)
        for position, source in enumerate(body.mounts)
    ]


def _host_source(source: MountSource, progress: Progress) -> MountSourceInfo:
    info = mounts.examine_source(source, progress)
    if source.relabel:
        relabel.relabel(info.path, source.relabel, progress)
    return info


def _volume_source(plan: ContainerPlan, volume: VolumePlan, progress: Progress) -> MountSourceInfo:
    progress.at(f"the image volume {volume.image_id}")
    for lower in volume.lowers:
        _ensure_link(Path(plan.links), lower)
    if plan.mapped is None:
        return volumes.mount_volume(volume, plan.mounted, Path(plan.links), EMPTY_LINK)
    below = Path(plan.links).relative_to(plan.root)
    with idmap.mapped_root(plan.mapped, Path(plan.root), Path(plan.mounted)) as root:
        return volumes.mount_volume(volume, plan.mounted, root / below, EMPTY_LINK)


def _make_home(home: Path, mapped: Mapped | None) -> None:
    """What is mounted in it may be setuid: nobody enters but the root of the container's namespace."""
    with told("cannot make the container's root file system"):
        home.mkdir(mode=0o700, exist_ok=True)
        if mapped is not None:
            os.chown(home, 0, mapped.owner(0, 0)[1])
            home.chmod(0o710)


def _mount(plan: ContainerPlan, rootfs: Path) -> None:
    upper, work = Path(plan.writable, "upper"), Path(plan.writable, "work")
    os.umask(0o022)
    upper.parent.mkdir(mode=0o700, exist_ok=True)
    work.mkdir(mode=0o700, exist_ok=True)
    _make_upper(
        upper, Path(plan.lowers[0].diff) if plan.lowers else Path(plan.links, EMPTY_LINK), plan.mapped
    )
    links = Path(plan.links)
    for lower in plan.lowers:
        _ensure_link(links, lower)
    names = [lower.link for lower in plan.lowers] or [EMPTY_LINK]
    if plan.mapped is None:
        mounts.mount_overlay(links, names, upper, work, rootfs)
        return
    home, root = Path(plan.mounted), Path(plan.root)
    below = str(links.relative_to(root))
    idmap.mount_overlay(plan.mapped, root, home, links=below, lowers=names, upper=upper, work=work)


def _make_upper(upper: Path, top: Path, mapped: Mapped | None) -> None:
    """The writable layer's root is what is seen as `/`: it must look like the image's."""
    with contextlib.suppress(FileExistsError):
        upper.mkdir(mode=0o700)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        top_fd, upper_fd = os.open(top, flags), os.open(upper, flags)
        try:
            copy_looks(top_fd, upper_fd)
            if mapped is not None:
                found = os.fstat(top_fd)
                os.fchown(upper_fd, *mapped.owner(found.st_uid, found.st_gid))
        finally:
            os.close(top_fd)
            os.close(upper_fd)


def _ensure_link(links: Path, lower: LowerLayer) -> None:
    """Make the layer's short link, or make it right: numbers start anew with a new database."""
    link, target = links / lower.link, f"../layers/{Path(lower.diff).parent.name}/diff"
    with contextlib.suppress(OSError):
        if link.readlink() == Path(target):
            return
    temporary = links / f"{lower.link}-{os.getpid()}"
    temporary.symlink_to(target)
    temporary.rename(link)


def unmount_root(plan: ContainerPlan) -> None:
    """Unmount the root file system and image volumes, if they are mounted. Raises RemoteError."""
    mounts.unmount_all(Path(plan.mounted, "rootfs"))
    volumes.unmount_volumes(plan.mounted)
    idmap.unmount_volumes(Path(plan.mounted))


def dismantle(plan: ContainerPlan, grave: str) -> bool:
    """Unmount the root file system and move the writable layer to `grave`. True if there was one."""
    unmount_root(plan)
    mounts.remove_directory(Path(plan.mounted, "rootfs"))
    idmap.remove(Path(plan.mounted))
    mounts.remove_directory(Path(plan.mounted))
    try:
        Path(plan.writable).rename(grave)
    except FileNotFoundError:
        return False
    return True
