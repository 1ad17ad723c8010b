"""Image volumes, VOLUMEs and hooks through the storage worker, on a real overlayfs."""

from __future__ import annotations

import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.blocking import Client
from ipc.errors import Code
from ipc.messages import storage
from ipc.messages.storage import ContainerCreate, ContainerRemove, ContainerUser, HookFacts, MountSource
from tests.support.storage_worker import (
    Layer,
    Worker,
    eventually,
    info,
    put_image,
    refusal,
    simple_tar,
    tar_of,
)

BASE = Layer(simple_tar({"etc/passwd": b"root:x:0:0::/root:/bin/sh\n", "file": b""}))
LINKS = tar_of(
    [
        (info("data", tarfile.DIRTYPE), b""),
        (info("data/x"), b"in the volume"),
        (info("etc", tarfile.SYMTYPE, linkname="/data"), b""),
        (info("loop", tarfile.SYMTYPE, linkname="loop"), b""),
        (info("gone", tarfile.SYMTYPE, linkname="/nowhere/at/all"), b""),
    ]
)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker(mount_source_timeout=1.5, hooks_dirs=[str(tmp_path)]) as running:
        yield running


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    with worker.client() as connected:
        yield connected


@pytest.fixture
def image(client: Client) -> storage.ImageRecord:
    return put_image(client, [BASE], "docker.io/library/base:1", tag="base")


@pytest.fixture
def volume(client: Client) -> storage.ImageRecord:
    return put_image(client, [Layer(LINKS)], "docker.io/library/volume:1", tag="volume")


def create(client: Client, image: storage.ImageRecord, **more: Any) -> storage.ContainerRootfs:
    fields: dict[str, Any] = {"container_id": "c1", "pod_id": "p1", "image_id": image.id} | more
    return client.call(ContainerCreate(user=ContainerUser(), **fields), timeout=20)


def source(image: storage.ImageRecord, sub_path: str = "") -> MountSource:
    return MountSource(path="", image_id=image.id, sub_path=sub_path)


def nothing_left(worker: Worker) -> None:
    eventually(lambda: not worker.staged() and not worker.children())
    assert worker.mounts() == []
    assert os.listdir(worker.root / "containers") == []
    assert os.listdir(worker.run_root / "containers") == []


def in_use(client: Client, image: storage.ImageRecord) -> int:
    found = client.call(storage.ImageGet(reference=image.id)).image
    assert found is not None
    return found.in_use


def test_a_volume_shows_its_image_and_cannot_be_written(
    worker: Worker, client: Client, image: storage.ImageRecord, volume: storage.ImageRecord
) -> None:
    whole, part, same = create(
        client, image, mounts=[source(volume), source(volume, "data"), source(image)]
    ).mounts
    assert (Path(whole.path) / "data/x").read_text() == "in the volume"
    assert (Path(part.path) / "x").read_text() == "in the volume"
    assert (Path(same.path) / "file").exists()
    assert whole.locked_flags == ["ro", "nosuid", "nodev"]
    with pytest.raises(OSError, match="Read-only"):
        (Path(whole.path) / "new").write_text("")
    client.call(ContainerRemove(container_id="c1"))
    nothing_left(worker)


def test_an_image_without_layers_is_an_empty_volume(
    worker: Worker, client: Client, image: storage.ImageRecord
) -> None:
    empty = put_image(client, [], "docker.io/library/empty:1", tag="empty")
    (found,) = create(client, image, mounts=[source(empty)]).mounts
    assert os.listdir(found.path) == []
    client.call(ContainerRemove(container_id="c1"))
    nothing_left(worker)


@pytest.mark.parametrize("sub_path", ["etc", "./data/../etc/", "/etc"])
def test_links_of_a_volume_stay_inside_it(
    client: Client, image: storage.ImageRecord, volume: storage.ImageRecord, sub_path: str
) -> None:
    (found,) = create(client, image, mounts=[source(volume, sub_path)]).mounts
    assert os.listdir(found.path) == ["x"]


