"""The image worker as a process in its real sandbox: what it serves, to whom, and when it ends."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc import aio
from ipc.errors import Code, RemoteError
from ipc.fds import FdSet
from ipc.messages import control
from ipc.messages.image import (
    Auth,
    Fetched,
    ManifestResolve,
    Progress,
    ReferenceNormalise,
    RegistriesReload,
)
from tests.support.fault_registry import FaultRegistry
from tests.support.image_client import Pipe, blob_request
from tests.support.image_worker import Worker, acting_as
from tests.support.registry import (
    Authority,
    Registry,
    TokenServer,
    insecure_registries,
    layer_of_tar,
    make_image,
    push,
)
from tests.support.sandboxed import Host, host

LAYER = layer_of_tar(os.urandom(5_000_000), "")
IMAGE = make_image([LAYER])


@pytest.fixture
def where() -> Iterator[Host]:
    with host() as here:
        yield here


async def fetch_layer(client: aio.Client, name: str, auth: Auth | None = None) -> bytes:
    found = await client.call(ManifestResolve(reference=name, auth=auth), timeout=20)
    pipe = Pipe()
    fetched = await client.call(blob_request(found, found.layers[0], auth), fds=[pipe.write_fd], timeout=20)
    assert fetched == Fetched(bytes=len(LAYER.data))
    return await asyncio.to_thread(pipe.data)


def test_a_pull_over_tls_with_a_token_works_inside_the_sandbox(where: Host, tmp_path: Path) -> None:
    async def scenario() -> None:
        worker = Worker(where)
        async with worker.running() as client:
            assert worker.report.uid != 0
            assert not worker.report.capabilities
            auth = Auth(username="user", password="secret")
            assert await fetch_layer(client, f"{tls.address}/test/image:1") == LAYER.data
            assert await fetch_layer(client, f"{tokens.address}/test/image:1", auth) == LAYER.data
            with pytest.raises(RemoteError) as caught:
                await client.call(ManifestResolve(reference=f"{tls.address}/test/image:2"), timeout=20)
            assert caught.value.code is Code.NOT_FOUND
            with pytest.raises(RemoteError, match="cannot resolve the name") as caught:
                await client.call(ManifestResolve(reference="registry.invalid/x:1"), timeout=20)
            assert caught.value.reason == "RegistryUnavailable"
        assert "late imports" not in worker.stderr

    authority = Authority(tmp_path / "ca")
    with (
        TokenServer(tmp_path / "tokens", username="user", password="secret") as server,
        Registry(tmp_path / "one", tls=authority.issue("server"), host="localhost") as tls,
        Registry(tmp_path / "two", tokens=server) as tokens,
    ):
        for registry in (tls, tokens):
            push(registry, "test/image", "1", IMAGE)
        directory = where.base / "certs.d" / tls.address
        directory.mkdir()
        shutil.copy(authority.certificate, directory / "ca.crt")
        insecure_registries(where.base / "registries.conf", tokens.address)
        asyncio.run(scenario())


def test_keys_and_passwords_that_only_root_may_read_are_used(where: Host, tmp_path: Path) -> None:
    async def scenario() -> None:
        worker = Worker(where, auth_file=str(auth_file))
        async with worker.running() as client:
            for registry in (keyed, guarded):
                assert await fetch_layer(client, f"{registry.address}/test/image:1") == LAYER.data
            write_auth("wrong")  # in place: seen at once
            with pytest.raises(RemoteError) as caught:
                await client.call(ManifestResolve(reference=f"{guarded.address}/test/image:1"))
            assert caught.value.code is Code.UNAUTHENTICATED
            (directory / "client.key").write_bytes(client_certificate.key.read_bytes() + b"\n")
            with pytest.raises(RemoteError, match=r"cannot read .*client\.key"):
                await client.call(ManifestResolve(reference=f"{keyed.address}/test/image:1"))
            assert await worker.wait() == 0  # the next one reads it as root
        worker = Worker(where, auth_file=str(auth_file))
        async with worker.running() as client:
            assert await fetch_layer(client, f"{keyed.address}/test/image:1") == LAYER.data
            auth_file.unlink()
            write_auth("secret")  # another file
            assert await worker.wait() == 0

    def write_auth(password: str) -> None:
        entry = {"username": "user", "password": password}
        auth_file.write_text(json.dumps({"auths": {guarded.address: entry}}))
        auth_file.chmod(0o600)

    authority = Authority(tmp_path / "ca")
    client_certificate = authority.issue("client")
    auth_file = where.base / "auth.json"
    with (
        Registry(tmp_path / "a", tls=authority.issue("a"), client_ca=authority.certificate) as keyed,
        Registry(tmp_path / "b", users={"user": "secret"}) as guarded,
    ):
        push(keyed, "test/image", "1", IMAGE, client=client_certificate)
        push(guarded, "test/image", "1", IMAGE)
        directory = where.base / "certs.d" / keyed.address
        directory.mkdir()
        shutil.copy(authority.certificate, directory / "ca.crt")
        shutil.copy(client_certificate.certificate, directory / "client.cert")
        shutil.copy(client_certificate.key, directory / "client.key")
        (directory / "client.key").chmod(0o600)
        insecure_registries(where.base / "registries.conf", guarded.address)
        write_auth("secret")
        asyncio.run(scenario())


def test_only_cri_may_ask(where: Host) -> None:
    async def scenario() -> None:
        worker = Worker(where)
        async with worker.running() as client:
            request = ReferenceNormalise(reference="busybox")
            assert (await client.call(request)).reference == "docker.io/library/busybox:latest"
            os.chown(worker.path, 61004, -1)
            for kind in ("ops", None):
                other = aio.Client(worker.path)
                if kind is not None:
                    with acting_as(kind):
                        await other._connect(None)
                with pytest.raises(RemoteError) as caught:
                    await other.call(request)
                assert caught.value.code is Code.PERMISSION_DENIED
                await other.close()

    asyncio.run(scenario())


def test_a_caller_that_goes_away_ends_its_download(where: Host) -> None:
    async def scenario() -> None:
        worker = Worker(where)
        async with worker.running() as client:
            found = await client.call(ManifestResolve(reference=f"{registry.address}/test/image:1"))
            registry.on(LAYER.digest, registry.hanging(100_000))
            read_fd, write_fd = os.pipe()
            call = asyncio.create_task(
                client.call(blob_request(found, found.layers[0]), fds=[write_fd], timeout=20)
            )
            assert await asyncio.to_thread(os.read, read_fd, 1)
            assert worker.control is not None
            health, _ = await worker.control.ask(control.Ping(), FdSet(), None)
            assert [request.doing for request in health.requests] == [f"fetching {LAYER.digest}"]
            call.cancel()
            begun = time.monotonic()
            while await asyncio.to_thread(os.read, read_fd, 1 << 20):
                pass
            assert time.monotonic() - begun < 0.5
            os.close(read_fd)

    with FaultRegistry(IMAGE) as registry:
        insecure_registries(where.base / "registries.conf", registry.address)
        asyncio.run(scenario())


def test_a_deadline_and_a_missing_pipe_are_answered(where: Host) -> None:
    async def scenario() -> None:
        worker = Worker(where)
        async with worker.running() as client:
            found = await client.call(ManifestResolve(reference=f"{registry.address}/test/image:1"))
            request = blob_request(found, found.layers[0])
            with pytest.raises(RemoteError, match="must bring the pipe") as caught:
                await client.call(request)
            assert caught.value.code is Code.INVALID_ARGUMENT
            with pytest.raises(RemoteError, match="no pipe"):
                await client.call(request, fds=[os.open(os.devnull, os.O_WRONLY)])
            registry.on(LAYER.digest, registry.hanging())
            pipe = Pipe()
            with pytest.raises(RemoteError) as caught:
                await client.call(request, fds=[pipe.write_fd], timeout=0.3)
            assert caught.value.code is Code.DEADLINE_EXCEEDED
            assert await asyncio.to_thread(pipe.data) == b""

    with FaultRegistry(IMAGE) as registry:
        insecure_registries(where.base / "registries.conf", registry.address)
        asyncio.run(scenario())


def test_progress_reaches_the_caller(where: Host) -> None:
    async def scenario() -> None:
        worker = Worker(where)
        async with worker.running() as client:
            found = await client.call(ManifestResolve(reference=f"{registry.address}/test/image:1"))
            registry.on(LAYER.digest, registry.breaking(1_000_000))  # a back-off of half a second
            told: list[Progress] = []
            pipe = Pipe()
            await client.call(
                blob_request(found, found.layers[0]),
                fds=[pipe.write_fd],
                timeout=20,
                on_update=told.append,
            )
            assert told
            assert all(0 < update.bytes <= len(LAYER.data) for update in told)
            assert await asyncio.to_thread(pipe.data) == LAYER.data

    with FaultRegistry(IMAGE) as registry:
        insecure_registries(where.base / "registries.conf", registry.address)
        asyncio.run(scenario())


def test_a_changed_configuration_is_read_and_a_bad_one_named(where: Host) -> None:
    async def scenario() -> None:
        worker = Worker(where)
        async with worker.running() as client:
            request = ReferenceNormalise(reference="app")
            assert (await client.call(request)).candidates == ["one.test/app:latest", "two.test/app:latest"]
            conf.write_text('unqualified-search-registries = ["three.test"]\n')
            assert (await client.call(request)).candidates == ["three.test/app:latest"]
            conf.write_text("unqualified-search-registries = [\n")
            with pytest.raises(RemoteError, match=r"registries\.conf is wrong") as caught:
                await client.call(request)
            assert caught.value.code is Code.FAILED_PRECONDITION
            with pytest.raises(RemoteError, match=r"registries\.conf is wrong"):
                await client.call(RegistriesReload())
            conf.write_text("")
            await client.call(RegistriesReload())

    conf = where.base / "registries.conf"
    conf.write_text('unqualified-search-registries = ["one.test", "two.test"]\n')
    asyncio.run(scenario())


def test_a_replaced_configuration_ends_the_worker_so_that_the_next_one_sees_it(where: Host) -> None:
    async def scenario() -> None:
        worker = Worker(where)
        async with worker.running() as client:
            assert (await client.call(ReferenceNormalise(reference="app"))).reference == "one.test/app:latest"
            new = where.base / "new"
            new.write_text('unqualified-search-registries = ["two.test"]\n')
            new.rename(conf)
            assert await worker.wait() == 0

    conf = where.base / "registries.conf"
    conf.write_text('unqualified-search-registries = ["one.test"]\n')
    asyncio.run(scenario())


def test_an_idle_worker_ends(where: Host) -> None:
    async def scenario() -> None:
        worker = Worker(where, idle_exit=0.5)
        async with worker.running() as client:
            await client.call(ReferenceNormalise(reference="app"))
            await asyncio.sleep(1.0)
            assert worker.process is not None
            assert worker.process.poll() is None  # a connection is no idleness
            await client.close()
            assert await worker.wait() == 0

    asyncio.run(scenario())
