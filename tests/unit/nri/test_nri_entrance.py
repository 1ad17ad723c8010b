"""How plugins come in: none is taken by a worker that is about to end."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from ipc.log import Log
from ipc.settings import NriSettings
from tests.support.nri_plugin import Plugin
from workers.nri.main import Entrance, Stoppable, end_when_idle
from workers.nri.plugins import Plugins

SETTINGS = NriSettings(root="", run_root="", idle_exit=0.2, registration_timeout=5.0)


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(8)
    return listener


class Stopped(Stoppable):
    """A service that a plugin connects to in the moment that it is told to stop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.late: list[Plugin] = []

    def stop(self) -> None:
        self.late.append(Plugin(str(self.path)))


async def settled() -> None:
    """All that the loop has to do is done."""
    for _ in range(20):
        await asyncio.sleep(0.01)


def test_a_plugin_that_comes_when_the_worker_ends_waits_for_the_next_worker(tmp_path: Path) -> None:
    path = tmp_path / "nri.sock"
    listener = listening(path)
    service = Stopped(path)

    async def until_idle() -> int:
        plugins = Plugins(SETTINGS, "1", Log("test"))
        entrance = Entrance(listener, plugins)
        entrance.open()
        await end_when_idle(SETTINGS, plugins, entrance, service)
        await settled()
        return plugins.connected

    assert asyncio.run(until_idle()) == 0
    (late,) = service.late
    late.closed.wait(0.1)
    assert not late.closed.is_set(), "nobody has hung up"

    async def next_worker() -> int:
        plugins = Plugins(SETTINGS, "1", Log("test"))
        entrance = Entrance(listener, plugins)
        entrance.open()
        await settled()
        connected = plugins.connected
        entrance.shut()
        await plugins.close()
        return connected

    assert asyncio.run(next_worker()) == 1
    late.close()
    listener.close()


def test_a_worker_with_a_plugin_does_not_end(tmp_path: Path) -> None:
    path = tmp_path / "nri.sock"
    listener = listening(path)
    service = Stopped(path)

    async def serve() -> bool:
        plugins = Plugins(SETTINGS, "1", Log("test"))
        entrance = Entrance(listener, plugins)
        entrance.open()
        plugin = Plugin(str(path))
        idle = asyncio.create_task(end_when_idle(SETTINGS, plugins, entrance, service))
        await asyncio.wait({idle}, timeout=SETTINGS.idle_exit * 3)
        ended_early = idle.done()
        plugin._sock.shutdown(socket.SHUT_RDWR)
        await asyncio.wait_for(idle, 10)
        return ended_early

    assert asyncio.run(serve()) is False
    (late,) = service.late
    late.close()
    listener.close()
