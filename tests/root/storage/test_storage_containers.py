"""Runs in: pytest, as root. Images and containers through the worker, on a real overlayfs."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc import kernel
from ipc.blocking import Client
from ipc.errors import Code, RemoteError
from ipc.messages import storage
from ipc.messages.storage import ContainerCreate, ContainerRemove, ContainerUser, MountSource
from tests.support.storage_worker import (
    Layer,
    Worker,
    commit,
    digest,
    eventually,
    info,
    put_image,
    refusal,
    simple_tar,
    tar_of,
    upload,
)

PASSWD = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:2000::/home/app:/bin/sh\nbroken\n+::::::\n"
GROUP = b"root:x:0:\nstaff:x:50:app,other\napp:x:2000:\nwheel:x:10:root,app\n"
BASE = simple_tar({"etc/passwd": PASSWD, "etc/group": GROUP, "bin/sh": b"#!", "gone": b"", "dir/old": b""})


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(mount_source_timeout=1.0) as running:
        yield running


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    with worker.client() as connected:
        yield connected


def image_of(
    client: Client, tars: list[bytes], name: str = "docker.io/library/t:latest"
) -> storage.ImageRecord:
    layers: list[Layer] = []
    for tar in tars:
        layers.append(Layer(tar, layers[-1].chain_id if layers else ""))
    return put_image(client, layers, name, tag=name)


def create(
    client: Client,
    image: storage.ImageRecord,
    container_id: str = "c1",
    user: ContainerUser | None = None,
    **more: Any,
) -> storage.ContainerRootfs:
    request = ContainerCreate(
        container_id=container_id, pod_id="p1", image_id=image.id, user=user or ContainerUser(), **more
    )
    return client.call(request, timeout=20)


def no_containers(worker: Worker) -> None:
    eventually(lambda: not worker.staged() and not worker.children())
    assert worker.mounts() == []
    assert os.listdir(worker.root / "containers") == []
    assert os.listdir(worker.run_root / "containers") == []


# -- images ---------------------------------------------------------------------------------------------


def test_an_image_is_found_by_id_prefix_name_and_digest(client: Client) -> None:
    stored = image_of(client, [BASE])
    reference = f"docker.io/library/t@{'sha256:' + 'a' * 64}"
    again = client.call(
        storage.ImagePut(
            image=storage.ImageRecord(
                id=stored.id,
                config=stored.config,
                names=["quay.io/x:1"],
                digests=[reference],
                layers=stored.layers,
            )
        )
    )
    assert again.image.names == ["docker.io/library/t:latest", "quay.io/x:1"]
    for text in (stored.id, stored.id[7:], stored.id[7:12], stored.id[:14], "quay.io/x:1", reference):
        found = client.call(storage.ImageGet(reference=text)).image
        assert found is not None
        assert found.id == stored.id
        assert found.size > 0
    for text in ("quay.io/x:2", "ff", "", "sha256:" + "0" * 64, "%", "*"):
        assert client.call(storage.ImageGet(reference=text)).image is None


def test_a_name_moves_to_the_image_that_was_pulled_last(client: Client) -> None:
    first, second = image_of(client, [BASE]), image_of(client, [simple_tar({"x": b""})], "quay.io/other:1")
    client.call(
        storage.ImagePut(
            image=storage.ImageRecord(
                id=second.id, config=second.config, names=first.names, layers=second.layers
            )
        )
    )
    records = {image.id: image.names for image in client.call(storage.ImageList()).images}
    assert records == {first.id: [], second.id: ["docker.io/library/t:latest", "quay.io/other:1"]}


def test_an_ambiguous_prefix_is_refused(client: Client) -> None:
    images = [image_of(client, [BASE], f"docker.io/library/t:{n}") for n in range(40)]
    prefixes = [image.id[7:8] for image in images]
    common = next(p for p in prefixes if prefixes.count(p) > 1)
    with contextlib.suppress(RemoteError):
        assert (
            client.call(storage.ImageGet(reference=common)).image is None
        )  # under three digits: never an id
    connection_free_prefix = images[0].id[7:30]
    assert client.call(storage.ImageGet(reference=connection_free_prefix)).image is not None


def test_a_put_image_must_be_what_it_says(client: Client) -> None:
    stored = image_of(client, [BASE, simple_tar({"b": b""})])
    record = storage.ImageRecord(id=stored.id, config=b"other", layers=stored.layers)
    assert refusal(lambda: client.call(storage.ImagePut(image=record))).code is Code.DATA_LOSS
    record = storage.ImageRecord(id=digest(b"c"), config=b"c", layers=[digest(b"nowhere")])
    assert refusal(lambda: client.call(storage.ImagePut(image=record))).code is Code.FAILED_PRECONDITION
    record = storage.ImageRecord(id=digest(b"c"), config=b"c", layers=stored.layers[::-1])
    assert refusal(lambda: client.call(storage.ImagePut(image=record))).code is Code.INVALID_ARGUMENT


def test_removal_takes_a_name_then_the_image_then_its_unshared_layers(worker: Worker, client: Client) -> None:
    image_of(client, [BASE], "quay.io/shared:1")
    other = image_of(client, [BASE, simple_tar({"more": b""})], "quay.io/other:1")
    client.call(
        storage.ImagePut(
            image=storage.ImageRecord(
                id=other.id, config=other.config, names=["quay.io/other:2"], layers=other.layers
            )
        )
    )
    client.call(storage.ImageRemove(reference="quay.io/other:1"))
    assert client.call(storage.ImageGet(reference=other.id)).image is not None
    client.call(storage.ImageRemove(reference="quay.io/other:2"))
    client.call(storage.ImageRemove(reference="quay.io/other:2"))
    assert client.call(storage.ImageGet(reference=other.id)).image is None
    eventually(lambda: worker.layers() == [other.layers[0][7:]])
    assert client.call(storage.FsInfoGet()).used_bytes > 0
    client.call(storage.ImageRemove(reference="quay.io/shared:1"))
    eventually(lambda: worker.layers() == [] and worker.staged() == [])
    info_ = client.call(storage.FsInfoGet())
    assert (info_.used_bytes, info_.used_inodes, info_.mountpoint) == (0, 0, str(worker.root))
    assert info_.available_bytes > 0


def test_layers_of_a_pull_that_goes_on_are_not_swept(worker: Worker, client: Client) -> None:
    image = image_of(client, [BASE])
    lower = Layer(BASE)
    upper = Layer(simple_tar({"up": b""}), lower.chain_id)
    assert not upload(client, lower)  # present: the pull relies on it
    client.call(storage.ImageRemove(reference=image.id))
    upload(client, upper)
    commit(client, upper)
    put_image(client, [lower, upper], "quay.io/second:1")
    assert len(worker.layers()) == 2


def test_an_image_in_use_is_not_removed(worker: Worker, client: Client) -> None:
    image = image_of(client, [BASE])
    create(client, image)
    error = refusal(lambda: client.call(storage.ImageRemove(reference=image.names[0])))
    assert error.code is Code.FAILED_PRECONDITION
    assert "c1" in error.text
    found = client.call(storage.ImageGet(reference=image.names[0])).image
    assert found is not None
    assert found.in_use == 1
    client.call(ContainerRemove(container_id="c1"))
    client.call(storage.ImageRemove(reference=image.names[0]))
    eventually(lambda: worker.layers() == [])
    no_containers(worker)


# -- root file systems ------------------------------------------------------------------------------------


def test_a_container_sees_the_layers_as_one_and_writes_to_its_own(worker: Worker, client: Client) -> None:
    top = tar_of(
        [
            (info(".", tarfile.DIRTYPE, mode=0o751, uid=3, gid=4), b""),
            (info(".wh.gone"), b""),
            (info("dir/.wh..wh..opq"), b""),
            (info("dir/new"), b""),
        ]
    )
    image = image_of(client, [BASE, top])
    root = Path(create(client, image).rootfs)
    assert root == worker.run_root / "containers/c1/rootfs"
    assert sorted(os.listdir(root)) == ["bin", "dir", "etc"]
    assert os.listdir(root / "dir") == ["new"]
    assert (root.stat().st_mode & 0o7777, root.stat().st_uid, root.stat().st_gid) == (0o751, 3, 4)
    (root / "etc/passwd").write_text("changed")
    other = Path(create(client, image, "c2").rootfs)
    assert (other / "etc/passwd").read_bytes() == PASSWD
    assert create(client, image).rootfs == str(root)  # again: the same, and nothing is lost
    assert (root / "etc/passwd").read_text() == "changed"
    assert client.call(storage.InventoryList()).containers == ["c1", "c2"]
    for container_id in ("c1", "c2", "c1"):
        client.call(ContainerRemove(container_id=container_id))
    no_containers(worker)


def test_an_opaque_root_hides_every_layer_below(client: Client) -> None:
    image = image_of(client, [BASE, simple_tar({".wh..wh..opq": b"", "only": b""})])
    assert os.listdir(create(client, image).rootfs) == ["only"]


def test_an_image_of_a_hundred_and_twenty_layers_is_mounted(client: Client) -> None:
    tars = [simple_tar({f"f{n}": str(n).encode(), "last": str(n).encode()}) for n in range(120)]
    root = Path(create(client, image_of(client, tars)).rootfs)
    assert len(os.listdir(root)) == 121
    assert (root / "last").read_text() == "119"


def test_an_image_without_layers_has_an_empty_root(client: Client) -> None:
    image = put_image(client, [])
    rootfs = create(client, image)
    assert os.listdir(rootfs.rootfs) == []
    assert (rootfs.uid, rootfs.gid, rootfs.home) == (0, 0, "/")


def test_an_unmounted_container_can_be_mounted_again_with_what_it_wrote(
    worker: Worker, client: Client
) -> None:
    image = image_of(client, [BASE])
    root = Path(create(client, image).rootfs)
    (root / "written").write_text("kept")
    client.call(storage.ContainerUnmount(container_id="c1"))
    client.call(storage.ContainerUnmount(container_id="c1"))
    assert worker.mounts() == []
    assert (Path(create(client, image).rootfs) / "written").read_text() == "kept"


def test_a_busy_root_is_unmounted_lazily_and_removed(worker: Worker, client: Client) -> None:
    root = create(client, image_of(client, [BASE])).rootfs
    holder = os.open(f"{root}/etc/passwd", os.O_RDONLY)
    try:
        client.call(ContainerRemove(container_id="c1"))
        no_containers(worker)
    finally:
        os.close(holder)


def test_ids_that_are_no_file_names_are_refused(client: Client) -> None:
    image = image_of(client, [BASE])
    for bad in ("", "..", "a/b", "../x", "a" * 200, "-x", "a\n"):
        assert refusal(lambda: create(client, image, bad)).code is Code.INVALID_ARGUMENT  # noqa: B023
        request = ContainerRemove(container_id=bad)
        assert refusal(lambda: client.call(request)).code is Code.INVALID_ARGUMENT  # noqa: B023
    missing = storage.ImageRecord(id="sha256:" + "0" * 64, config=b"")
    assert refusal(lambda: create(client, missing)).code is Code.NOT_FOUND


# -- users --------------------------------------------------------------------------------------------------

USERS = {
    "default": (ContainerUser(), (0, 0, [0, 10], "/root", "root")),
    "image name": (ContainerUser(image_user="app"), (1000, 2000, [2000, 50, 10], "/home/app", "app")),
    "image uid": (ContainerUser(image_user="1000"), (1000, 2000, [2000, 50, 10], "/home/app", "app")),
    "image uid:gid": (ContainerUser(image_user="5:6"), (5, 6, [6], "/", "")),
    "image name:group": (ContainerUser(image_user="app:staff"), (1000, 50, [50, 10], "/home/app", "app")),
    "image uid:group": (ContainerUser(image_user="77:wheel"), (77, 10, [10], "/", "")),
    "uid": (ContainerUser(uid=1000, image_user="root"), (1000, 2000, [2000, 50, 10], "/home/app", "app")),
    "uid and gid": (ContainerUser(uid=1000, gid=7), (1000, 7, [7, 50, 10], "/home/app", "app")),
    "unknown uid": (ContainerUser(uid=4242), (4242, 0, [0], "/", "")),
    "name": (
        ContainerUser(name="app", supplemental=[9, 10]),
        (1000, 2000, [2000, 50, 10, 9], "/home/app", "app"),
    ),
    "strict": (
        ContainerUser(uid=1000, supplemental=[9], strict=True),
        (1000, 2000, [2000, 9], "/home/app", "app"),
    ),
}


@pytest.mark.parametrize(("user", "expected"), USERS.values(), ids=USERS.keys())
def test_users_are_resolved_in_the_image(client: Client, user: ContainerUser, expected: object) -> None:
    found = create(client, image_of(client, [BASE]), user=user)
    assert (found.uid, found.gid, found.additional_gids, found.home, found.user_name) == expected


@pytest.mark.parametrize(
    "user",
    [
        ContainerUser(name="nobody"),
        ContainerUser(image_user="x:y"),
        ContainerUser(image_user="app:nogroup"),
        ContainerUser(uid=2**32 - 1),
        ContainerUser(uid=-1),
    ],
)
def test_an_unknown_user_is_refused_and_nothing_is_left(
    worker: Worker, client: Client, user: ContainerUser
) -> None:
    image = image_of(client, [BASE])
    error = refusal(lambda: create(client, image, user=user))
    assert error.code is Code.INVALID_ARGUMENT
    no_containers(worker)
    assert client.call(storage.InventoryList()).containers == []


def test_the_image_cannot_lead_the_lookup_out_or_choke_it(worker: Worker, client: Client) -> None:
    (worker.base / "host-passwd").write_text("evil:x:666:666::/:\n")
    link = info("etc/passwd", tarfile.SYMTYPE, linkname=f"{worker.base}/host-passwd")
    outside = image_of(client, [tar_of([(link, b"")])], "quay.io/link:1")
    assert (
        refusal(lambda: create(client, outside, user=ContainerUser(name="evil"))).code
        is Code.INVALID_ARGUMENT
    )
    inside = tar_of(
        [(info("etc/passwd", tarfile.SYMTYPE, linkname="/usr/passwd"), b""), (info("usr/passwd"), PASSWD)]
    )
    followed = image_of(client, [inside], "quay.io/inside:1")
    assert create(client, followed, user=ContainerUser(name="app")).uid == 1000
    for kind in (tarfile.FIFOTYPE, tarfile.DIRTYPE):
        strange = image_of(client, [tar_of([(info("etc/passwd", kind), b"")])], "quay.io/strange:1")
        error = refusal(lambda: create(client, strange, "c2", ContainerUser(name="a")))  # noqa: B023
        assert error.code is Code.INVALID_ARGUMENT
        assert "regular file" in error.text
    for content in (b"a:b:c\n" * 400_000, b"x" * 3_000_000, b"y" * 70_000):
        huge = image_of(client, [simple_tar({"etc/passwd": content})], "quay.io/huge:1")
        error = refusal(lambda: create(client, huge, "c3", ContainerUser(name="a")))  # noqa: B023
        assert "too large" in error.text


# -- mount sources -------------------------------------------------------------------------------------------


def test_mount_sources_are_made_resolved_and_looked_at(worker: Worker, client: Client) -> None:
    base = worker.base
    (base / "file").touch()
    (base / "link").symlink_to(base / "target")
    tmpfs = base / "tmp fs"
    tmpfs.mkdir()
    kernel.mount("t", str(tmpfs), "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_RDONLY)
    kernel.mount("", str(tmpfs), "", kernel.MS_SHARED)
    try:
        sources = [MountSource(path=str(base / p)) for p in ("file", "new/deep", "link", "tmp fs")]
        found = create(client, image_of(client, [BASE]), mounts=sources).mounts
    finally:
        kernel.umount(str(tmpfs))
    assert [m.path for m in found] == [str(base / p) for p in ("file", "new/deep", "target", "tmp fs")]
    assert [m.is_directory for m in found] == [False, True, True, True]
    assert (base / "new").stat().st_mode & 0o777 == 0o755
    assert (base / "target").is_dir()
    assert [m.shared for m in found] == [False, False, False, True]
    assert found[3].locked_flags == ["ro", "nosuid", "nodev"]


def test_a_missing_or_relative_source_is_refused_and_nothing_is_left(worker: Worker, client: Client) -> None:
    image = image_of(client, [BASE])
    missing = MountSource(path=str(worker.base / "nowhere"), create=False)
    error = refusal(lambda: create(client, image, mounts=[missing]))
    assert error.code is Code.FAILED_PRECONDITION
    assert "nowhere" in error.text
    relative = MountSource(path="etc")
    assert refusal(lambda: create(client, image, mounts=[relative])).code is Code.INVALID_ARGUMENT
    no_containers(worker)


def test_devices_and_profiles_are_looked_at_for_cri(worker: Worker, client: Client) -> None:
    image = image_of(client, [BASE])
    nodes = worker.base / "nodes"
    (nodes / "deep").mkdir(parents=True)
    os.mknod(nodes / "deep/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (nodes / "link").symlink_to("deep/null")
    (nodes / "file").touch()
    (worker.base / "profile.json").write_bytes(b"{}")
    profile = str(worker.base / "profile.json")
    found = create(client, image, devices=["/dev/null", str(nodes)], seccomp_profile=profile)
    assert [(d.requested, d.suffix, d.type, d.major, d.minor) for d in found.devices] == [
        ("/dev/null", "", "c", 1, 3),
        (str(nodes), "/link", "c", 1, 3),
        (str(nodes), "/deep/null", "c", 1, 3),
    ]
    assert found.seccomp_profile == b"{}"
    every = {d.requested for d in create(client, image, "all", all_devices=True).devices}
    assert {"/dev/null", "/dev/zero"} <= every
    assert not {"/dev/ptmx", "/dev/console"} & every
    assert not [path for path in every if path.startswith(("/dev/pts/", "/dev/shm/"))]
    for bad in (
        {"devices": [str(nodes / "file")]},
        {"devices": ["dev/null"]},
        {"seccomp_profile": "x"},
        {"seccomp_profile": "/dev/zero"},
    ):
        assert refusal(lambda: create(client, image, "bad", **bad)).code is Code.INVALID_ARGUMENT  # noqa: B023
    for bad in ({"devices": ["/dev/nowhere"]}, {"seccomp_profile": "/nowhere"}):
        assert refusal(lambda: create(client, image, "bad", **bad)).code is Code.FAILED_PRECONDITION  # noqa: B023


@contextlib.contextmanager
def hung_mount(path: Path) -> Iterator[None]:
    """A FUSE mount whose server never answers."""
    path.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    kernel.mount("hung", str(path), "fuse", 0, f"fd={fd},rootmode=40000,user_id=0,group_id=0")
    try:
        yield
    finally:
        os.close(fd)
        kernel.umount(str(path), kernel.MNT_DETACH)


def test_a_hung_mount_source_costs_one_container_and_is_named(worker: Worker, client: Client) -> None:
    image = image_of(client, [BASE])
    hung = worker.base / "hung"
    with hung_mount(hung):
        errors: list[RemoteError] = []
        sources = [MountSource(path=f"{hung}/volume")]

        def ask() -> None:
            with worker.client() as own:
                errors.append(refusal(lambda: create(own, image, mounts=sources)))

        thread = threading.Thread(target=ask)
        started = time.monotonic()
        thread.start()
        while thread.is_alive():
            before = time.monotonic()
            create(client, image, "other")
            assert time.monotonic() - before < 1
            client.call(ContainerRemove(container_id="other"))
        thread.join()
        assert time.monotonic() - started < 5
    assert errors[0].code is Code.DEADLINE_EXCEEDED
    assert str(hung) in errors[0].text
    eventually(lambda: client.call(storage.InventoryList()).containers == [])
    no_containers(worker)


def test_a_call_that_is_given_up_leaves_no_container(worker: Worker, client: Client) -> None:
    image = image_of(client, [BASE])
    hung = worker.base / "hung"
    with hung_mount(hung), worker.client() as impatient:
        request = ContainerCreate(
            container_id="c1",
            pod_id="p",
            image_id=image.id,
            user=ContainerUser(),
            mounts=[MountSource(path=f"{hung}/v")],
        )
        assert refusal(lambda: impatient.call(request, timeout=0.3)).code is Code.DEADLINE_EXCEEDED
        eventually(lambda: client.call(storage.InventoryList()).containers == [])
    no_containers(worker)


# -- pods ---------------------------------------------------------------------------------------------------


def test_a_pod_has_its_files_and_its_shm(worker: Worker, client: Client) -> None:
    request = storage.PodSetup(
        pod_id="p1", hostname="web-0", resolv_conf=b"nameserver 10.0.0.10\n", shm_bytes=1 << 20
    )
    files = client.call(request)
    assert Path(files.resolv_conf).read_bytes() == b"nameserver 10.0.0.10\n"
    assert Path(files.hostname).read_text() == "web-0\n"
    assert "127.0.0.1\tlocalhost\n" in Path(files.hosts).read_text()
    assert "web-0" in Path(files.hosts).read_text()
    assert stat.S_IMODE(os.stat(files.shm).st_mode) == 0o1777
    size = os.statvfs(files.shm)
    assert size.f_blocks * size.f_frsize == 1 << 20
    assert (
        size.f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC) == os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
    )
    inode = os.stat(files.hosts).st_ino
    assert client.call(request) == files
    assert os.stat(files.hosts).st_ino == inode
    assert len(worker.mounts()) == 1
    assert client.call(storage.InventoryList()).pods == ["p1"]
    for _ in range(2):
        client.call(storage.PodTeardown(pod_id="p1"))
    assert worker.mounts() == []
    assert os.listdir(worker.run_root / "pods") == []


def test_a_pod_on_the_hosts_ipc_has_no_shm_and_the_hosts_resolv_conf(worker: Worker, client: Client) -> None:
    files = client.call(storage.PodSetup(pod_id="p1", hostname="", shm_bytes=0))
    assert files.shm == ""
    assert Path(files.resolv_conf).read_bytes() == Path("/etc/resolv.conf").read_bytes()
    assert worker.mounts() == []
    for bad in ("two\nlines", "x" * 65):
        request = storage.PodSetup(pod_id="p2", hostname=bad)
        assert refusal(lambda: client.call(request)).code is Code.INVALID_ARGUMENT  # noqa: B023
    client.call(storage.PodTeardown(pod_id="p1"))


# -- death ---------------------------------------------------------------------------------------------


def test_a_killed_worker_finds_everything_again(worker: Worker, client: Client) -> None:
    image = image_of(client, [BASE])
    root = Path(create(client, image).rootfs)
    files = client.call(storage.PodSetup(pod_id="p1", hostname="h"))
    worker.kill()
    worker.start()
    assert client.call(storage.ImageList()).images[0].id == image.id
    assert client.call(storage.InventoryList()) == storage.Inventory(containers=["c1"], pods=["p1"])
    assert create(client, image).rootfs == str(root)
    assert client.call(storage.PodSetup(pod_id="p1", hostname="h")) == files
    client.call(ContainerRemove(container_id="c1"))
    client.call(storage.PodTeardown(pod_id="p1"))
    no_containers(worker)


def test_a_worker_killed_at_any_moment_of_a_pull_leaves_whole_layers_only(worker: Worker) -> None:
    chance = random.Random(7)
    lower = Layer(simple_tar({f"f{n}": os.urandom(3000) for n in range(300)}))
    upper = Layer(simple_tar({"up": os.urandom(100_000), "f1": b""}), lower.chain_id)
    for _ in range(12):
        delay = chance.uniform(0, 0.12)
        with contextlib.suppress(RemoteError, ConnectionError), worker.client(timeout=3) as client:
            killer = threading.Timer(delay, os.kill, (worker.pid, signal.SIGKILL))
            killer.start()
            for layer in (lower, upper):
                client.call(storage.LayerAbort(chain_id=layer.chain_id))
                upload(client, layer)
                client.call(storage.LayerCommit(chain_id=layer.chain_id), timeout=0.2)
        killer.join()
        worker.wait()
        worker.start()
        with worker.client() as client:
            eventually(lambda: not worker.staged())
            for chain in worker.layers():
                diff = worker.root / "layers" / chain / "diff"
                assert len(os.listdir(diff)) == (300 if chain == lower.chain_id[7:] else 2)
            image = put_image(client, [lower, upper])
            client.call(storage.ImageRemove(reference=image.id))
            eventually(lambda: not worker.layers())
    eventually(lambda: not worker.staged() and not worker.children())


def test_a_worker_killed_at_any_moment_of_a_create_can_be_cleaned_up(worker: Worker) -> None:
    chance = random.Random(8)
    with worker.client() as client:
        image = image_of(client, [BASE])
    for _ in range(12):
        killer = threading.Timer(chance.uniform(0, 0.03), os.kill, (worker.pid, signal.SIGKILL))
        with contextlib.suppress(RemoteError, ConnectionError), worker.client(timeout=2) as client:
            killer.start()
            request = ContainerCreate(container_id="c1", pod_id="p", image_id=image.id, user=ContainerUser())
            client.call(request, timeout=0.2)
        killer.join()
        worker.wait()
        worker.start()
        with worker.client() as client:
            for container_id in client.call(storage.InventoryList()).containers:
                client.call(ContainerRemove(container_id=container_id))
            no_containers(worker)
            assert client.call(storage.ImageList()).images[0].in_use == 0


def test_a_layer_renamed_into_place_before_its_row_was_written_is_adopted(
    worker: Worker, client: Client
) -> None:
    image = image_of(client, [BASE, simple_tar({"b": b""})])
    worker.kill()
    with sqlite3.connect(worker.root / "images.db") as database:
        database.execute("DELETE FROM layers")
    worker.start()
    found = client.call(storage.ImageGet(reference=image.id)).image
    assert found is not None
    assert found.size == image.size
    assert sorted(os.listdir(create(client, found).rootfs)) == ["b", "bin", "dir", "etc", "gone"]


def test_an_image_that_lost_a_layer_is_pulled_again_and_no_other_suffers(
    worker: Worker, client: Client
) -> None:
    damaged = image_of(client, [BASE, simple_tar({"b": b""})], "quay.io/damaged:1")
    whole = image_of(client, [BASE], "quay.io/whole:1")
    running = Path(create(client, damaged).rootfs)
    worker.kill()
    subprocess.run(["rm", "-rf", str(worker.root / "layers" / damaged.layers[1][7:])], check=True)
    worker.start()
    assert [image.id for image in client.call(storage.ImageList()).images] == [whole.id]
    assert client.call(storage.ImageGet(reference="quay.io/damaged:1")).image is None
    assert (running / "etc/passwd").read_bytes() == PASSWD
    again = image_of(client, [BASE, simple_tar({"b": b""})], "quay.io/damaged:1")
    assert again.id == damaged.id
    assert again.in_use == 1


def test_an_unreadable_database_is_put_aside_and_the_layers_are_kept(worker: Worker, client: Client) -> None:
    image_of(client, [BASE])
    worker.stop()
    (worker.root / "images.db").write_bytes(b"not a database" * 1000)
    worker.start()
    assert client.call(storage.ImageList()).images == []
    assert len(worker.layers()) == 1
    assert not upload(client, Layer(BASE))
    assert [p for p in os.listdir(worker.root) if p.startswith("images.db.broken")]


def test_a_reboot_leaves_containers_to_be_removed(worker: Worker, client: Client) -> None:
    image = image_of(client, [BASE])
    create(client, image)
    worker.stop()
    for mount in worker.mounts():
        kernel.umount(mount)
    subprocess.run(["rm", "-rf", str(worker.run_root)], check=True)
    worker.start()
    assert client.call(storage.InventoryList()).containers == ["c1"]
    client.call(ContainerRemove(container_id="c1"))
    no_containers(worker)


def test_a_full_disk_is_an_answer_and_not_the_end_of_the_worker() -> None:
    worker = Worker()
    worker.root.mkdir()
    kernel.mount("small", str(worker.root), "tmpfs", 0, "size=4m,mode=700")
    with worker, worker.client() as client:
        pid = worker.pid
        image = image_of(client, [BASE])
        large = Layer(simple_tar({"data": os.urandom(6_000_000)}))
        upload(client, large)
        error = refusal(lambda: commit(client, large))
        assert error.code is Code.RESOURCE_EXHAUSTED, error
        eventually(lambda: not worker.staged())
        rootfs = Path(create(client, image).rootfs)
        with contextlib.suppress(OSError), (rootfs / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(os.urandom(4096))
        upload(client, large)
        assert refusal(lambda: commit(client, large)).code is Code.RESOURCE_EXHAUSTED
        for number in range(20):  # each needs a little; sooner or later there is none
            try:
                create(client, image, f"more{number}")
            except RemoteError as full:
                assert full.code is Code.RESOURCE_EXHAUSTED, full
                break
        client.call(ContainerRemove(container_id="c1"))
        eventually(lambda: not worker.staged())
        for container_id in client.call(storage.InventoryList()).containers:
            client.call(ContainerRemove(container_id=container_id))
        create(client, image, "c2")
        assert worker.pid == pid


def test_an_idle_worker_is_small(worker: Worker, client: Client) -> None:
    create(client, image_of(client, [BASE]))
    client.call(ContainerRemove(container_id="c1"))
    rollup = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
    pss = int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")))
    assert pss < 16_000, f"{pss} kB"
