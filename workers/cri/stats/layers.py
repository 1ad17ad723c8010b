"""Runs in: cri. What containers' writable layers occupy, as storage last measured it.

Storage answers from memory, and is asked once for all, at most every few seconds. While it does not answer,
the figures of before stand, with the time at which they were true.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from ipc import log
from ipc.errors import RemoteError
from ipc.messages.storage import LayerUsage, UsageList
from workers.cri.node import Node
from workers.cri.state import Container

#: Seconds that an answer is good for, and how long stats wait for the next one.
FRESH = 3.0
TIMEOUT = 1.0


class Layers:
    """The last known figures, by container."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._known: dict[str, LayerUsage] = {}
        self._asked = -FRESH
        self._asking = asyncio.Lock()

    async def all(self, of: Iterable[Container] = ()) -> dict[str, LayerUsage]:
        """Figures of every container that storage has measured; asked anew if one of `of` is unknown."""
        async with self._asking:
            old = time.monotonic() - self._asked >= FRESH
            if old or any(container.id not in self._known for container in of):
                await self._ask()
        return self._known

    async def _ask(self) -> None:
        try:
            answer = await self._node.peers.storage.call(UsageList(), timeout=TIMEOUT)
        except RemoteError as error:
            log.get().debug("storage does not tell what layers occupy", text=error.text)
        else:
            fresh = {usage.container_id: usage for usage in answer.usages}
            # a worker that has just started has measured nothing yet
            old = {id_: usage for id_, usage in self._known.items() if id_ in self._node.store.containers}
            self._known = old | fresh
        self._asked = time.monotonic()
