"""Runs in: image.

The registry client's API: the table of its handlers. Downloads run in threads of an own pool, each as one
Operation that ends when its caller goes away; the loop never waits for a network. It owns nothing that
outlives it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import contextlib
import encodings.idna
import os
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import urllib3

from ipc import log
from ipc.aio import Call
from ipc.errors import invalid
from ipc.messages import Empty
from ipc.messages.image import (
    BlobFetch,
    Fetched,
    ManifestResolve,
    Normalised,
    Progress,
    ReferenceNormalise,
    RegistriesReload,
    Resolved,
)
from ipc.settings import ImageSettings
from ipc.table import Handler, Handlers, table
from workers import boot, boot_aio
from workers.image import verifier
from workers.image.blobs import Sink, fetch
from workers.image.certificates import Certificates
from workers.image.client import Tools, make_tools
from workers.image.credentials import AuthFile
from workers.image.names import normalise
from workers.image.operation import Operation
from workers.image.proxies import Proxies, from_environment
from workers.image.resolve import resolve
from workers.image.verifier import Programs, Verifier

THREADS = 64
WATCH_INTERVAL = 1.0  # seconds
#: What the C library and Python load at first use, which a shut sandbox cannot.
_PRELOADED = (encodings.idna, concurrent.futures.thread)
CALLERS = frozenset({"cri"})

T = TypeVar("T")
A = TypeVar("A")


@dataclass
class State:
    """What is opened before the sandbox shuts."""

    null_fd: int
    proxies: Proxies
    certificates: Certificates
    auth_file: AuthFile
    verifier: Verifier | None


class Service:
    """Answers the requests of one worker."""

    def __init__(self, settings: ImageSettings, state: State) -> None:
        self._state = state
        self._tools = self._make_tools(settings)
        self._threads = concurrent.futures.thread.ThreadPoolExecutor(THREADS, thread_name_prefix="download")
        self._running: set[Operation] = set()
        self._files = files_of(settings)
        self._programs = programs_of(settings)
        self._outdated = False

    def _make_tools(self, settings: ImageSettings) -> Tools:
        state = self._state
        return make_tools(settings, state.proxies, state.certificates, state.auth_file, state.verifier)

    @property
    def busy(self) -> bool:
        """Whether a thread still works, be it for nobody."""
        return bool(self._running)

    def handlers(self) -> Handlers:
        """The whole API of this worker."""
        return table(
            Handler(ManifestResolve, self.manifest_resolve, CALLERS),
            Handler(BlobFetch, self.blob_fetch, CALLERS),
            Handler(ReferenceNormalise, self.reference_normalise, CALLERS),
            Handler(RegistriesReload, self.registries_reload, CALLERS),
        )

    async def manifest_resolve(self, call: Call, body: ManifestResolve) -> Resolved:
        call.doing = f"resolving {body.reference[:200]}"
        return await self._in_thread(call, lambda tools, operation: resolve(tools, operation, body))

    async def blob_fetch(self, call: Call, body: BlobFetch) -> Fetched:
        call.doing = f"fetching {body.digest[:80]}"
        sink = self._sink(call)
        loop = asyncio.get_running_loop()

        def report(size: int) -> None:
            _on_loop(loop, call.update, Progress(bytes=size))

        size = await self._in_thread(
            call,
            lambda tools, operation: fetch(tools, operation, body, sink, report),
            on_cancel=sink.abandon,
            on_end=sink.close,
        )
        return Fetched(bytes=size)

    def _sink(self, call: Call) -> Sink:
        if len(call.fds) != 1:
            raise invalid("the request must bring the pipe to write to")
        sink = Sink(call.fds.get(), self._state.null_fd)
        call.fds.take()
        return sink

    async def reference_normalise(self, call: Call, body: ReferenceNormalise) -> Normalised:
        return await self._in_thread(
            call,
            lambda tools, _: normalise(body.reference, tools.registries.current()),
        )

    async def registries_reload(self, call: Call, _body: RegistriesReload) -> Empty:
        def reload(tools: Tools, _operation: Operation) -> Empty:
            tools.registries.reload()  # certs.d and the auth file are looked at with every use
            return Empty()

        return await self._in_thread(call, reload)

    async def _in_thread(
        self,
        call: Call,
        work: Callable[[Tools, Operation], T],
        *,
        on_cancel: Callable[[], object] = lambda: None,
        on_end: Callable[[], object] = lambda: None,
    ) -> T:
        """Run `work` in a thread. `on_end` is called when it is over or will never begin."""
        operation = Operation(call.deadline)
        self._running.add(operation)
        loop = asyncio.get_running_loop()
        future = self._threads.submit(work, self._tools, operation)

        def ended(_future: object) -> None:
            on_end()
            _on_loop(loop, self._running.discard, operation)

        future.add_done_callback(ended)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            operation.cancel()
            on_cancel()
            raise

    def reload(self, data: bytes) -> None:
        """Take new settings; what runs finishes with the old ones. Other files are another worker's."""
        settings = msgspec.msgpack.decode(data, type=ImageSettings)
        self._outdated = self._outdated or files_of(settings) != self._files
        self._outdated = self._outdated or programs_of(settings) != self._programs
        self._tools = self._make_tools(settings)

    @property
    def outdated(self) -> bool:
        """Whether another worker would see other files."""
        state = self._state
        lost = state.certificates.unreadable or state.auth_file.replaced
        lost = lost or (state.verifier is not None and state.verifier.lost)
        return self._outdated or lost or any(map(is_replaced, self._files))

    async def until_outdated(self) -> None:
        """Return when this worker no longer sees the files that it should, and nothing runs.

        Its mount view has files as they were bound at its start. One that was replaced since, as editors
        and configuration tools do, shows by having no name left; the next worker sees the new one.
        """
        while self.busy or not self.outdated:
            await asyncio.sleep(WATCH_INTERVAL)
        log.get().info(
            "files that this worker sees, or programs that verify, are not those that should be: ends"
        )

    def close(self) -> None:
        """Let the threads end; all operations have been cancelled by now."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._state.verifier is not None:
            self._state.verifier.close()


def files_of(settings: ImageSettings) -> list[str]:
    """The files and directories that come from the host."""
    files = [settings.registries_conf, settings.registries_conf_dir, settings.auth_file]
    files += [*settings.certs_dirs, *settings.trust.directories()]
    return [path for path in files if path]


def programs_of(settings: ImageSettings) -> Programs:
    """The programs that the signature policy needs."""
    return Programs(settings.trust.gpgv, settings.trust.openssl)


def is_replaced(path: str) -> bool:
    """Whether what is seen at a path is no longer there for anybody else."""
    try:
        return os.stat(path).st_nlink == 0
    except OSError:
        return False  # it was not there at the start


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[A], object], argument: A) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is ending
        loop.call_soon_threadsafe(function, argument)


def prepare(context: boot.Context[ImageSettings]) -> State:
    """Load all that is loaded lazily elsewhere: name service libraries, codecs, TLS."""
    assert all(_PRELOADED)
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # registries.conf says so
    socket.getaddrinfo("localhost", 443, type=socket.SOCK_STREAM)
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # OpenSSL's own; authorities take 30 ms, and may be read later
    certificates = Certificates(context.settings.certs_dirs)
    certificates.preload()
    return State(
        verifier=_start_verifier(context),
        null_fd=os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC),
        proxies=from_environment(os.environ),
        certificates=certificates,
        auth_file=AuthFile(context.settings.auth_file),
    )


def _start_verifier(context: boot.Context[ImageSettings]) -> Verifier | None:
    """Only where the policy asks for signatures: it is a process more."""
    programs = programs_of(context.settings)
    if not (programs.gpgv or programs.openssl):
        return None
    own = next(uid for uid, kind in context.settings.uids.items() if kind == context.kind)
    return verifier.start(programs, context.settings.run_root, own)


def run(context: boot.Context[ImageSettings], state: State) -> None:
    """Serve until told to stop, or idle."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a pipe whose reader is gone is an error, not an end
    asyncio.run(_serve(context, state))


async def _serve(context: boot.Context[ImageSettings], state: State) -> None:
    service = Service(context.settings, state)
    front = boot_aio.AioService(
        context,
        service.handlers(),
        on_reload=service.reload,
        busy=lambda: service.busy,
        idle_exit=context.settings.idle_exit,
    )
    await front.start()
    watch = asyncio.create_task(_watch(service, front))
    try:
        await front.wait()
    finally:
        watch.cancel()
        service.close()


async def _watch(service: Service, front: boot_aio.AioService) -> None:
    await service.until_outdated()
    front.stop()
