"""Runs in: storage.

Layers from begin to commit, and to their end. A layer is staged by an unpack child and renamed into place by
a commit job; a staging ends with its commit, its abort, a newer begin of the same layer, or the connection
it was begun on. A commit that has started is finished, whoever has gone.

Owns <root>/layers, <root>/staging and the layers' rows. A layer that no image refers to is deleted, but not
while it may belong to a pull that is going on: begin and commit lease it for a while.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path
from typing import Any

import msgspec

from ipc import log
from ipc.errors import Code, RemoteError, invalid, precondition, unavailable
from ipc.loop import Loop
from ipc.messages import Body, Empty
from ipc.messages.storage import LayerAbort, LayerBegin, LayerBegun, LayerCommit, LayerCommitted
from ipc.serve import Call, Connection
from ipc.settings import StorageSettings
from workers.jobs import Job, Jobs

from .commit import DESCRIPTION, DIFF, commit_layer
from .database import Database, LayerRow
from .paths import Paths, checked_digest, digest_of
from .report import Blob, Limits
from .trees import delete_trees
from .trouble import HOST_TROUBLE, contained, refusal

LEASE = 600.0
EMPTY_AFTER = 0.25  # seconds after which graves are emptied, several at once: whoever asked goes on first
FIRST_RETRY, LAST_RETRY = 1.0, 3600.0  # seconds until a tree that could not be deleted is tried again
PIPE_SIZE = 1024 * 1024


class LowerLayer(Body):
    """A layer as part of an overlay: the name of its short link, and its diff directory."""

    link: str
    diff: str


@dataclass(eq=False)
class Staging:
    """One layer on its way. `outcome` is None while its child works, then "ok" or the error."""

    begin: LayerBegin
    directory: Path
    connection: Connection
    forget: Callable[[], None] = lambda: None
    job: Job | None = None
    outcome: RemoteError | str | None = None
    committing: bool = False
    commits: list[Call] = field(default_factory=list)  # who waits for the commit
    begins: list[tuple[Call, LayerBegin]] = field(default_factory=list)  # who wants to begin after it


class Layers:
    """The layer store of one root directory."""

    def __init__(
        self, loop: Loop, jobs: Jobs, paths: Paths, database: Database, settings: StorageSettings
    ) -> None:
        self._loop = loop
        self._jobs = jobs
        self._paths = paths
        self._database = database
        self.use(settings)
        self._stagings: dict[str, Staging] = {}
        self._leases: dict[str, float] = {}
        self._sweep_planned = False
        self._graves: list[str] = []

    def use(self, settings: StorageSettings) -> None:
        """The limits of layers that are begun from now on."""
        self._timeout = settings.unpack_timeout
        self._limits = Limits(
            max_entries=settings.unpack_max_entries,
            max_bytes=settings.unpack_max_bytes,
            max_ratio=settings.unpack_max_ratio,
            uid=settings.unpack_uid,
        )

    # -- begin ----------------------------------------------------------------------------------------

    def begin(self, call: Call, body: LayerBegin) -> LayerBegun | None:
        """storage.layer.begin"""
        _check(body)
        older = self._stagings.get(body.chain_id)
        if older is not None and older.committing:
            older.begins.append((call, body))
            return None
        known = self._database.layer(body.chain_id)
        if known is not None:
            self.lease(body.chain_id)
            return LayerBegun(present=True, size=known[1].size)
        if older is not None:
            self._drop(older, RemoteError(Code.CANCELLED, "the layer was begun anew"))
        call.reply(LayerBegun(present=False), fds=[self._stage(call.connection, body)])
        return None

    def _stage(self, connection: Connection, body: LayerBegin) -> int:
        directory = self._paths.fresh(body.chain_id.partition(":")[2][:16])
        try:
            (directory / DIFF).mkdir(mode=0o700, parents=True)
            read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        except OSError:
            self.delete([directory])
            raise
        _widen(write_fd)
        staging = Staging(begin=body, directory=directory, connection=connection)
        self._stagings[body.chain_id] = staging
        staging.job = self._start_unpack(staging, read_fd)
        os.close(read_fd)
        staging.forget = lambda: self._connection_closed(staging)
        connection.on_close(staging.forget)
        return write_fd

    def _start_unpack(self, staging: Staging, read_fd: int) -> Job:
        body = staging.begin
        blob = Blob(
            chain_id=body.chain_id,
            diff_id=body.diff_id,
            digest=body.blob_digest,
            size=body.blob_size,
            lowest=not body.parent,
        )
        return self._jobs.start(
            _unpack,
            read_fd,
            str(staging.directory),
            blob,
            self._limits,
            on_done=lambda outcome: self._unpacked(staging, outcome),
            timeout=self._timeout,
            fds=[read_fd],
            name=f"unpack {body.chain_id[:19]}",
        )

    def _unpacked(self, staging: Staging, outcome: Any) -> None:
        staging.outcome = outcome if isinstance(outcome, RemoteError) else "ok"
        if self._stagings.get(staging.begin.chain_id) is not staging:
            self.delete([staging.directory])
        elif isinstance(staging.outcome, RemoteError):
            log.get().warning("layer not unpacked", chain_id=staging.begin.chain_id, why=staging.outcome)
            self.delete([staging.directory])
            if staging.commits:
                self._settle(staging, staging.outcome)
        elif staging.commits:
            self._start_commit(staging)

    # -- commit ---------------------------------------------------------------------------------------

    def commit(self, call: Call, body: LayerCommit) -> LayerCommitted | None:
        """storage.layer.commit"""
        staging = self._stagings.get(checked_digest(body.chain_id, "layer"))
        known = self._database.layer(body.chain_id)
        if known is not None:
            self.lease(body.chain_id)
            return LayerCommitted(size=known[1].size, entries=known[1].entries)
        if staging is None:
            raise unavailable(f"layer {body.chain_id} is not being unpacked: begin it again")
        if isinstance(staging.outcome, RemoteError):
            self._settle(staging, staging.outcome)
            raise staging.outcome
        if staging.begin.parent and self._database.layer(staging.begin.parent) is None:
            raise precondition(f"layer {body.chain_id}: its parent {staging.begin.parent} is not committed")
        staging.commits.append(call)
        call.doing = "waiting for the layer to be unpacked"
        call.on_abandon(lambda: staging.commits.remove(call) if call in staging.commits else None)
        if staging.outcome == "ok" and not staging.committing:
            self._start_commit(staging)
        return None

    def _start_commit(self, staging: Staging) -> None:
        body = staging.begin
        staging.committing = True
        for call in staging.commits:
            call.doing = "committing the layer"
        self.delete([self._paths.layer(body.chain_id)])  # it has no row: a commit that failed left it
        self._jobs.start(
            commit_layer,
            str(staging.directory),
            str(self._paths.layer(body.chain_id)),
            body.chain_id,
            body.parent,
            [str(self._paths.layer(chain_id) / DIFF) for chain_id in self.chain(body.parent)],
            on_done=lambda outcome: self._committed(staging, outcome),
            name="commit layer",
        )

    def _committed(self, staging: Staging, outcome: Any) -> None:
        if isinstance(outcome, RemoteError):  # perhaps after the rename
            self.delete([staging.directory, self._paths.layer(staging.begin.chain_id)])
            self._settle(staging, outcome)
            return
        row = msgspec.json.decode(outcome, type=LayerRow)
        try:
            self._database.add_layer(row)
        except HOST_TROUBLE as error:
            self.delete([self._paths.layer(row.chain_id)])
            self._settle(staging, refusal(error, "cannot record the layer"))
            return
        self.lease(row.chain_id)
        self._settle(staging, LayerCommitted(size=row.size, entries=row.entries))

    def _settle(self, staging: Staging, result: LayerCommitted | RemoteError) -> None:
        """The end of a staging: answer everybody who waits for it."""
        self._forget(staging)
        commits, staging.commits = staging.commits, []
        for call in commits:
            call.fail(result) if isinstance(result, RemoteError) else call.reply(result)
        begins, staging.begins = staging.begins, []
        for call, body in begins:
            self._begin_late(call, body)

    def _begin_late(self, call: Call, body: LayerBegin) -> None:
        if call.done:
            return
        try:
            reply = self.begin(call, body)
        except RemoteError as error:
            call.fail(error)
            return
        except HOST_TROUBLE as error:
            call.fail(refusal(error, "cannot begin the layer"))
            return
        if reply is not None:
            call.reply(reply)

    # -- abort ----------------------------------------------------------------------------------------

    def abort(self, _call: Call, body: LayerAbort) -> Empty:
        """storage.layer.abort"""
        staging = self._stagings.get(checked_digest(body.chain_id, "layer"))
        if staging is not None and not staging.committing:
            self._drop(staging, RemoteError(Code.CANCELLED, "the layer was aborted"))
        return Empty()

    def _connection_closed(self, staging: Staging) -> None:
        if not staging.committing:
            self._drop(staging, RemoteError(Code.CANCELLED, "the connection of its begin was closed"))

    def _drop(self, staging: Staging, why: RemoteError) -> None:
        self._settle(staging, why)
        if staging.outcome == "ok":
            self.delete([staging.directory])
        elif staging.job is not None:
            staging.job.kill(why)  # _unpacked deletes when it is dead

    def _forget(self, staging: Staging) -> None:
        if self._stagings.get(staging.begin.chain_id) is staging:
            del self._stagings[staging.begin.chain_id]
        staging.connection.off_close(staging.forget)

    # -- what there is --------------------------------------------------------------------------------

    def chain(self, chain_id: str) -> list[str]:
        """A committed layer and those below it, nearest first. FAILED_PRECONDITION if one is missing."""
        chain: list[str] = []
        while chain_id:
            found = self._database.layer(chain_id)
            if found is None:
                raise precondition(f"layer {chain_id} is missing")
            chain.append(chain_id)
            chain_id = found[1].parent
        return chain

    def lowers(self, chain_id: str) -> list[LowerLayer]:
        """What an overlay of an image with this top layer lies on, nearest first: down to the first layer
        whose root is opaque, which overlayfs itself does not look at."""
        lowers: list[LowerLayer] = []
        for below in self.chain(chain_id):
            lowers.append(
                LowerLayer(link=str(self._number(below)), diff=str(self._paths.layer(below) / DIFF))
            )
            found = self._database.layer(below)
            if found is not None and found[1].opaque:
                break
        return lowers

    def _number(self, chain_id: str) -> int:
        found = self._database.layer(chain_id)
        if found is None:
            raise precondition(f"layer {chain_id} is missing")
        return found[0]

    def reconcile(self) -> None:
        """At start: make rows and directories agree, delete what a former life left in staging."""
        on_disk = {
            f"sha{256 if len(p.name) == 64 else 512}:{p.name}": p for p in self._paths.layers.iterdir()
        }
        rows = self._database.chain_ids()
        for chain_id in rows - on_disk.keys():
            log.get().error("layer is gone from disk; its images must be pulled again", chain_id=chain_id)
        self._database.drop_layers(rows - on_disk.keys())
        for chain_id in on_disk.keys() - rows:
            self._adopt(chain_id, on_disk[chain_id])
        self.delete(list(self._paths.staging.iterdir()))
        self._plan_sweep()

    def _adopt(self, chain_id: str, directory: Path) -> None:
        """A layer was renamed into place and its row not written: it is whole all the same."""
        try:
            row = msgspec.json.decode((directory / DESCRIPTION).read_bytes(), type=LayerRow)
        except (OSError, msgspec.DecodeError) as error:
            log.get().error("not a layer; deleted", path=directory, why=error)
            self.delete([directory])
            return
        if row.chain_id == chain_id:
            self._database.add_layer(row)
            log.get().info("layer adopted", chain_id=chain_id)

    # -- the end --------------------------------------------------------------------------------------

    def lease(self, chain_id: str) -> None:
        """Keep a layer that no image refers to for a while: a pull is on its way."""
        self._leases[chain_id] = self._loop.time() + LEASE
        self._plan_sweep()

    def release(self, chain_ids: list[str]) -> None:
        """An image refers to these now."""
        for chain_id in chain_ids:
            self._leases.pop(chain_id, None)

    def _plan_sweep(self) -> None:
        if not self._sweep_planned:
            self._sweep_planned = True
            self._loop.call_later(LEASE + 1, self._planned_sweep)

    def _planned_sweep(self) -> None:
        self._sweep_planned = False
        self.sweep()
        if self._leases:
            self._plan_sweep()

    def sweep(self) -> None:
        """Delete the layers that no image refers to and no pull may need."""
        now = self._loop.time()
        self._leases = {chain_id: until for chain_id, until in self._leases.items() if until > now}
        kept = self._protected()
        doomed = [c for c in self._database.unreferenced_layers() if c not in kept]
        if doomed:
            with contained("sweeping layers"):
                self._sweep(doomed)

    def _sweep(self, doomed: list[str]) -> None:
        links = [self._paths.links / str(self._number(chain_id)) for chain_id in doomed]
        self._database.drop_layers(doomed)
        for link in links:
            link.unlink(missing_ok=True)
        self.delete([self._paths.layer(chain_id) for chain_id in doomed])

    def drop(self, chain_id: str) -> None:
        """Forget a broken layer and delete it; those above it are of no use until it was pulled again."""
        known = self._database.layer(chain_id)
        if known is not None:
            self._database.drop_layers([chain_id])
            (self._paths.links / str(known[0])).unlink(missing_ok=True)
        log.get().warning("broken layer dropped", chain_id=chain_id)
        self.delete([self._paths.layer(chain_id)])

    def _protected(self) -> set[str]:
        kept: set[str] = set()
        for chain_id in [*self._leases, *(s.begin.parent for s in self._stagings.values())]:
            while chain_id and chain_id not in kept:
                kept.add(chain_id)
                found = self._database.layer(chain_id)
                chain_id = found[1].parent if found else ""  # noqa: PLW2901 - walks down the chain
        return kept

    def delete(self, directories: list[Path]) -> None:
        """Delete trees below root, atomically for whoever looks at their names, in a child."""
        doomed = []
        for directory in directories:
            grave = directory if directory.parent == self._paths.staging else self._paths.fresh("delete")
            if directory is not grave and not _moved(directory, grave):
                continue
            doomed.append(str(grave))
        if doomed and not self._graves:
            self._loop.call_later(EMPTY_AFTER, self.empty)
        self._graves += doomed

    def empty(self) -> None:
        """Empty the graves now."""
        graves, self._graves = self._graves, []
        if graves:
            self._bury(graves, FIRST_RETRY)

    def _bury(self, doomed: list[str], delay: float) -> None:
        """Delete what stands in staging; what cannot be deleted now is tried again, later and later."""
        trash = str(self._paths.fresh("trash"))

        def deleted(outcome: Any) -> None:
            left = [path for path in (*doomed, trash) if os.path.lexists(path)]
            if left:
                log.get().warning(
                    "trees not deleted; tried again", seconds=delay, why=outcome, left=len(left)
                )
                later = min(delay * 2, LAST_RETRY)
                self._loop.call_later(delay, lambda: self._bury(left, later))

        self._jobs.start(delete_trees, doomed, trash, on_done=deleted, name="delete trees")


def _unpack(pipe_fd: int, directory: str, blob: Blob, limits: Limits) -> None:
    """The child loads what only it needs: the idle worker stays small."""
    from .unpack import unpack_child

    unpack_child(pipe_fd, directory, blob, limits)


def _moved(source: Path, target: Path) -> bool:
    try:
        source.rename(target)
    except FileNotFoundError:
        return False
    except OSError as error:
        log.get().error("cannot move a tree away to delete it", tree=source, why=error)
        return False
    return True


def chain_id_of(parent: str, diff_id: str) -> str:
    """OCI image-spec, config.md, "Layer ChainID"."""
    if not parent:
        return diff_id
    return digest_of(f"{parent} {diff_id}".encode())


def _chain_id(directory: Path) -> str:
    return f"{'sha256' if len(directory.name) == 64 else 'sha512'}:{directory.name}"


def _check(body: LayerBegin) -> None:
    checked_digest(body.chain_id, "chain id")
    checked_digest(body.diff_id, "diff id")
    checked_digest(body.blob_digest, "blob")
    if body.parent:
        checked_digest(body.parent, "parent")
    if body.chain_id.startswith("sha256:") and body.chain_id != chain_id_of(body.parent, body.diff_id):
        raise invalid(f"chain id {body.chain_id} does not follow from the layer's parent and diff id")


def _widen(pipe_fd: int) -> None:
    try:
        fcntl(pipe_fd, F_SETPIPE_SZ, PIPE_SIZE)
    except PermissionError:
        log.get().debug("pipe stays small: the user's limit of pipe memory is reached")
