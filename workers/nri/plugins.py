"""Runs in: nri. All plugins: how they come, join and go, and what they ask out of turn.

Owns the list of plugins and the turn: one event (events.py), or one synchronization, at a time. cri holds
its own operations back while a plugin is being synchronized, so that a container is in what that plugin is
told first, or is told to it as an event, and never both or neither.
"""

from __future__ import annotations

import asyncio
import socket

from ipc.aio import Call
from ipc.errors import not_found
from ipc.log import Log
from ipc.messages import Empty
from ipc.messages import nri as messages
from ipc.nri import nri_pb2 as pb
from ipc.settings import NriSettings

from . import ttrpc
from .connection import LEFT, Connection, Gone, Refused
from .launch import Launched
from .plugin import Plugin, Terms
from .result import to_eviction, to_update
from .session import NoSession, Session, Sessions, State, first

MAX_PLUGINS = 64
SHUTDOWN_TIMEOUT = 0.5
LONGEST_DELAY = 30.0
MAX_NAMES = 1024  # that are remembered for their failures


class Patience:
    """Plugins that fail to be synchronized hold everybody up each time: they wait longer and longer."""

    def __init__(self) -> None:
        self._failures: dict[str, int] = {}

    def delay(self, name: str) -> float:
        """Seconds before a plugin of that name is synchronized."""
        failures = self._failures.get(name, 0)
        return min(2.0 ** (failures - 1), LONGEST_DELAY) if failures else 0.0

    def lost(self, name: str) -> None:
        """It could not be synchronized."""
        if name in self._failures or len(self._failures) < MAX_NAMES:
            self._failures[name] = min(self._failures.get(name, 0) + 1, 16)

    def won(self, name: str) -> None:
        """It could."""
        self._failures.pop(name, None)


