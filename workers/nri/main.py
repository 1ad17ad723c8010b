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
from typing import Any

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
    service = boot_aio.AioService(
        context,
        handlers(plugins, Events(plugins, settings.validator)),
        doing=plugins.doing,
        on_stop=plugins.close,
    )
    bugs = Bugs(service)
    asyncio.get_running_loop().set_exception_handler(bugs)
    plugins.expect(len(prepared.launched))
    await service.start()
    for launched in prepared.launched:
        await plugins.welcome(launched.sock, launched)
    if "plugins" in context.extra:
        accept(context.extra["plugins"], plugins)
    idle = asyncio.create_task(_end_when_idle(settings, plugins, service))
    await service.wait()
    idle.cancel()
    bugs.raise_first()


def accept(listener: socket.socket, plugins: Plugins) -> None:
    """Take plugins that connect."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    tasks: set[asyncio.Task[None]] = set()

    def readable() -> None:
        for _ in range(ACCEPT_ONCE):
            with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                sock, _address = listener.accept()
                task = loop.create_task(plugins.welcome(sock))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                continue
            return

    loop.add_reader(listener.fileno(), readable)


async def _end_when_idle(settings: NriSettings, plugins: Plugins, service: boot_aio.AioService) -> None:
    if settings.needed:
        return
    last_busy = time.monotonic()
    while time.monotonic() - last_busy < settings.idle_exit:
        await asyncio.sleep(min(1.0, settings.idle_exit / 4))
        if plugins.connected:
            last_busy = time.monotonic()
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
