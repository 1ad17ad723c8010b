"""Runs in: cri. What happened to single containers, for /metrics: OOM kills, and what their logs lost.

OOM kills are known here (stats/collect.py). Lost bytes of logs are known to the monitors, who would each
have to wake up to tell: they are asked while somebody reads metrics, a few at a time and once in five
minutes. Owns the last answers. Containers of which there is nothing to tell are left out.
"""

from __future__ import annotations

import asyncio
import time

from ipc import log
from ipc.errors import RemoteError
from ipc.messages import monitor
from ipc.messages.cri import ContainerCount
from workers.cri.node import Node
from workers.cri.state import Container, Phase, Pod
from workers.cri.stats.collect import Stats

#: Seconds between two rounds of questions, and for each; monitors that are asked at a time.
PERIOD, TIMEOUT, AT_ONCE = 300.0, 5.0, 4


class Counts:
    """Counts by container."""

    def __init__(self, node: Node, stats: Stats) -> None:
        self._node = node
        self._stats = stats
        self._dropped: dict[str, int] = {}
        self._unsure: dict[str, int] = {}
        self.dropped_total = self.unsure_total = 0
        self._asked = -PERIOD

    def all(self) -> list[ContainerCount]:
        """What there is to tell, attempts of one container together."""
        self._ask_again()
        store = self._node.store
        found: dict[tuple[str, str, str], ContainerCount] = {}
        for container in (one for one in store.containers.values() if one.phase is not Phase.GONE):
            ooms, dropped = self._stats.look_for_oom(container), self._dropped.get(container.id, 0)
            unsure = self._unsure.get(container.id, 0)
            pod = store.pods.get(container.record.pod_id)
            if pod is not None and (ooms or dropped or unsure):
                meta = pod.config.metadata
                own = container.config.metadata.name
                fresh = ContainerCount(namespace=meta.namespace, pod=meta.name, container=own)
                count = found.setdefault((meta.namespace, meta.name, own), fresh)
                count.oom_kills += ooms
                count.log_bytes_dropped += dropped
                count.log_bytes_unsure += unsure
        return list(found.values())

    def changed(self, subject: Pod | Container, *, gone: bool) -> None:
        """Told by the store."""
        if gone:
            self._dropped.pop(subject.id, None)
            self._unsure.pop(subject.id, None)

    def _ask_again(self) -> None:
        if time.monotonic() - self._asked >= PERIOD:
            self._asked = time.monotonic()
            self._node.operations.background("ask monitors for lost log", self.ask())

    async def ask(self) -> None:
        """Ask every monitor how much its log has lost."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(container: Container) -> None:
            async with slots:
                await self._ask_one(container)

        running = [one for one in self._node.store.containers.values() if one.phase is Phase.RUNNING]
        await asyncio.gather(*map(one, running))

    async def _ask_one(self, container: Container) -> None:
        try:
            client = self._node.peers.monitor(container.id)
            told = await client.call(monitor.StateGet(), timeout=TIMEOUT)
        except RemoteError as error:
            log.get().debug("a monitor does not tell its counts", container=container.id, text=error.text)
            return
        if container.id in self._node.store.containers:
            self.dropped_total += _grown(self._dropped, container.id, told.log_bytes_dropped)
            self.unsure_total += _grown(self._unsure, container.id, told.log_bytes_unsure)


def _grown(known: dict[str, int], container_id: str, told: int) -> int:
    """Note a count; return by how much it has grown."""
    before = known.get(container_id, 0)
    if told:
        known[container_id] = told
    return max(0, told - before)
