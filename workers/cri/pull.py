"""Runs in: cri. PullImage: who downloads and who unpacks are introduced to each other, layer by layer.

The image worker writes a blob into the pipe that storage's unpack child reads; the bytes never come here.
Pulls of the same reference with the same credentials and signature policy are one; layers are shared
between all pulls by their chain id. A layer whose worker died on the way is begun again; layers that are
there are skipped. Owns the running pulls and their progress, nothing durable: a layer exists whole or not
at all.
"""

from __future__ import annotations

import asyncio
import os
import time
from _blake2 import blake2b  # by itself: hashlib brings OpenSSL, 2 MB, with it
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from ipc import log
from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError, unavailable
from ipc.fds import FdSet
from ipc.messages import image as image_messages
from ipc.messages import storage
from ipc.messages.cri import LayerState, PullState
from ipc.messages.image import Auth, Layer, Progress, Resolved
from workers.cri.images import Images, asked, is_pinned, pinned
from workers.cri.node import Node
from workers.cri.peers import SHORT

ATTEMPTS = 4  # of one layer, when workers die
BAD_DATA_ATTEMPTS = 2  # of one layer, when digest or size were wrong
BACKOFF = 0.25  # seconds, doubled
RESOLVE_TIMEOUT = 120.0
LAYER_TIMEOUT = 24 * 3600.0  # what stalls ends by pull_idle_timeout; this only bounds a trickle
COMMIT_TIMEOUT = 3600.0
#: The registry's own word about a blob or a name; trying the next candidate makes sense, a retry does not.
_NEXT_CANDIDATE = {Code.NOT_FOUND, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.UNAVAILABLE}
#: What an unpack child says of an archive; it is the cause of a download that broke off.
_ARCHIVE_FAULTS = {Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED}
#: How a download ends whose pipe was closed by the reader, or whose worker died.
_BROKEN = {Code.UNAVAILABLE, Code.CANCELLED, Code.FAILED_PRECONDITION, Code.INTERNAL, Code.DATA_LOSS}
#: What a restarted storage says of a staging that it does not know.
_STAGING_LOST = {Code.UNAVAILABLE, Code.NOT_FOUND, Code.FAILED_PRECONDITION}

_SECRET = os.urandom(32)


@dataclass
class LayerJob:
    """One layer that is being fetched, for however many pulls."""

    task: asyncio.Task[int]  # its result is the size on disk, bytes
    bytes_done: int = 0
    moved_at: float = field(default_factory=time.monotonic)

    def progress(self, update: Progress) -> None:
        """The image worker tells the bytes so far."""
        self.bytes_done = update.bytes
        self.moved_at = time.monotonic()


@dataclass
class Pull:
    """One running pull."""

    reference: str
    started_at_ns: int
    namespace: str = ""  # if it has a signature policy of its own
    layers: list[Layer] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # chain id -> bytes on disk, of layers that are done


