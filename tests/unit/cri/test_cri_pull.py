"""Pulls: shared, retried, told about; and what else is asked of images."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any, cast

import grpc
import grpc.aio
import msgspec
import pytest

from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError, precondition, unavailable
from ipc.messages import image, storage
from ipc.messages.cri import PullState
from tests.support.cri_world import (
    IMAGE,
    IMAGE_ID,
    LAYERS,
    RESOLVED,
    Worker,
    World,
    hang,
    world_and_worker,
)
from workers.cri.images import is_pinned, lookups, removal, to_cri
from workers.cri.pull import fingerprint

Scenario = Callable[[World, Worker], Coroutine[Any, Any, None]]
PULLED = RESOLVED.config_digest


def test_nobody_can_try_passwords_against_the_key_of_a_pull() -> None:
    auth = image.Auth(username="u", password="p")
    assert fingerprint(None) == ""
    assert fingerprint(auth) == fingerprint(image.Auth(username="u", password="p"))
    assert fingerprint(auth) != fingerprint(image.Auth(username="u", password="q"))
    program = (
        "from ipc.messages.image import Auth; from workers.cri.pull import fingerprint;"
        "print(fingerprint(Auth(username='u', password='p')))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() not in {"", fingerprint(auth)}


def play(scenario: Scenario, **settings: Any) -> None:
    async def run() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with world_and_worker(**settings) as (world, worker):
            pipes = open_pipes()
            await scenario(world, worker)
            assert open_pipes() == pipes + len(world.begun), "a pipe into an unpack child was left open"
        assert len(os.listdir("/proc/self/fd")) <= before + 40  # gRPC keeps a few of its own

    asyncio.run(asyncio.wait_for(run(), 30))


def open_pipes() -> int:
    """How many pipes this process holds."""
    return sum(os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:") for fd in _fds())


def _fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


async def pull(worker: Worker, name: str = "quay.io/test/app:1", **auth: str) -> str:
    request = pb.PullImageRequest(image=pb.ImageSpec(image=name))
    if auth:
        request.auth.CopyFrom(pb.AuthConfig(**auth))
    return (await worker.images.PullImage(request, timeout=20)).image_ref


async def failure(step: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await step
    return caught.value.code(), caught.value.details() or ""


def test_a_pull_commits_every_layer_and_records_the_image() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        assert await pull(worker) == PULLED
        assert set(world.layers) == {layer.chain_id for layer in LAYERS}
        record = world.images[PULLED]
        assert record.layers == [layer.chain_id for layer in LAYERS]
        assert record.names == ["quay.io/test/app:1"]
        assert record.digests == [RESOLVED.repo_digest]
        assert record.size == 15
        assert record.pinned
        parents = {ask.chain_id: ask.parent for ask in world.asked(storage.LayerBegin)}
        assert parents[LAYERS[0].chain_id] == ""
        assert parents[LAYERS[2].chain_id] == LAYERS[1].chain_id

    play(scenario)


def test_layers_are_committed_from_the_lowest_up() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def slowly(_call: Any) -> None:
            await asyncio.sleep(0.1)

        world.fail(image.BlobFetch, slowly)  # the lowest layer comes last
        await pull(worker)
        commits = [ask.chain_id for ask in world.asked(storage.LayerCommit)]
        assert commits == [layer.chain_id for layer in LAYERS]

    play(scenario)


def test_pulls_of_the_same_reference_are_one() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        assert await asyncio.gather(*(pull(worker) for _ in range(5))) == [PULLED] * 5
        assert len(world.asked(image.ManifestResolve)) == 1

    play(scenario)


def test_pulls_with_other_credentials_are_others_but_share_layers() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        await asyncio.gather(pull(worker, username="a"), pull(worker, username="b"), pull(worker))
        assert len(world.asked(image.ManifestResolve)) == 3
        assert sorted(world.blobs) == sorted(layer.digest for layer in LAYERS)

    play(scenario)


def test_layers_that_are_there_are_not_fetched() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.layers[LAYERS[0].chain_id] = 9
        await pull(worker)
        assert sorted(world.blobs) == sorted(layer.digest for layer in LAYERS[1:])
        assert world.images[PULLED].size == 19

    play(scenario)


def test_at_most_so_many_layers_are_fetched_at_a_time() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        most = now = 0

        async def count(_call: Any) -> None:
            nonlocal most, now
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.02)
            now -= 1

        world.fail(image.BlobFetch, count, count, count)
        await pull(worker)
        assert most == 2

    play(scenario, parallel_layers=2)


@pytest.mark.parametrize("victim", ["image", "storage"])
def test_a_worker_that_dies_in_the_middle_of_a_pull_is_not_noticed(victim: str) -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def die(_call: Any) -> None:
            if victim == "storage":
                for chain_id in list(world.begun):
                    await world._layer_abort(storage.LayerAbort(chain_id=chain_id))
            world.servers[victim].drop_connections()
            await asyncio.sleep(0)

        world.fail(image.BlobFetch, die)
        assert await pull(worker) == PULLED
        assert set(world.layers) == {layer.chain_id for layer in LAYERS}

    play(scenario)


def test_a_layer_is_given_up_after_some_deaths() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.fail(image.BlobFetch, *(unavailable("died") for _ in range(30)))
        code, _ = await failure(pull(worker))
        assert code == grpc.StatusCode.UNAVAILABLE
        assert PULLED not in world.images
        world.faults.clear()
        assert await pull(worker) == PULLED

    play(scenario)


def test_a_wrong_digest_is_tried_once_more_and_then_told() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.layers.update({layer.chain_id: 1 for layer in LAYERS[1:]})
        bad = RemoteError(Code.DATA_LOSS, "the digest is wrong")
        world.fail(storage.LayerCommit, bad)
        assert await pull(worker) == PULLED
        del world.layers[LAYERS[0].chain_id]
        world.fail(storage.LayerCommit, bad, bad)
        assert await failure(pull(worker)) == (grpc.StatusCode.DATA_LOSS, "the digest is wrong")

    play(scenario)


def test_a_registry_that_cannot_be_reached_is_told_with_the_word_that_kubelets_know() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        down = RemoteError(Code.UNAVAILABLE, "connection refused", reason="RegistryUnavailable")
        world.fail(image.ManifestResolve, down)
        code, text = await failure(pull(worker))
        assert code == grpc.StatusCode.UNKNOWN  # with any other, kubelets see the word too late in the text
        assert text.startswith("RegistryUnavailable: ")

    play(scenario)


def test_a_hostile_archive_is_the_cause_of_a_broken_download() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        hostile = RemoteError(Code.INVALID_ARGUMENT, "a path leads out of the root")
        world.fail(image.BlobFetch, *(unavailable("the pipe's reader is gone") for _ in range(12)))
        world.fail(storage.LayerCommit, *(hostile for _ in range(12)))
        code, text = await failure(pull(worker))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert text == "a path leads out of the root"

    play(scenario)


def test_a_download_that_stalls_is_ended_and_begun_again() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        world.fail(image.BlobFetch, hang)
        assert await pull(worker) == PULLED
        assert len(world.asked(image.BlobFetch)) == len(LAYERS) + 1

    play(scenario)


def test_a_layer_that_was_collected_meanwhile_is_fetched_again() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def collect(_call: Any) -> None:
            world.layers.clear()

        world.fail(storage.ImagePut, collect)
        assert await pull(worker) == PULLED
        assert len(world.asked(storage.ImagePut)) == 2

    play(scenario)


def test_a_pull_goes_on_when_its_client_gives_up() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def slowly(_call: Any) -> None:
            await asyncio.sleep(0.2)

        world.fail(image.BlobFetch, slowly)
        request = pb.PullImageRequest(image=pb.ImageSpec(image="quay.io/test/app:1"))
        code, _ = await failure(worker.images.PullImage(request, timeout=0.05))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert await pull(worker) == PULLED
        assert len(world.asked(image.ManifestResolve)) == 1

    play(scenario)


def test_progress_is_streamed_while_something_is_pulled() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        async def slowly(_call: Any) -> None:
            await asyncio.sleep(0.3)

        watch: Any = cast(Any, worker.channel.unary_stream("/bulkhead.v1.Operator/WatchPulls"))(b"")
        world.fail(storage.LayerCommit, slowly, slowly)
        pulling = asyncio.create_task(pull(worker))
        seen: list[list[PullState]] = []
        async for data in watch:
            seen.append(msgspec.json.decode(data, type=list[PullState]))
            if seen[-1] == [] and any(seen):
                break
        assert await pulling == PULLED
        states = [state for states in seen for state in states]
        assert {state.reference for state in states} == {"quay.io/test/app:1"}
        assert max(state.bytes_done for state in states) > 0
        assert max(state.bytes_total for state in states) == sum(layer.size for layer in LAYERS)
        watch.cancel()

    play(scenario)


def test_a_short_name_goes_where_registries_conf_sends_it() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        await pull(worker, "app")
        assert world.asked(image.ManifestResolve)[0].reference == "quay.io/short/app:latest"

    play(scenario)


def test_known_images_are_found_without_the_image_worker() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        for text in ("busybox", IMAGE, IMAGE_ID, IMAGE_ID.removeprefix("sha256:"), "abab", "sha256:abab"):
            request = pb.ImageStatusRequest(image=pb.ImageSpec(image=text), verbose=True)
            answer = await worker.images.ImageStatus(request)
            assert answer.image.id == IMAGE_ID, text
            assert answer.image.username == "nobody"
            assert "imageSpec" in answer.info["info"]
        absent = pb.ImageStatusRequest(image=pb.ImageSpec(image="quay.io/no/such:1"))
        assert not (await worker.images.ImageStatus(absent)).HasField("image")
        assert not world.asked(image.ReferenceNormalise)
        code, _ = await failure(worker.images.ImageStatus(pb.ImageStatusRequest()))
        assert code == grpc.StatusCode.INVALID_ARGUMENT

    play(scenario)


def test_images_are_listed_filtered_and_removed() -> None:
    async def scenario(world: World, worker: Worker) -> None:
        await pull(worker)
        listed = (await worker.images.ListImages(pb.ListImagesRequest())).images
        assert {item.id for item in listed} == {IMAGE_ID, PULLED}
        wanted = pb.ImageFilter(image=pb.ImageSpec(image="busybox"))
        listed = (await worker.images.ListImages(pb.ListImagesRequest(filter=wanted))).images
        assert [item.id for item in listed] == [IMAGE_ID]
        gone = pb.RemoveImageRequest(image=pb.ImageSpec(image="busybox"))
        await worker.images.RemoveImage(gone)
        assert list(world.images) == [PULLED]
        await worker.images.RemoveImage(gone)
        by_id = pb.RemoveImageRequest(image=pb.ImageSpec(image=PULLED))
        world.fail(storage.ImageRemove, precondition("a container uses it"))
        code, _ = await failure(worker.images.RemoveImage(by_id))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        await worker.images.RemoveImage(by_id)
        assert not world.images

    play(scenario)


def test_fs_info_tells_both_file_systems() -> None:
    async def scenario(_world: World, worker: Worker) -> None:
        answer = await worker.images.ImageFsInfo(pb.ImageFsInfoRequest())
        assert answer.image_filesystems[0].used_bytes.value == 11
        assert answer.container_filesystems[0].inodes_used.value == 14

    play(scenario)


def test_how_a_text_is_looked_up() -> None:
    hexadecimal = "ab" * 32
    assert list(lookups(hexadecimal)) == [f"sha256:{hexadecimal}"]
    assert list(lookups("sha256:abc")) == ["sha256:abc"]
    assert list(lookups("abc")) == ["docker.io/library/abc:latest", "abc"]
    assert list(lookups("busybox:1")) == ["docker.io/library/busybox:1"]
    with pytest.raises(RemoteError):
        list(lookups("Not A Name"))


def test_what_is_removed_for_a_text() -> None:
    record = storage.ImageRecord(
        id="sha256:" + "ab" * 32, config=b"{}", names=["docker.io/library/a:1", "q.io/b:2"]
    )
    assert removal("q.io/b:2", record) == "q.io/b:2"
    assert removal("a:1", record) == "docker.io/library/a:1"
    assert removal("abab", record) == record.id
    assert removal(record.id, record) == record.id


def test_pinned_images_by_name_prefix_and_keyword() -> None:
    names = ["registry.k8s.io/pause:3.10"]
    assert is_pinned(names, ["registry.k8s.io/pause:3.10"])
    assert is_pinned(names, ["registry.k8s.io/*"])
    assert is_pinned(names, ["*pause*"])
    assert not is_pinned(names, ["quay.io/*"])
    assert not is_pinned([], ["*"])


def test_the_user_of_an_image_is_a_number_or_a_name() -> None:
    def user(text: str) -> tuple[int | None, str]:
        config = msgspec.json.encode({"config": {"User": text}})
        found = to_cri(storage.ImageRecord(id="sha256:1", config=config))
        return (found.uid.value if found.HasField("uid") else None), found.username

    assert user("1000:1000") == (1000, "")
    assert user("www:data") == (None, "www")
    assert user("") == (None, "")
    assert to_cri(storage.ImageRecord(id="sha256:1", config=b"broken")).username == ""
