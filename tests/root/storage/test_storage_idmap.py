"""Runs in: pytest, as root. Containers of pods with a user namespace, on id-mapped layers and volumes."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc import kernel, userns
from ipc.blocking import Client
from ipc.errors import Code
from ipc.messages import IdMapping, storage
from ipc.messages.storage import ContainerCreate, ContainerRemove, ContainerUser, MountSource
from tests.support.storage_worker import Layer, Worker, info, put_image, refusal, tar_of
from workers.jobs import Beside

HOST, LENGTH = 300_000, 65_536
MAPPINGS = [IdMapping(container_id=0, host_id=HOST, length=LENGTH)]
PASSWD = b"root:x:0:0::/root:/bin/sh\napp:x:1000:2000::/home/app:/bin/sh\nfar:x:70000:0::/:/bin/sh\n"
LOWER = tar_of(
    [
        (info("etc", tarfile.DIRTYPE), b""),
        (info("etc/passwd"), PASSWD),
        (info("etc/app.conf", uid=1000, gid=2000), b"lower"),
    ]
)
UPPER = tar_of([(info("etc/second", uid=5, gid=6), b"upper")])


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as running:
        pin = running.run_root / "ns/p1/user"
        pin.parent.mkdir(parents=True)
        pin.touch()
        with Beside(userns.unshare) as maker:
            maker.step()
            userns.write_mappings(maker.pid, MAPPINGS, MAPPINGS)
            kernel.bind_mount(f"/proc/{maker.pid}/ns/user", str(pin))
        yield running


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    with worker.client() as connected:
        yield connected


@pytest.fixture
def image(client: Client) -> storage.ImageRecord:
    first = Layer(LOWER)
    return put_image(client, [first, Layer(UPPER, first.chain_id)])


def create(client: Client, image: storage.ImageRecord, **more: Any) -> storage.ContainerRootfs:
    fields: dict[str, Any] = {
        "container_id": "c1",
        "pod_id": "p1",
        "image_id": image.id,
        "user": ContainerUser(),
        "uid_mappings": MAPPINGS,
        "gid_mappings": MAPPINGS,
    }
    return client.call(ContainerCreate(**(fields | more)), timeout=20)


def owner(path: str | Path) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_uid, found.st_gid


def container_mounts(worker: Worker) -> list[str]:
    return [path for path in worker.mounts() if "/containers/" in path]


def test_layers_are_seen_in_the_namespaces_ids_and_stay_as_they_are(
    worker: Worker, client: Client, image: storage.ImageRecord
) -> None:
    made = create(client, image)
    assert owner(made.rootfs) == (HOST, HOST)
    assert owner(f"{made.rootfs}/etc/passwd") == (HOST, HOST)
    assert owner(f"{made.rootfs}/etc/app.conf") == (HOST + 1000, HOST + 2000)
    assert owner(f"{made.rootfs}/etc/second") == (HOST + 5, HOST + 6)
    on_disk = {path.name: owner(path) for path in (worker.root / "layers").rglob("etc/*")}
    assert on_disk == {"passwd": (0, 0), "app.conf": (1000, 2000), "second": (5, 6)}
    home = Path(made.rootfs).parent
    assert (owner(home), stat.S_IMODE(home.stat().st_mode)) == ((0, HOST), 0o710)
    assert container_mounts(worker) == [made.rootfs]
    client.call(ContainerRemove(container_id="c1"))
    assert not home.exists()


def test_the_root_of_the_namespace_changes_what_it_owns(
    worker: Worker, client: Client, image: storage.ImageRecord
) -> None:
    made = create(client, image)
    run = ["nsenter", f"--user={worker.run_root}/ns/p1/user", "--setuid=0", "--setgid=0", "/bin/sh", "-c"]
    script = "echo new >etc/new && echo more >>etc/app.conf && chown 7:8 etc/second && stat -c %u:%g etc/*"
    os.chmod(worker.base, 0o711)
    seen = subprocess.run([*run, script], cwd=made.rootfs, capture_output=True, text=True, check=True).stdout
    assert seen.split() == ["1000:2000", "0:0", "0:0", "7:8"]
    upper = worker.root / "containers/c1/upper/etc"
    assert owner(upper / "new") == (HOST, HOST)
    assert owner(upper / "app.conf") == (HOST + 1000, HOST + 2000)
    client.call(ContainerRemove(container_id="c1"))


def test_volumes_that_ask_for_it_are_seen_as_mapped(
    worker: Worker, client: Client, image: storage.ImageRecord, tmp_path: Path
) -> None:
    (tmp_path / "volume/deep").mkdir(parents=True)
    (tmp_path / "volume/theirs").touch()
    os.chown(tmp_path / "volume/theirs", 1000, 1000)
    (tmp_path / "file").write_text("one file")
    sources = [
        MountSource(path=str(tmp_path / "volume"), idmap=True),
        MountSource(path=str(tmp_path / "file"), idmap=True),
        MountSource(path=str(tmp_path / "volume")),
    ]
    made = create(client, image, mounts=sources)
    volume, file, plain = (found.path for found in made.mounts)
    assert (owner(volume), owner(f"{volume}/theirs")) == ((HOST, HOST), (HOST + 1000, HOST + 1000))
    assert (owner(file), Path(file).read_text()) == ((HOST, HOST), "one file")
    assert (plain, owner(f"{plain}/theirs")) == (str(tmp_path / "volume"), (1000, 1000))
    again = create(client, image, mounts=sources)
    assert again == made
    client.call(storage.ContainerUnmount(container_id="c1"))
    assert container_mounts(worker) == []
    client.call(ContainerRemove(container_id="c1"))
    assert not (worker.run_root / "containers/c1").exists()
    assert sorted(os.listdir(tmp_path / "volume")) == ["deep", "theirs"]


def test_a_user_outside_of_the_namespace_is_refused_and_leaves_nothing(
    worker: Worker, client: Client, image: storage.ImageRecord
) -> None:
    error = refusal(lambda: create(client, image, user=ContainerUser(name="far")))
    assert (error.code, "70000" in error.text) == (Code.INVALID_ARGUMENT, True)
    assert container_mounts(worker) == []


def test_a_volume_whose_file_system_cannot_is_refused_by_name(
    worker: Worker, client: Client, image: storage.ImageRecord
) -> None:
    source = MountSource(path="/proc/sys", idmap=True)
    error = refusal(lambda: create(client, image, mounts=[source]))
    assert (error.code, "/proc/sys" in error.text) == (Code.FAILED_PRECONDITION, True)
    assert container_mounts(worker) == []
    assert not (worker.run_root / "containers/c1").exists()


def test_a_pod_without_the_namespace_is_an_error_and_leaves_nothing(
    worker: Worker, client: Client, image: storage.ImageRecord
) -> None:
    error = refusal(lambda: create(client, image, pod_id="p2"))
    assert error.code is Code.FAILED_PRECONDITION
    assert container_mounts(worker) == []


def test_what_a_killed_worker_left_half_mounted_is_taken_over(
    worker: Worker, client: Client, image: storage.ImageRecord
) -> None:
    lower = worker.run_root / "containers/c1/lower"
    lower.mkdir(parents=True)
    kernel.bind_mount(str(worker.root), str(lower))
    made = create(client, image)
    assert container_mounts(worker) == [made.rootfs]
    client.call(ContainerRemove(container_id="c1"))
    assert not lower.parent.exists()


def test_the_probe_finds_that_this_machine_can_and_leaves_nothing(worker: Worker, client: Client) -> None:
    before = worker.mounts()
    assert client.call(storage.IdmapProbe()) == storage.IdmapSupport(supported=True)
    assert worker.staged() == []
    assert worker.mounts() == before


def test_files_of_a_pod_belong_to_its_root(worker: Worker, client: Client) -> None:
    request = storage.PodSetup(pod_id="p1", hostname="h", owner_uid=HOST, owner_gid=HOST)
    files = client.call(request)
    for path in (files.resolv_conf, files.hostname, files.hosts, files.shm):
        assert owner(path) == (HOST, HOST)
    client.call(storage.PodTeardown(pod_id="p1"))