class Pulls:
    """The running pulls, and how many ended well or not."""

    def __init__(self, node: Node, images: Images) -> None:
        self._node = node
        self._images = images
        self._running: dict[tuple[str, str, str], Pull] = {}
        self._jobs: dict[str, LayerJob] = {}
        self.succeeded = 0
        self.failures: Counter[str] = Counter()  # by the error's code
        self.seconds = 0.0  # of all pulls that ended
        self.layers: Counter[str] = Counter()  # "fetched" or "present"
        self.bytes = 0  # of the layers that were fetched, as they came over the network
        self._changed = asyncio.Event()

    # -- progress -------------------------------------------------------------------------------------

    def states(self) -> list[PullState]:
        """How far each running pull is."""
        return [self._state(pull) for pull in self._running.values()]

    def _state(self, pull: Pull) -> PullState:
        parts = [
            LayerState(digest=one.digest, bytes_total=one.size, bytes_done=self._bytes_done(pull, one))
            for one in pull.layers
        ]
        return PullState(
            reference=pull.reference,
            started_at_ns=pull.started_at_ns,
            bytes_total=sum(part.bytes_total for part in parts),
            bytes_done=sum(part.bytes_done for part in parts),
            layers=len(parts),
            layers_done=len(pull.sizes),
            parts=parts,
        )

    def _bytes_done(self, pull: Pull, layer: Layer) -> int:
        if layer.chain_id in pull.sizes:
            return layer.size
        job = self._jobs.get(layer.chain_id)
        return 0 if job is None else min(job.bytes_done, layer.size)

    async def changed(self, timeout: float) -> None:
        """Wait until a pull begins, knows its layers or ends, at most `timeout` seconds."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except TimeoutError:
            return

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- one pull -------------------------------------------------------------------------------------

    async def pull(self, spec: pb.ImageSpec, auth: Auth | None, namespace: str = "") -> str:
        """Pull an image, for a pod of a namespace, and return its id.

        Raises RemoteError with the registry's, the policy's or the archive's fault.
        """
        text = asked(spec)
        namespace = namespace if namespace in self._node.settings.policy_namespaces else ""
        key = (text, fingerprint(auth), namespace)
        return await self._node.operations.run(("image.pull", *key), lambda: self._counted(key, auth))

    async def _counted(self, key: tuple[str, str, str], auth: Auth | None) -> str:
        pull = self._running[key] = Pull(key[0], time.time_ns(), key[2])
        self._note_change()
        begun = time.monotonic()
        try:
            image = await self._pull_any(pull, auth)
        except BaseException as error:
            self.failures[error.code if isinstance(error, RemoteError) else Code.INTERNAL] += 1
            raise
        finally:
            self.seconds += time.monotonic() - begun
            del self._running[key]
            self._note_change()
        self.succeeded += 1
        seconds = round(time.monotonic() - begun, 3)
        log.get().info(
            "image pulled", reference=key[0], image=image, size=sum(pull.sizes.values()), s=seconds
        )
        return image

    async def _pull_any(self, pull: Pull, auth: Auth | None) -> str:
        """Try what the reference may mean, in order; the last refusal is the answer."""
        candidates = await self._images.candidates(pull.reference, SHORT)
        for reference in candidates[:-1]:
            try:
                return await self._pull_one(pull, reference, auth)
            except RemoteError as error:
                if error.code not in _NEXT_CANDIDATE:
                    raise
                log.get().info("trying the next candidate", reference=reference, text=error.text)
        return await self._pull_one(pull, candidates[-1], auth)

    async def _pull_one(self, pull: Pull, reference: str, auth: Auth | None) -> str:
        request = image_messages.ManifestResolve(reference=reference, auth=auth, namespace=pull.namespace)
        resolved = await self._node.peers.image.call(request, timeout=RESOLVE_TIMEOUT)
        try:
            return await self._store(pull, resolved, auth)
        except RemoteError as error:
            # a layer that was there has been collected between our look and the record of the image
            if error.code not in {Code.NOT_FOUND, Code.FAILED_PRECONDITION}:
                raise
            log.get().warning("layers went away during a pull, once more", reference=reference)
            return await self._store(pull, resolved, auth)

    async def _store(self, pull: Pull, resolved: Resolved, auth: Auth | None) -> str:
        pull.layers, pull.sizes = resolved.layers, {}
        self._note_change()
        await self._fetch_layers(pull, resolved, auth)
        names = [resolved.name] if resolved.name else []
        record = storage.ImageRecord(
            id=resolved.config_digest,
            config=resolved.config,
            manifest=resolved.manifest,
            manifest_media_type=resolved.manifest_media_type,
            names=names,
            digests=[resolved.repo_digest] if resolved.repo_digest else [],
            layers=[layer.chain_id for layer in resolved.layers],
            size=sum(pull.sizes[layer.chain_id] for layer in resolved.layers),
            pinned=is_pinned(names, pinned(self._node.settings)),
            created_at_ns=time.time_ns(),
        )
        stored = await self._node.peers.storage.call(storage.ImagePut(image=record), timeout=SHORT)
        return stored.image.id

    # -- layers ---------------------------------------------------------------------------------------

    async def _fetch_layers(self, pull: Pull, resolved: Resolved, auth: Auth | None) -> None:
        slots = asyncio.Semaphore(max(1, self._node.settings.parallel_layers))
        done: list[asyncio.Future[None]] = []
        try:
            for index, layer in enumerate(resolved.layers):
                below = resolved.layers[index - 1] if index else None
                parent = done[index - 1] if index else None
                chain = below.chain_id if below else ""
                fetcher = Fetcher(self._node, layer, chain, resolved.source, auth, slots, parent)
                done.append(asyncio.ensure_future(self._fetch_shared(pull, fetcher)))
            await _all_or_first_error(done)
        finally:
            for task in done:
                task.cancel()
            await asyncio.gather(*done, return_exceptions=True)

    async def _fetch_shared(self, pull: Pull, fetcher: Fetcher) -> None:
        """Fetch a layer, or wait for the pull that fetches it; if that one fails, fetch it ourselves."""
        chain_id = fetcher.layer.chain_id
        while True:
            job = self._jobs.get(chain_id)
            joined = job is not None
            if job is None:
                job = self._begin_job(chain_id, fetcher)
            try:
                pull.sizes[chain_id] = await (asyncio.shield(job.task) if joined else job.task)
                self._count(fetcher.layer, present=joined or fetcher.present)
                return
            except RemoteError:
                if not joined:
                    raise
            except asyncio.CancelledError:
                if not joined or not job.task.cancelled() or _is_cancelled():
                    raise

    def _count(self, layer: Layer, *, present: bool) -> None:
        self.layers["present" if present else "fetched"] += 1
        self.bytes += 0 if present else layer.size

    def _begin_job(self, chain_id: str, fetcher: Fetcher) -> LayerJob:
        job = self._jobs[chain_id] = LayerJob(asyncio.ensure_future(fetcher.fetch()))
        fetcher.progress = job.progress
        fetcher.idle_for = lambda: time.monotonic() - job.moved_at
        job.task.add_done_callback(lambda _task: self._jobs.pop(chain_id, None))
        return job


@dataclass
class Fetcher:
    """Brings one layer from a registry into storage."""

    node: Node
    layer: Layer
    parent_chain: str
    source: str
    auth: Auth | None
    slots: asyncio.Semaphore
    parent: asyncio.Future[None] | None
    progress: Callable[[Progress], None] = lambda _update: None
    idle_for: Callable[[], float] = lambda: 0.0
    present: bool = False  # it was there already
    refused: RemoteError | None = None  # what storage said of the archive when a download broke off

    async def fetch(self) -> int:
        """Try until the layer is committed; returns its size on disk in bytes."""
        lost, bad = 0, 0
        while True:
            try:
                return await self._attempt()
            except RemoteError as error:
                lost += error.code is Code.UNAVAILABLE
                bad += error.code is Code.DATA_LOSS
                again = bool(lost and error.code is Code.UNAVAILABLE and not error.reason and lost < ATTEMPTS)
                again |= error.code is Code.DATA_LOSS and bad < BAD_DATA_ATTEMPTS
                if not again:
                    raise
                log.get().warning("layer is begun again", layer=self.layer.digest, text=error.text)
            self.progress(Progress(bytes=0))
            await asyncio.sleep(BACKOFF * 2 ** (lost + bad - 1))

    async def _attempt(self) -> int:
        async with self.slots:
            present = await self._download()
        if present is not None:
            return present
        if self.parent is not None:
            await asyncio.shield(self.parent)
        return await self._commit()

    async def _download(self) -> int | None:
        """Begin the layer and fill its pipe; returns its size if it is there already."""
        layer = self.layer
        begin = storage.LayerBegin(
            chain_id=layer.chain_id,
            parent=self.parent_chain,
            diff_id=layer.diff_id,
            blob_digest=layer.digest,
            blob_size=layer.size,
            media_type=layer.media_type,
        )
        begun, fds = await self.node.peers.storage.call_fds(begin, timeout=SHORT)
        with fds:
            self.present = begun.present
            if begun.present:
                return begun.size
            try:
                await self._fill(fds)
            except RemoteError as error:
                raise await self._cause(error) from error
        return None

    async def _fill(self, fds: FdSet) -> None:
        self.progress(Progress(bytes=0))
        await self._unless_stalled(asyncio.ensure_future(self._fetch_blob(fds)))
        self.progress(Progress(bytes=self.layer.size))

    async def _fetch_blob(self, fds: FdSet) -> image_messages.Fetched:
        """Give the pipe away; taken here, so that it is not lost if this task is cancelled unbegun."""
        layer = self.layer
        request = image_messages.BlobFetch(
            source=self.source, digest=layer.digest, size=layer.size, urls=layer.urls, auth=self.auth
        )
        return await self.node.peers.image.call(
            request, fds=[fds.take()], timeout=LAYER_TIMEOUT, on_update=self.progress
        )

    async def _unless_stalled(self, call: asyncio.Future[image_messages.Fetched]) -> None:
        """Await a download; end it when no byte came for `pull_idle_timeout` seconds."""
        limit = self.node.settings.pull_idle_timeout
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=min(1.0, limit / 4))
                if not call.done() and self.idle_for() > limit:
                    raise unavailable(f"no byte of {self.layer.digest} came for {limit:g} s")
            call.result()
        finally:
            call.cancel()

    async def _cause(self, error: RemoteError) -> RemoteError:
        """What to make of a download that broke off.

        The unpack child may have refused the archive and closed the pipe; but it also refuses one that a
        dying image worker cut short. So storage's word counts when it says it twice.
        """
        refusal = await self._storage_says() if error.code in _BROKEN and not error.reason else None
        await self._abort()
        if refusal is None:
            return error
        if self.refused is not None:
            return refusal
        self.refused = refusal
        return unavailable(f"{error.text}; storage: {refusal.text}")

    async def _storage_says(self) -> RemoteError | None:
        commit = storage.LayerCommit(chain_id=self.layer.chain_id)
        try:
            await self.node.peers.storage.call(commit, timeout=SHORT)
        except RemoteError as error:
            return error if error.code in _ARCHIVE_FAULTS else None
        return None

    async def _abort(self) -> None:
        try:
            abort = storage.LayerAbort(chain_id=self.layer.chain_id)
            await self.node.peers.storage.call(abort, timeout=SHORT)
        except RemoteError as error:  # the next begin throws the staging away too
            log.get().warning("aborting a layer failed", layer=self.layer.digest, text=error.text)

    async def _commit(self) -> int:
        request = storage.LayerCommit(chain_id=self.layer.chain_id)
        try:
            return (await self.node.peers.storage.call(request, timeout=COMMIT_TIMEOUT)).size
        except RemoteError as error:
            if error.code in _STAGING_LOST:
                raise unavailable(f"storage lost the layer it was unpacking: {error.text}") from error
            raise


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _all_or_first_error(tasks: list[asyncio.Future[None]]) -> None:
    """Wait for all; as soon as one fails, raise its error. A parent's error comes before its children's."""
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION) if tasks else None
    for task in tasks:
        if task.done():
            task.result()


def fingerprint(auth: Auth | None) -> str:
    """A digest of credentials, to tell pulls apart without keeping a secret in a key.

    It is keyed, because keys stand in logs: nobody shall try passwords against it.
    """
    if auth is None:
        return ""
    return blake2b(msgspec.msgpack.encode(auth), key=_SECRET, digest_size=8).hexdigest()
