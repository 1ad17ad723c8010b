"""Runs in: cri.

What an RPC waits for: whatever is asked of another process on its behalf is noted while it is asked, so
that health answers and the log can name the stage of an RPC that takes long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from ipc import aio
from ipc.fds import FdSet
from ipc.messages import Body, Request

R = TypeVar("R", bound=Body)

#: The names of the messages that the RPC in whose context we are waits for; None outside of any.
waits: ContextVar[list[str] | None] = ContextVar("waits", default=None)


class Client(aio.Client):
    """A client that notes what is asked."""

    async def call_fds(
        self,
        request: Request[R],
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
        on_update: Callable[[Any], object] | None = None,
    ) -> tuple[R, FdSet]:
        """As aio.Client.call_fds."""
        noted = waits.get()
        if noted is None:
            return await super().call_fds(request, fds=fds, timeout=timeout, on_update=on_update)
        noted.append(type(request).NAME)
        try:
            return await super().call_fds(request, fds=fds, timeout=timeout, on_update=on_update)
        finally:
            noted.remove(type(request).NAME)
