"""Runs in: cri. What holds events back while a plugin is told of all that exists.

Events pass together; a synchronization waits until those that are under way are over, and holds up those
that come after it. Each side waits for plugins only as long as their time limits are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """A lock that many may share and one may have alone; whoever wants it alone is next."""

    def __init__(self) -> None:
        self._inside = 0
        self._alone = asyncio.Lock()
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Pass with others."""
        async with self._alone:
            self._inside += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Be alone."""
        async with self._alone:
            await self._empty.wait()
            yield
