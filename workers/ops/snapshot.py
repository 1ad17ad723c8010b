"""Runs in: ops.

What is known at one moment: asked of the supervisor and of cri, both at once, each with a deadline. One that
does not answer makes its part missing, never the whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ipc import aio
from ipc.errors import RemoteError
from ipc.messages import Body, Request
from ipc.messages.cri import ContainerFacts, ContainerGet, CriInfo, InfoGet
from ipc.messages.supervisor import ConfigGet, HostInfo, HostInfoGet, WorkerList, WorkersListed, WorkerState
from ipc.settings import OpsSettings
from workers.ops import processes

R = TypeVar("R", bound=Body)

TIMEOUT = 5.0
IDLE_CLOSE = 30.0


@dataclass(frozen=True)
class Snapshot:
    """`trouble` says by name who did not answer, and why; what is theirs is then None or empty."""

    workers: list[WorkerState] = field(default_factory=list)
    processes: dict[int, processes.Process] = field(default_factory=dict)
    cri: CriInfo | None = None
    host: HostInfo | None = None
    trouble: dict[str, str] = field(default_factory=dict)


class Sources:
    """The connections to those who know."""

    def __init__(self, settings: OpsSettings) -> None:
        self._supervisor = aio.Client(settings.ipc_socket("supervisor"), idle_close=IDLE_CLOSE)
        self._cri = aio.Client(settings.ipc_socket("cri"), idle_close=IDLE_CLOSE)

    async def take(self, *, host: bool = False, cri: bool = True) -> Snapshot:
        """Ask; `host` and `cri` say whether those parts are wanted."""
        trouble: dict[str, str] = {}

        async def ask(name: str, client: aio.Client, request: Request[R]) -> R | None:
            try:
                return await client.call(request, timeout=TIMEOUT)
            except RemoteError as error:
                trouble[name] = error.text
                return None

        async def nothing() -> None:
            return None

        listed, info, facts = await asyncio.gather(
            ask("supervisor", self._supervisor, WorkerList()),
            ask("cri", self._cri, InfoGet()) if cri else nothing(),
            ask("supervisor", self._supervisor, HostInfoGet()) if host else nothing(),
        )
        workers = listed.workers if isinstance(listed, WorkersListed) else []
        return Snapshot(
            workers=workers,
            processes=_processes(workers, processes.read),
            cri=info,
            host=facts,
            trouble=trouble,
        )

    async def container(self, id_: str) -> ContainerFacts:
        """One container. Raises RemoteError."""
        return await self._cri.call(ContainerGet(id=id_), timeout=TIMEOUT)

    async def config(self) -> str:
        """The configuration in force, as TOML. Raises RemoteError."""
        return (await self._supervisor.call(ConfigGet(), timeout=TIMEOUT)).text

    async def close(self) -> None:
        """End the connections."""
        await self._supervisor.close()
        await self._cri.close()


def _processes(
    workers: list[WorkerState], read: Callable[[int], processes.Process | None]
) -> dict[int, processes.Process]:
    found = {worker.pid: read(worker.pid) for worker in workers if worker.pid}
    return {pid: process for pid, process in found.items() if process is not None}
