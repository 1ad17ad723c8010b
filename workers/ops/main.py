"""Runs in: ops.

The worker's life and its whole API: the paths that it answers. It takes no messages from other processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec

from ipc.errors import Code, RemoteError
from ipc.release import version
from ipc.settings import OpsSettings
from workers import boot, boot_aio
from workers.ops import http1, metrics
from workers.ops.server import Below, HttpServer, Route
from workers.ops.snapshot import Snapshot, Sources

#: Workers without which no pod can be run, and the states that say so.
VITAL = ("cri", "storage", "network")
SICK = frozenset({"starting", "backoff", "failed"})
GRACE = 5.0  # seconds for those who are being answered when the worker is told to stop


def prepare(_context: boot.Context[OpsSettings]) -> str:
    """As root, before the sandbox: which release this is stands in a file."""
    return version()


def run(context: boot.Context[OpsSettings], release: str) -> None:
    """Inside the sandbox: answer until told to stop, or nobody asks any more."""
    asyncio.run(_serve(context, release))


class Pages:
    """What is answered."""

    def __init__(self, sources: Sources, release: str) -> None:
        self._sources = sources
        self._release = release

    def routes(self) -> Mapping[str, Route]:
        """The table of paths."""
        return {
            "/metrics": self._metrics,
            "/workers": self._workers,
            "/info": self._info,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/config": self._config,
        }

    def below(self) -> Mapping[str, Below]:
        """The table of paths that have others below them."""
        return {"/containers/": self._container}

    async def _metrics(self) -> http1.Response:
        """Prometheus metrics; what is not known is left out, `bulkhead_source_up` says of whom."""
        snapshot = await self._sources.take()
        return http1.Response(metrics.render(snapshot, self._release), metrics.CONTENT_TYPE)

    async def _workers(self) -> http1.Response:
        """Every process of the map, with what /proc tells anybody of it."""
        snapshot = await self._sources.take(cri=False)
        facts = {str(pid): msgspec.to_builtins(process) for pid, process in snapshot.processes.items()}
        return _json({"workers": snapshot.workers, "processes": facts}, snapshot)

    async def _info(self) -> http1.Response:
        """The node and the state of pods, containers and pulls in numbers."""
        snapshot = await self._sources.take(host=True)
        return _json({"version": self._release, "host": snapshot.host, "cri": snapshot.cri}, snapshot)

    async def _healthz(self) -> http1.Response:
        """200 if the supervisor and cri answer, 503 with the reason if not."""
        snapshot = await self._sources.take()
        if not snapshot.trouble:
            return http1.Response(b"ok\n")
        lines = "".join(f"{name}: {why}\n" for name, why in sorted(snapshot.trouble.items()))
        return http1.Response(lines.encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)

    async def _readyz(self) -> http1.Response:
        """200 if pods can be run, 503 with the reason if not."""
        snapshot = await self._sources.take()
        wrong = [f"{name}: {why}" for name, why in sorted(snapshot.trouble.items())]
        sick = [worker for worker in snapshot.workers if worker.kind in VITAL and worker.state in SICK]
        wrong += [f"{worker.kind}: {worker.state} ({worker.last_death})" for worker in sick]
        if not wrong:
            return http1.Response(b"ok\n")
        return http1.Response("\n".join([*wrong, ""]).encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)

    async def _config(self) -> http1.Response:
        """The configuration in force, as TOML; there are no secrets in it."""
        try:
            return http1.Response((await self._sources.config()).encode(), "application/toml")
        except RemoteError as error:
            raise _refused(error) from error

    async def _container(self, id_: str) -> http1.Response:
        """One container, by its id or the beginning of it."""
        try:
            facts = await self._sources.container(id_)
        except RemoteError as error:
            raise _refused(error) from error
        encoded = msgspec.json.format(msgspec.json.encode(facts), indent=1)
        return http1.Response(encoded + b"\n", "application/json")


def _refused(error: RemoteError) -> http1.Refused:
    found = HTTPStatus.NOT_FOUND if error.code is Code.NOT_FOUND else HTTPStatus.SERVICE_UNAVAILABLE
    return http1.Refused(found, error.text)


def _json(body: dict[str, Any], snapshot: Snapshot) -> http1.Response:
    """A JSON object; 503 if somebody who should have been heard did not answer."""
    status = HTTPStatus.SERVICE_UNAVAILABLE if snapshot.trouble else HTTPStatus.OK
    encoded = msgspec.json.encode({**body, "trouble": snapshot.trouble})
    return http1.Response(msgspec.json.format(encoded, indent=1) + b"\n", "application/json", status)


async def _serve(context: boot.Context[OpsSettings], release: str) -> None:
    sources = Sources(context.settings)
    pages = Pages(sources, release)
    server = HttpServer(pages.routes(), pages.below())
    service = boot_aio.AioService(
        context,
        {},
        on_stop=lambda: server.close(GRACE),
        busy=server.busy,
        idle_exit=context.settings.idle_exit,
    )
    server.failed.add_done_callback(lambda _failed: service.stop())
    await service.start()
    await server.start(context.extra["http"])
    await service.wait()
    await sources.close()
    if server.failed.done():
        server.failed.result()
