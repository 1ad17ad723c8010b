"""Runs in: ops.

The worker's life and its whole API: the paths that it answers. It takes no messages from other processes.
On TCP it speaks TLS only, and whoever shows no certificate there is told little.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from ipc.errors import Code, RemoteError
from ipc.release import version
from ipc.settings import OpsSettings
from ipc.tls import Certificates
from workers import boot, boot_aio
from workers.ops import http1, metrics
from workers.ops.server import Below, Door, HttpServer, Route
from workers.ops.snapshot import Snapshot, Sources

#: Workers without which no pod can be run, and the states that say so.
VITAL = ("cri", "storage", "network")
SICK = frozenset({"starting", "backoff", "failed"})
GRACE = 5.0  # seconds for those who are being answered when the worker is told to stop


#: What a scraper on TCP gets whom no certificate tells from anybody else.
OPEN_PATHS = frozenset({"/metrics", "/healthz", "/readyz"})


@dataclass(frozen=True)
class Prepared:
    """What is read before the sandbox shuts."""

    release: str
    certificates: Certificates


def prepare(context: boot.Context[OpsSettings]) -> Prepared:
    """As root, before the sandbox: the release stands in a file, and the key of TLS may be root's."""
    certificates = Certificates(context.settings, context.log)
    try:
        certificates.context()
    except OSError as error:  # the Unix socket needs none
        context.log.error("no TLS: every client on TCP is refused", why=error)
    return Prepared(version(), certificates)


def run(context: boot.Context[OpsSettings], prepared: Prepared) -> None:
    """Inside the sandbox: answer until told to stop, or nobody asks any more."""
    asyncio.run(_serve(context, prepared))


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


def _doors(context: boot.Context[OpsSettings], certificates: Certificates) -> Iterator[Door]:
    yield Door(context.extra["http"])
    if "https" in context.extra:
        yield Door(
            context.extra["https"], certificates, None if context.settings.tls_client_ca else OPEN_PATHS
        )


def _reload(context: boot.Context[OpsSettings], service: boot_aio.AioService, settings: bytes) -> None:
    """With other settings the next connection is for another worker."""
    new = msgspec.msgpack.decode(settings, type=OpsSettings)
    if msgspec.structs.replace(new, log_level=context.settings.log_level) != context.settings:
        service.stop()


async def _serve(context: boot.Context[OpsSettings], prepared: Prepared) -> None:
    sources = Sources(context.settings)
    pages = Pages(sources, prepared.release)
    server = HttpServer(pages.routes(), pages.below(), context.log)
    service = boot_aio.AioService(
        context,
        {},
        on_stop=lambda: server.close(GRACE),
        on_reload=lambda settings: _reload(context, service, settings),
        busy=server.busy,
        idle_exit=context.settings.idle_exit,
    )
    server.failed.add_done_callback(lambda _failed: service.stop())
    server.on_outdated = service.stop
    await service.start()
    for door in _doors(context, prepared.certificates):
        server.open(door)
    await service.wait()
    await sources.close()
    if server.failed.done():
        server.failed.result()
