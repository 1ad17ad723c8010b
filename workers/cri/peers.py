"""Runs in: cri. The processes that cri asks, one client each.

Owns the connections. A leaf worker that dies is not noticed here but by latency: its socket stays, and
the clients send idempotent requests again (ipc.aio).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from ipc.errors import Code, RemoteError
from ipc.fds import FdSet
from ipc.messages import Body, Request
from ipc.settings import CriSettings
from workers.cri.stages import Client

R = TypeVar("R", bound=Body)
T = TypeVar("T")

#: Seconds for requests that only look something up or start something small.
SHORT = 30.0


class Peer(Protocol):
    """What this worker needs of a client; tests put fakes in its place."""

    async def call(
        self,
        request: Request[R],
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
        on_update: Callable[[Any], object] | None = None,
    ) -> R:
        """Send a request, return its reply. Raises RemoteError."""
        ...

    async def call_fds(
        self,
        request: Request[R],
        *,
        fds: Sequence[int] = (),
        timeout: float | None = None,
        on_update: Callable[[Any], object] | None = None,
    ) -> tuple[R, FdSet]:
        """As `call`, with the reply's descriptors."""
        ...

    async def connect(self) -> None:
        """Connect before there is something to ask. Raises RemoteError."""
        ...

    async def close(self) -> None:
        """End the connection."""
        ...

    def park(self, *, abandon: bool) -> None:
        """Ask nothing any more."""
        ...


class Peers:
    """One client for each process that cri may ask; those of monitors are made when they are needed."""

    def __init__(self, settings: CriSettings) -> None:
        self._settings = settings
        self.storage: Peer = Client(settings.ipc_socket("storage"))
        self.network: Peer = Client(settings.ipc_socket("network"))
        self.nri: Peer = Client(settings.ipc_socket("nri"))
        self.supervisor: Peer = Client(settings.ipc_socket("supervisor"))
        #: An idle connection would keep the pool's worker from its idle exit.
        self.image: Peer = Client(settings.ipc_socket("image"), idle_close=5.0)
        self._monitors: dict[str, Peer] = {}
        self._parked = False

    def monitor(self, container_id: str) -> Peer:
        """The client of a container's monitor."""
        client = self._monitors.get(container_id)
        if client is None:
            client = self._monitors[container_id] = self.connect_monitor(container_id)
        return client

    def connect_monitor(self, container_id: str) -> Peer:
        """A new client of a monitor's control socket."""
        # A connection keeps a process of the monitor's alive.
        client = Client(f"{self._settings.monitor_directory(container_id)}/ctl.sock", idle_close=1.0)
        if self._parked:
            client.park(abandon=False)
        return client

    async def forget_monitor(self, container_id: str) -> None:
        """The monitor is gone: end its connection."""
        client = self._monitors.pop(container_id, None)
        if client is not None:
            await client.close()

    def park(self) -> None:
        """Nothing more is asked of anybody; only monitors still finish what they do."""
        self._parked = True
        for client in (self.storage, self.network, self.nri, self.supervisor, self.image):
            client.park(abandon=True)
        for client in self._monitors.values():
            client.park(abandon=False)

    async def close(self) -> None:
        """End every connection."""
        monitors, self._monitors = list(self._monitors.values()), {}
        for client in (self.storage, self.network, self.nri, self.supervisor, self.image, *monitors):
            await client.close()


async def together(*steps: Coroutine[Any, Any, Any]) -> None:
    """Run steps at the same time. If one fails the others are cancelled; raises the first error."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task in done and not task.cancelled() and task.exception()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if failed:
        error = failed[0].exception()
        assert error is not None
        raise error


async def settle_all(*steps: Coroutine[Any, Any, Any]) -> None:
    """Run steps at the same time, all to their end; raises the first error after that."""
    results = await asyncio.gather(*steps, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def within(seconds: float, what: str, step: Coroutine[Any, Any, T]) -> T:
    """Await a step for at most so long; raises RemoteError(DEADLINE_EXCEEDED) that says what it was."""
    try:
        async with asyncio.timeout(seconds):
            return await step
    except TimeoutError:
        text = f"{what} took longer than {seconds:g} s"
        raise RemoteError(Code.DEADLINE_EXCEEDED, text) from None
