"""Runs in: nri.

The worker's life and its whole API. It is started by the first plugin that connects, or at once where
plugins are pre-installed or a validator is configured; with nobody left it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ipc.messages import nri as messages
from ipc.release import version
from ipc.settings import NriSettings
from ipc.table import Handler, Handlers, table
from workers import boot, boot_aio
from workers.nri import launch
from workers.nri.events import Events
from workers.nri.plugins import Plugins

ACCEPT_ONCE = 16
_CRI = frozenset({"cri"})


def handlers(plugins: Plugins, events: Events) -> Handlers:
    """Messages of other processes."""
    return table(
        Handler(messages.SessionOpen, plugins.session_open, _CRI),
        Handler(messages.StatePut, plugins.state_put, _CRI),
        Handler(messages.WishesDone, plugins.wishes_done, _CRI),
        Handler(messages.PodEvent, events.pod_event, _CRI),
        Handler(messages.ContainerEvent, events.container_event, _CRI),
        Handler(messages.ContainerCreate, events.container_create, _CRI),
        Handler(messages.ContainerUpdate, events.container_update, _CRI),
    )


@dataclass(frozen=True)
class Prepared:
    """What only root can do and read."""

    version: str
    launched: list[launch.Launched]


def prepare(context: boot.Context[NriSettings]) -> Prepared:
    """As root, before the sandbox: start the plugins that are installed."""
    settings = context.settings
    started = launch.start_all(settings.plugin_dir, settings.plugin_config_dir, context.log)
    return Prepared(version(), started)


def run(context: boot.Context[NriSettings], prepared: Prepared) -> None:
    """Inside the sandbox: serve until told to stop, or no plugin is left."""
    asyncio.run(_serve(context, prepared))


async def _serve(context: boot.Context[NriSettings], prepared: Prepared) -> None:
    settings = context.settings
    plugins = Plugins(settings, prepared.version, context.log)
    entrance = Entrance(context.extra.get("plugins"), plugins)

    async def close() -> None:
        entrance.shut()
        await plugins.close()

    service = boot_aio.AioService(
        context,
        handlers(plugins, Events(plugins, settings.validator)),
        doing=plugins.doing,
        on_stop=close,
    )
    bugs = Bugs(service)
    asyncio.get_running_loop().set_exception_handler(bugs)
    plugins.expect(len(prepared.launched))
    await service.start()
    for launched in prepared.launched:
        await plugins.welcome(launched.sock, launched)
    entrance.open()
    idle = asyncio.create_task(end_when_idle(settings, plugins, entrance, service))
    await service.wait()
    idle.cancel()
    bugs.raise_first()


class Stoppable(Protocol):
    """What ends when nobody is left."""

    def stop(self) -> None:
        """Make it end."""


class Entrance:
    """Takes plugins that connect. While it is shut they wait in the kernel's queue, if need be for the next
    worker."""

    def __init__(self, listener: socket.socket | None, plugins: Plugins) -> None:
        self._listener = listener
        self._plugins = plugins
        self._loop = asyncio.get_running_loop()
        self._coming: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Accept."""
        if self._listener is not None:
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener.fileno(), self._accept, self._listener)

    def shut(self) -> None:
        """Accept no more."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())

    @property
    def busy(self) -> bool:
        """Whether somebody has been accepted who is not among the plugins yet."""
        return bool(self._coming)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPT_ONCE):
            with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                sock, _address = listener.accept()
                task = self._loop.create_task(self._plugins.welcome(sock))
                self._coming.add(task)
                task.add_done_callback(self._coming.discard)
                continue
            return


async def end_when_idle(
    settings: NriSettings, plugins: Plugins, entrance: Entrance, service: Stoppable
) -> None:
    """Stop the service when no plugin has been there for `idle_exit` seconds, if it may end at all."""
    if settings.needed:
        return
    last_busy = time.monotonic()
    while time.monotonic() - last_busy < settings.idle_exit:
        await asyncio.sleep(min(1.0, settings.idle_exit / 4))
        if plugins.connected or entrance.busy:
            last_busy = time.monotonic()
    entrance.shut()  # in the same step: whoever comes from now on is the next worker's
    service.stop()


class Bugs:
    """What a task or a callback of the loop raises is a bug, and ends the worker."""

    def __init__(self, service: boot_aio.AioService) -> None:
        self._service = service
        self._first: BaseException | None = None

    def __call__(self, _loop: asyncio.AbstractEventLoop, about: Mapping[str, Any]) -> None:
        error = about.get("exception")
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self._first = self._first or error
            self._service.stop()

    def raise_first(self) -> None:
        """Raise the first of them, if there was one."""
        if self._first is not None:
            raise self._first
