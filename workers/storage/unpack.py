"""Runs in: unpack, a child of storage that lives for one layer.

From the pipe that `image` fills to a directory tree: compressed bytes are hashed, inflated, hashed again
(diff id) and unpacked, all at the same time: one thread reads and inflates, one hashes, the main thread
writes files. zlib, zstd, SHA-256 and the kernel all work without the interpreter's lock.

Owns its confinement: a mount namespace with nothing in it but the layer's directory, mounted nodev (a device
node can be made, not opened), no network, five capabilities, a closed list of system calls, bounded memory.
Refuses: a wrong digest, length or diff id (DATA_LOSS), hostile archives (INVALID_ARGUMENT), bombs and full
disks (RESOURCE_EXHAUSTED).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from ipc import kernel, log
from ipc.confine import confine
from ipc.errors import Code, RemoteError

from . import decompress
from .content import CONTENT, Content
from .decompress import HashedSource
from .extract import Extractor
from .report import Blob, LayerReport, Limits
from .tarstream import Input, TarReader

#: CHOWN, MKNOD, SETFCAP: what archives contain. FOWNER, FSETID: modes and times of files given away.
#: No DAC_OVERRIDE: directories stay this process's own until the last step.
CAPABILITIES = ("CHOWN", "FOWNER", "FSETID", "MKNOD", "SETFCAP")
MEMORY_LIMIT = 1024 * 1024 * 1024  # address space: 128 MiB zstd window, threads' arenas, the interpreter
QUEUED_CHUNKS = 8
THREAD_STACK = 256 * 1024
#: A ratio means nothing for small layers: a file of zeros packs a thousandfold.
RATIO_FLOOR = 256 * 1024 * 1024


class _Closed(Exception):
    """The other end of a lane is gone."""


class Lane:
    """A bounded queue between two threads, whose producer also tells how it ended."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None

    def put(self, chunk: bytes) -> None:
        """Hand over a chunk, when there is room. Raises _Closed if nobody wants it."""
        with self._changed:
            while len(self._chunks) >= QUEUED_CHUNKS and not self._closed:
                self._changed.wait()
            if self._closed:
                raise _Closed
            self._chunks.append(chunk)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """No more chunks; the consumer gets `error`, if there is one, after the last."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """The consumer wants no more."""
        with self._changed:
            self._closed = True
            self._chunks.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        while (chunk := self._take()) is not None:
            yield chunk

    def _take(self) -> bytes | None:
        with self._changed:
            while not self._chunks and not self._ended:
                self._changed.wait()
            if self._chunks:
                chunk = self._chunks.popleft()
                self._changed.notify_all()
                return chunk
            if self._error is not None:
                raise self._error
            return None


class Pipeline:
    """The two helper threads, and the lanes between them and the caller of `run`."""

    def __init__(self, source: HashedSource, limits: Limits, algorithm: str) -> None:
        self._source = source
        self._limits = limits
        self._hash = hashlib.new(algorithm)
        self._algorithm = algorithm
        self._to_files = Lane()
        self._to_hash = Lane()
        self._threads = [
            threading.Thread(target=self._inflate, name="inflate", daemon=True),
            threading.Thread(target=self._digest, name="digest", daemon=True),
        ]

    def run(self, consume: Callable[[Iterator[bytes]], LayerReport]) -> tuple[LayerReport, str]:
        """Feed `consume` with the uncompressed stream; its report and the diff id. Raises RemoteError."""
        for thread in self._threads:
            thread.start()
        try:
            report = consume(iter(self._to_files))
        finally:
            self._to_files.close()
            for thread in self._threads:
                thread.join()
        return report, f"{self._algorithm}:{self._hash.hexdigest()}"

    def _inflate(self) -> None:
        error: BaseException | None = None
        try:
            for chunk in self._bounded(decompress.plain(self._source)):
                self._to_hash.put(chunk)
                self._to_files.put(chunk)
        except _Closed:
            pass
        except BaseException as caught:  # noqa: BLE001 - the consumer, in the main thread, raises it
            error = caught
        self._to_files.end(error)
        self._to_hash.end()

    def _digest(self) -> None:
        for chunk in self._to_hash:
            self._hash.update(chunk)

    def _bounded(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        total = 0
        for chunk in chunks:
            total += len(chunk)
            if total > self._limits.max_bytes:
                raise _bomb(f"the layer is larger than {self._limits.max_bytes} bytes unpacked")
            if total > RATIO_FLOOR and total > self._limits.max_ratio * self._source.size:
                raise _bomb(f"the layer unpacks to more than {self._limits.max_ratio} times its size")
            yield chunk


def _bomb(text: str) -> RemoteError:
    return RemoteError(Code.RESOURCE_EXHAUSTED, text)


def unpack(
    read: decompress.Read, root_fd: int, blob: Blob, limits: Limits, content: Content | None = None
) -> LayerReport:
    """Unpack a blob below `root_fd` and check it against what it must be. Raises RemoteError."""
    source = HashedSource(_limited(read, blob), blob.digest.partition(":")[0])
    extractor = Extractor(
        root_fd,
        max_entries=limits.max_entries,
        max_bytes=limits.max_bytes,
        lowest=blob.lowest,
        content=content,
    )
    pipeline = Pipeline(source, limits, blob.diff_id.partition(":")[0])
    try:
        report, diff_id = pipeline.run(lambda chunks: extractor.extract(TarReader(Input(chunks))))
    except MemoryError as error:
        raise _bomb("the layer needs more memory to unpack than it may have") from error
    except RemoteError as error:
        if error.code is Code.INVALID_ARGUMENT:
            _blame_transfer(source, blob)
        raise
    source.drain()
    _check("digest", source.digest, blob.digest)
    _check("length", source.size, blob.size)
    _check("diff id (digest of the uncompressed layer)", diff_id, blob.diff_id)
    report.diff_id, report.blob_digest, report.blob_size = diff_id, source.digest, source.size
    return report


def _limited(read: decompress.Read, blob: Blob) -> decompress.Read:
    """Stop where the blob says more than its length: the rest can only be wrong."""
    seen = 0

    def limited(size: int) -> bytes:
        nonlocal seen
        data = read(size)
        seen += len(data)
        if seen > blob.size:
            raise RemoteError(Code.DATA_LOSS, f"layer {blob.digest}: more than its {blob.size} bytes came")
        return data

    return limited


def _blame_transfer(source: HashedSource, blob: Blob) -> None:
    """A blob that cannot be read and is not the right one was damaged on its way: DATA_LOSS."""
    source.drain()
    _check("length", source.size, blob.size)
    _check("digest", source.digest, blob.digest)


def _check(what: str, found: str | int, wanted: str | int) -> None:
    if found != wanted:
        raise RemoteError(Code.DATA_LOSS, f"the layer's {what} is {found}, not {wanted} as announced")


# -- the child ----------------------------------------------------------------------------------------


def unpack_child(pipe_fd: int, directory: str, blob: Blob, limits: Limits) -> None:
    """Body of the `unpack` process: lock in, unpack `pipe_fd` into `<directory>/diff`, leave a report in
    `<directory>/report` and what was made in `<directory>/content`. Raises RemoteError, OSError."""
    _entitle(blob)
    report_fd, content_fd = (_create(f"{directory}/{name}") for name in ("report", CONTENT))
    root = f"{directory}/diff"
    os.chown(root, limits.uid, limits.uid)
    threading.stack_size(THREAD_STACK)
    _prepare_hashes(blob)
    for lacking in confine_to(root, limits):
        log.get().warning("unpack child is confined less than it should be", lacking=lacking)
    os.umask(0)
    root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    content = Content()
    report = unpack(lambda size: os.read(pipe_fd, size), root_fd, blob, limits, content)
    _write_all(content_fd, content.data)
    _write_all(report_fd, msgspec.msgpack.encode(report))


def confine_to(root: str, limits: Limits) -> list[str]:
    """Lock this process into `root`. Returns what this machine lacks. Raises OSError."""
    lacking = _leave_the_host(root)
    rlimits = {"AS": MEMORY_LIMIT, "FSIZE": limits.max_bytes, "NOFILE": 256, "CORE": 0}
    return lacking + confine(
        None if not lacking else root, CAPABILITIES, "unpack", rlimits, uid=limits.uid, gid=limits.uid
    )


def _leave_the_host(root: str) -> list[str]:
    """Enter a mount namespace whose only mount is `root`, nodev. Where that cannot be (the host's own root is
    no mount point, say), chroot must do."""
    flags = kernel.MS_NODEV | kernel.MS_NOSUID | kernel.MS_NOEXEC
    try:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.bind_mount(root, root)
        kernel.mount("", root, "", kernel.MS_REMOUNT | kernel.MS_BIND | flags)
        os.chdir(root)
        kernel.pivot_root(".", ".")
        kernel.umount(".", kernel.MNT_DETACH)
        os.chdir("/")
    except OSError as error:
        return [f"mount namespace: {error.strerror}; chroot only"]
    return []


def _prepare_hashes(blob: Blob) -> None:
    """OpenSSL loads what it needs for a digest on first use, and later there is nothing to load from."""
    for digest in (blob.digest, blob.diff_id):
        hashlib.new(digest.partition(":")[0], b"")


def _entitle(blob: Blob) -> None:
    from setproctitle import setproctitle

    setproctitle(f"bulkhead: unpack {blob.chain_id.partition(':')[2][:12]}")


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _write_all(fd: int, data: bytes | bytearray) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
