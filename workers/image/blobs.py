"""Runs in: image.

A blob from a registry into a pipe, its size and digest verified as it flows. A connection that breaks is
taken up where it broke, by range or by reading the first part again; what is read again must be the same.
Progress resets the count of failures. When one endpoint cannot go on, the next one does. It refuses a body
that is longer or shorter than announced, and says so only when it is sure, for others retry what can be.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from ipc import log
from ipc.errors import Code, RemoteError, invalid, unavailable
from ipc.messages.image import BlobFetch
from ipc.reference import check_digest, parse
from workers.image.client import PARTIAL, Client, Tools, success
from workers.image.failures import Failure, combine, unreachable
from workers.image.operation import Operation
from workers.image.resolve import make_client, read_source
from workers.image.transport import STALL_BYTES, Answer, Transport, origin_of

PROGRESS_INTERVAL = 0.2
PIPE_BYTES = 1 << 20
_WAIT_MS = 200  # for a full pipe, before looking whether anybody still wants it
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.ASCII)
#: Opens the blob from a byte on.
Opener = Callable[[int], Answer]


class Sink:
    """The write end of the pipe. Owns the descriptor.

    `abandon` may come from another thread: the pipe is closed at once, and whatever the writer still
    writes goes to `null`, a descriptor of /dev/null.
    """

    def __init__(self, fd: int, null_fd: int) -> None:
        self._fd = fd
        self._null_fd = null_fd
        self._lock = threading.Lock()
        self._closed = False
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise invalid("the descriptor that came with the request is no pipe")
        os.set_blocking(fd, False)
        with contextlib.suppress(OSError):  # a user's pipe budget may be spent
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def write(self, data: memoryview, operation: Operation) -> None:
        """Write all of it. Raises RemoteError(UNAVAILABLE) when the reader is gone, Cancelled."""
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                self._wait(operation)
            except BrokenPipeError:
                operation.check()
                raise unavailable("the unpacker went away") from None

    def _wait(self, operation: Operation) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        poll.poll(_WAIT_MS)
        operation.check()

    def abandon(self) -> None:
        """Close the pipe under a writer."""
        with self._lock:
            if not self._closed:
                os.dup2(self._null_fd, self._fd, inheritable=False)

    def close(self) -> None:
        """Close the descriptor; may be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)


class Blob:
    """What is known of one blob while it flows. `report` is called with the bytes so far."""

    def __init__(
        self,
        digest: str,
        size: int,
        sink: Sink,
        operation: Operation,
        report: Callable[[int], object],
    ) -> None:
        self._algorithm = check_digest(digest).partition(":")[0]
        self._digest = digest
        self._size = size
        self._sink = sink
        self._operation = operation
        self._report = report
        self._hash = hashlib.new(self._algorithm, usedforsecurity=False)
        self._reported = time.monotonic()
        self.sent = 0

    @property
    def complete(self) -> bool:
        return self.sent == self._size

    def take(self, open_at: Opener) -> None:
        """Take from one connection what is missing. Raises Failure, RemoteError, Cancelled."""
        answer = open_at(self.sent)
        try:
            self._begin(answer)
            while data := answer.read():
                self._operation.check()
                self._flow(data, answer.host)
        finally:
            answer.close()
        if not self.complete:
            raise Failure(
                Code.DATA_LOSS, f"{answer.host}: the blob ended at byte {self.sent} of {self._size}"
            )

    def _begin(self, answer: Answer) -> None:
        """Check what is to come against what was announced, and pass over what was sent already."""
        start = _start_of(answer)
        if start not in {0, self.sent}:
            raise Failure(Code.DATA_LOSS, f"{answer.host}: asked for byte {self.sent}, got byte {start}")
        length = answer.header("Content-Length")
        if length.isdigit() and start + int(length) != self._size:
            raise Failure(
                Code.DATA_LOSS,
                f"{answer.host}: the blob has {start + int(length)} bytes, it should have {self._size}",
            )
        if start < self.sent:
            self._pass_over(answer)

    def _pass_over(self, answer: Answer) -> None:
        again = hashlib.new(self._algorithm, usedforsecurity=False)
        left = self.sent
        while left:
            data = answer.read(min(left, 1 << 18))
            self._operation.check()
            if not data:
                raise unreachable(answer.host, "the connection broke before the byte where it broke last")
            again.update(data)
            left -= len(data)
        if again.digest() != self._hash.digest():
            raise RemoteError(
                Code.DATA_LOSS, f"{answer.host}: a second reading of the blob differs from the first"
            )

    def _flow(self, data: bytes, host: str) -> None:
        if self.sent + len(data) > self._size:
            raise RemoteError(Code.DATA_LOSS, f"{host}: the blob is longer than its {self._size} bytes")
        self._hash.update(data)
        self._sink.write(memoryview(data), self._operation)
        self.sent += len(data)
        now = time.monotonic()
        if now - self._reported >= PROGRESS_INTERVAL:
            self._reported = now
            self._report(self.sent)

    def verify(self, what: str) -> None:
        """Raises RemoteError(DATA_LOSS) if all the bytes do not have the digest."""
        found = f"{self._algorithm}:{self._hash.hexdigest()}"
        if found != self._digest:
            raise RemoteError(Code.DATA_LOSS, f"{what}: the digest is {found}, it should be {self._digest}")


