"""Runs in: stream.

The worker's life and its whole API.
"""

from __future__ import annotations

import asyncio

from ipc.aio import Call
from ipc.messages import stream
from ipc.settings import StreamSettings
from ipc.table import ROOT, Handler, table
from workers import boot, boot_aio


def prepare(_context: boot.Context[StreamSettings]) -> None:
    """As root, before the sandbox: everything is imported."""


def run(context: boot.Context[StreamSettings], _state: None) -> None:
    """Inside the sandbox: serve until told to stop, or nobody asks any more."""
    handlers = table(Handler(stream.InfoGet, info_get, {ROOT}))
    asyncio.run(boot_aio.serve_aio(context, handlers, idle_exit=context.settings.idle_exit))


async def info_get(_call: Call, _body: stream.InfoGet) -> stream.StreamInfo:
    """There is no protocol that could open a session."""
    return stream.StreamInfo(sessions=0)