class Plugins:
    """Everybody who is connected, and those of them who are asked (`active`), in order of their index."""

    def __init__(self, settings: NriSettings, version: str, log: Log) -> None:
        self.active: list[Plugin] = []
        self.sessions = Sessions()
        self._settings = settings
        self._terms = Terms("bulkhead", version, settings.registration_timeout, settings.request_timeout)
        self._log = log
        self._connected: dict[Plugin, asyncio.Task[None]] = {}
        self._states: dict[int, tuple[Plugin, State]] = {}
        self.turn = asyncio.Lock()
        self._patience = Patience()
        self._expected = 0  # pre-installed plugins that have neither joined nor failed

    # -- coming and going -----------------------------------------------------------------------------

    @property
    def connected(self) -> int:
        """How many plugins are connected, those that have not joined yet too."""
        return len(self._connected)

    def doing(self) -> str:
        """For the list of workers."""
        return " ".join(plugin.name for plugin in self.active)

    async def welcome(self, sock: socket.socket, launched: Launched | None = None) -> None:
        """Take a connection over; `launched` if we started the plugin."""
        if len(self._connected) >= MAX_PLUGINS:
            self._log.warning("a plugin is turned away", why=f"there are {MAX_PLUGINS} already")
            sock.close()
            return
        plugin = Plugin(self._terms, self._grant, self._gone)
        if launched is not None:
            plugin.preinstalled = plugin.expected = True
            plugin.config = launched.config
            plugin.index, plugin.base = launched.index, launched.base
        plugin.connection = Connection(plugin.serve, plugin.is_gone)
        self._connected[plugin] = asyncio.get_running_loop().create_task(self._life(plugin))
        await plugin.connection.take(sock)

    def expect(self, number: int) -> None:
        """So many pre-installed plugins are coming: nothing is ready before they are."""
        self._expected = number

    async def _life(self, plugin: Plugin) -> None:
        """Join, and be synchronized with each cri that comes; ended by `_gone`."""
        try:
            await plugin.join()
            await asyncio.sleep(self._patience.delay(plugin.name))
            session: Session | None = None
            while True:
                session = await self.sessions.after(session)
                await self._synchronize(plugin, session)
                self._arrived(plugin)
        except Gone:
            pass  # `_gone` has said it
        except Refused as error:
            plugin.connection.close(f"it could not be configured: {error.text}")

    def _arrived(self, plugin: Plugin) -> None:
        """A pre-installed plugin has joined, or never will."""
        if plugin.preinstalled and plugin.expected:
            plugin.expected = False
            self._expected -= 1
            self._tell_ready()

    def _tell_ready(self) -> None:
        if not self._expected and self.sessions.current is not None:
            self.sessions.current.tell(messages.Ask(kind="ready"))

    def _gone(self, plugin: Plugin, why: str) -> None:
        level = self._log.info if why == LEFT else self._log.warning
        level("plugin disconnected", plugin=plugin.name, why=why)
        task = self._connected.pop(plugin)
        if plugin in self.active:
            self.active.remove(plugin)
        if task is not asyncio.current_task():
            task.cancel()
        for other, state in self._states.values():
            if other is plugin:
                state.done.set()
        self._arrived(plugin)

    async def close(self) -> None:
        """Tell plugins of the end, let them and cri go."""
        self.sessions.end()
        plugins = list(self._connected)
        await asyncio.gather(*(self._shut_down(plugin) for plugin in plugins))
        for plugin in plugins:
            plugin.connection.close("this worker ends")

    async def _shut_down(self, plugin: Plugin) -> None:
        if plugin.configured:
            try:
                await plugin.connection.call("Shutdown", pb.Empty(), pb.Empty, SHUTDOWN_TIMEOUT)
            except (Gone, Refused) as error:
                self._log.debug("plugin did not take its leave", plugin=plugin.name, why=error)

    # -- cri's session --------------------------------------------------------------------------------

    async def session_open(self, call: Call, _body: messages.SessionOpen) -> Empty:
        """Hold the standing call of cri."""
        return await self.sessions.hold(call, lambda _session: self._tell_ready())

    async def _synchronize(self, plugin: Plugin, session: Session) -> None:
        """Have cri send the state, and wait until the plugin has it or cri is gone."""
        number, state = self.sessions.number(), State(session)
        self._states[number] = plugin, state
        try:
            session.tell(messages.Ask(kind="synchronize", number=number, plugin=plugin.name))
            await first(state.done, session.ended)
        finally:
            del self._states[number]

    async def state_put(self, _call: Call, body: messages.StatePut) -> messages.Wishes:
        """A piece of the state; with the last one the plugin is synchronized."""
        plugin, state = self._states.get(body.number, (None, None))
        if plugin is None or state is None:
            raise not_found("the plugin is gone")
        state.add(body.pods, body.containers)
        if body.more:
            return messages.Wishes()
        async with self.turn:
            updates = await self._deliver(plugin, state)
        return messages.Wishes(updates=[to_update(one) for one in updates])

    async def _deliver(self, plugin: Plugin, state: State) -> list[pb.ContainerUpdate]:
        try:
            updates = await plugin.synchronize(state.pods, state.containers)
        except Gone:
            self._patience.lost(plugin.name)
            return []
        except Refused as error:
            self._patience.lost(plugin.name)
            plugin.connection.close(f"it could not be synchronized: {error.text}")
            return []
        finally:
            state.done.set()
        self._patience.won(plugin.name)
        if plugin not in self.active:
            self.active = sorted([*self.active, plugin], key=lambda one: one.index)
            self._log.info("plugin joined", plugin=plugin.name, pods=len(state.pods))
        return updates

    async def _grant(
        self, plugin: Plugin, request: pb.UpdateContainersRequest
    ) -> pb.UpdateContainersResponse:
        """A plugin wants something out of turn. Raises Refused."""
        wishes = messages.Wishes(
            updates=[to_update(one) for one in request.update],
            evictions=[to_eviction(one) for one in request.evict],
        )
        try:
            done = await self.sessions.grant(plugin.name, wishes)
        except NoSession:
            raise Refused(ttrpc.Status.UNAVAILABLE, "the runtime is not there, try again") from None
        if done.error:
            raise Refused(ttrpc.Status.UNKNOWN, done.error)
        failed = [one for one in request.update if one.container_id in done.failed]
        return pb.UpdateContainersResponse(failed=failed)

    async def wishes_done(self, _call: Call, body: messages.WishesDone) -> Empty:
        """What became of it."""
        self.sessions.granted(body)
        return Empty()