def _start_of(answer: Answer) -> int:
    if answer.status != PARTIAL:
        return 0
    match = _CONTENT_RANGE.fullmatch(answer.header("Content-Range").strip())
    if match is None:
        raise Failure(Code.DATA_LOSS, f"{answer.host}: a partial answer does not say which part it is")
    return int(match[1])


def fetch(
    tools: Tools,
    operation: Operation,
    request: BlobFetch,
    sink: Sink,
    report: Callable[[int], object],
) -> int:
    """Download a blob into the sink and return its size. Raises RemoteError, Cancelled."""
    blob = Blob(request.digest, request.size, sink, operation, report)
    transport = tools.transport(operation)
    failures: list[RemoteError] = []
    try:
        for name, opener in _openers(tools, transport, request):
            try:
                _persist(blob, opener, operation, tools.settings.retries)
                blob.verify(name)
                log.get().info("blob fetched", endpoint=name, digest=request.digest, bytes=blob.sent)
                return blob.sent
            except Failure as failure:
                failures.append(failure)
                log.get().info("endpoint failed", endpoint=name, digest=request.digest, why=failure.text)
    finally:
        transport.close()
    raise combine(f"cannot fetch blob {request.digest}", failures)


def _persist(blob: Blob, opener: Opener, operation: Operation, retries: int) -> None:
    """Take up again what breaks, as long as every few attempts bring something."""
    failed = 0
    while True:
        before = blob.sent
        try:
            blob.take(opener)
            return
        except Failure as failure:
            operation.check()
            if blob.complete:
                return
            failed = 1 if blob.sent - before >= STALL_BYTES else failed + 1
            allowed = retries if failure.retries is None else min(retries, failure.retries)
            if not failure.transient or failed > allowed:
                raise
            operation.sleep(failure.delay(failed))


def _openers(tools: Tools, transport: Transport, request: BlobFetch) -> Iterator[tuple[str, Opener]]:
    """Where the blob may be: the endpoints of its source, then the urls of a foreign layer."""
    source = read_source(request.source)
    reference = parse(source.reference)
    for listed in source.endpoints:
        client = make_client(
            tools,
            transport,
            listed.endpoint,
            auth=request.auth,
            domain=reference.domain,
            scheme=listed.scheme,
        )
        yield listed.endpoint.name, partial(_open_own, client, request.digest)
    for url in request.urls:
        yield "the layer's url", partial(_open_foreign, transport, url)


def _open_own(client: Client, digest: str, start: int) -> Answer:
    return client.get(f"blobs/{digest}", start=start)


def _open_foreign(transport: Transport, url: str, start: int) -> Answer:
    """A foreign layer's URL stands in a manifest that anybody may have written: it gets no credentials
    and no login, and must be HTTPS."""
    origin = origin_of(url)
    if origin.scheme != "https":
        raise Failure(Code.UNAVAILABLE, f"{origin}: the layer's url is plain HTTP, which is refused")
    headers = {"Range": f"bytes={start}-"} if start else {}
    return success(transport.get(url, headers), str(origin))
