"""Runs in: cri. What every service of this worker shares: settings, state, peers, running operations,
and the facts of the host, asked once of the supervisor.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ipc.errors import invalid
from ipc.messages.storage import IdmapProbe, IdmapSupport
from ipc.messages.supervisor import HostInfo, HostInfoGet, RuntimeInfo
from ipc.settings import CriSettings, Runtime
from workers.cri.operations import Operations
from workers.cri.peers import SHORT, Peers
from workers.cri.plugins import Plugins
from workers.cri.state import Store


@dataclass
class Node:
    """The shared parts. `node_name` is the host's name: that of pods in the host's network."""

    settings: CriSettings
    store: Store
    peers: Peers
    node_name: str
    plugins: Plugins = field(default_factory=Plugins)
    operations: Operations = field(default_factory=Operations)
    _host: HostInfo | None = None
    _idmap: IdmapSupport | None = None
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _open: bool = False

    async def host(self, timeout: float = SHORT) -> HostInfo:
        """The host's facts. Raises RemoteError if the supervisor does not answer."""
        async with self._asking:
            if self._host is not None:
                return self._host
            settings = self.settings
            host = await self.peers.supervisor.call(HostInfoGet(), timeout=timeout)
            if settings is self.settings:  # else it may not know the runtimes that are configured now
                self._host = host
            return host

    async def idmap(self, timeout: float = SHORT) -> IdmapSupport:
        """Whether this node can have pods with a user namespace. Raises RemoteError if storage is silent."""
        if self._idmap is None:
            self._idmap = await self.peers.storage.call(IdmapProbe(), timeout=timeout)
        return self._idmap

    def reload(self, settings: CriSettings) -> None:
        """The configuration changed; the facts of the host may name other runtimes."""
        self.settings = settings
        if self._open:
            self.plugins.reload(settings)
        self._host = self._idmap = None

    def let_go(self) -> None:
        """Another worker owns the state from now on, and finishes what has begun: nothing is asked and
        nothing is written here any more. What still runs stands still, or comes to its end in memory."""
        self.operations.let_go()
        self.peers.park()
        self.store.let_go()

    def open_to_plugins(self) -> None:
        """The state is whole, plugins may be told of it. Newer settings may have come before."""
        self._open = True
        self.plugins.reload(self.settings)

    def runtime(self, handler: str) -> Runtime:
        """The configured runtime of a CRI runtime handler, "" being the default one.

        Raises RemoteError(INVALID_ARGUMENT).
        """
        name = handler or self.settings.default_runtime
        for runtime in self.settings.runtimes:
            if runtime.name == name:
                return runtime
        known = ", ".join(sorted(runtime.name for runtime in self.settings.runtimes)) or "none"
        raise invalid(f"no runtime handler is named {name[:80]!r}; configured are: {known}")

    async def runtime_info(self, handler: str) -> RuntimeInfo:
        """What the supervisor found out about a handler's runtime."""
        runtime = self.runtime(handler)
        for info in (await self.host()).runtimes:
            if info.name == runtime.name:
                return info
        return RuntimeInfo(name=runtime.name, path=runtime.path)