@pytest.mark.parametrize("sub_path", ["loop", "gone", "nothing", "data/x/y", "a" * 300])
def test_a_sub_path_that_is_not_there_leaves_nothing(
    worker: Worker, client: Client, image: storage.ImageRecord, volume: storage.ImageRecord, sub_path: str
) -> None:
    error = refusal(lambda: create(client, image, mounts=[source(volume), source(volume, sub_path)]))
    assert error.reason == "ImageVolumeMountFailed"
    assert error.code in {Code.FAILED_PRECONDITION, Code.INVALID_ARGUMENT}
    nothing_left(worker)
    assert in_use(client, volume) == 0


def test_the_image_of_a_volume_is_in_use_in_the_next_life_too(
    worker: Worker, client: Client, image: storage.ImageRecord, volume: storage.ImageRecord
) -> None:
    create(client, image, mounts=[source(volume), source(volume, "data")])
    worker.kill()
    worker.start()
    with worker.client() as again:
        assert in_use(again, volume) == in_use(again, image) == 1
        error = refusal(lambda: again.call(storage.ImageRemove(reference=volume.id)))
        assert error.code is Code.FAILED_PRECONDITION
        create(again, image, mounts=[source(volume), source(volume, "data")])  # what is there is found
        assert len(worker.mounts()) == 3
        again.call(ContainerRemove(container_id="c1"))
        nothing_left(worker)
        again.call(storage.ImageRemove(reference=volume.id))


def test_volumes_of_a_container_that_the_last_life_left_are_removed(
    worker: Worker, client: Client, image: storage.ImageRecord, volume: storage.ImageRecord
) -> None:
    create(client, image, mounts=[source(volume)])
    worker.kill()
    worker.start()
    with worker.client() as again:
        assert again.call(storage.InventoryList()).containers == ["c1"]
        again.call(ContainerRemove(container_id="c1"))
        nothing_left(worker)


# -- VOLUMEs ----------------------------------------------------------------------------------------------


def test_declared_directories_are_made_inside_the_root_whatever_links_say(
    client: Client, image: storage.ImageRecord
) -> None:
    name = f"bh-volume-{os.getpid()}"
    links = [
        (info("out", tarfile.SYMTYPE, linkname="/tmp"), b""),
        (info("kept", tarfile.DIRTYPE, mode=0o700, uid=7), b""),
    ]
    layered = put_image(
        client, [BASE, Layer(tar_of(links), BASE.chain_id)], "docker.io/library/links:1", tag="l"
    )
    error = refusal(lambda: create(client, layered, directories=[f"/out/{name}"]))
    assert error.code is Code.INVALID_ARGUMENT  # the image has no /tmp: its link dangles inside it
    made = create(client, layered, directories=["/kept", "/a/b/c", "/etc/x"])
    root = Path(made.rootfs)
    assert ((root / "kept").stat().st_mode & 0o7777, (root / "kept").stat().st_uid) == (0o700, 7)
    assert ((root / "a/b/c").stat().st_mode & 0o7777, (root / "a/b/c").stat().st_uid) == (0o755, 0)
    assert (root / "etc/x").is_dir()
    assert not Path("/tmp", name).exists()


@pytest.mark.parametrize("path", ["/file", "/file/below"])
def test_a_declared_directory_that_is_a_file_is_refused(
    worker: Worker, client: Client, image: storage.ImageRecord, path: str
) -> None:
    error = refusal(lambda: create(client, image, directories=[path]))
    assert error.code is Code.INVALID_ARGUMENT
    nothing_left(worker)


# -- hooks ------------------------------------------------------------------------------------------------


def test_a_condition_that_does_not_come_to_an_end_costs_one_child(
    worker: Worker, client: Client, image: storage.ImageRecord, tmp_path: Path
) -> None:
    content = {
        "version": "1.0.0",
        "hook": {"path": "/bin/true"},
        "when": {"annotations": {"a": "^(x+x+)+$"}},
        "stages": ["prestart"],
    }
    (tmp_path / "slow.json").write_text(json.dumps(content))
    facts = HookFacts(command="x", annotations={"a": "x" * 60 + "!"})
    began = time.monotonic()
    error = refusal(lambda: create(client, image, hook_facts=facts))
    assert error.code is Code.DEADLINE_EXCEEDED
    assert "slow.json" in error.text
    assert time.monotonic() - began < 10
    nothing_left(worker)
    assert create(client, image, hook_facts=HookFacts(command="x")).hooks == {}
