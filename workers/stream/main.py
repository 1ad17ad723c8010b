"""Runs in: stream.

The worker's life and its whole API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from ipc.aio import Call
from ipc.messages import stream
from ipc.settings import StreamSettings
from ipc.table import ROOT, Handler, table
from ipc.tls import Certificates
from workers import boot, boot_aio
from workers.stream.server import StreamServer


def prepare(context: boot.Context[StreamSettings]) -> Certificates:
    """As root, before the sandbox: everything is imported, certificates are read (the key may be root's)."""
    certificates = Certificates(context.settings, context.log)
    certificates.context()
    return certificates


def run(context: boot.Context[StreamSettings], certificates: Certificates) -> None:
    """Inside the sandbox: serve until told to stop and every session has ended, or nobody asks any more."""
    asyncio.run(_serve(context, certificates))


async def _serve(context: boot.Context[StreamSettings], certificates: Certificates) -> None:
    server = StreamServer(context.settings, context.log, certificates)

    async def info_get(_call: Call, _body: stream.InfoGet) -> stream.StreamInfo:
        sessions = server.table()
        return stream.StreamInfo(sessions=len(sessions), table=sessions, connections=server.connections)

    handlers = table(Handler(stream.InfoGet, info_get, {ROOT}))
    service = boot_aio.AioService(
        context,
        handlers,
        on_stop=server.close,
        on_reload=lambda settings: _reload(context, service, settings),
        busy=server.busy,
        counters=lambda: {"lagged": server.lagged},
        idle_exit=context.settings.idle_exit,
        drain=server,
    )
    server.on_outdated = service.stop
    server.failed.add_done_callback(lambda _failed: service.stop())
    asyncio.get_running_loop().set_exception_handler(_Bugs(server))
    await service.start()
    if "http" in context.extra:
        server.start(context.extra["http"])
    await service.wait()
    if server.failed.done():
        server.failed.result()


def _reload(context: boot.Context[StreamSettings], service: boot_aio.AioService, settings: bytes) -> None:
    """With other settings the next connection is for another worker; sessions here keep theirs."""
    new = msgspec.msgpack.decode(settings, type=StreamSettings)
    if msgspec.structs.replace(new, log_level=context.settings.log_level) != context.settings:
        service.stop()


class _Bugs:
    """What a callback of the loop raises is a bug, and ends the worker; trouble of a socket is not."""

    def __init__(self, server: StreamServer) -> None:
        self._server = server

    def __call__(self, _loop: asyncio.AbstractEventLoop, about: Mapping[str, Any]) -> None:
        error = about.get("exception")
        if isinstance(error, Exception) and not isinstance(error, OSError) and not self._server.failed.done():
            self._server.failed.set_exception(error)
