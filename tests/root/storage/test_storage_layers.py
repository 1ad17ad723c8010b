"""Runs in: pytest, as root. Layers through the worker: what is unpacked, what is refused, what is left."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import stat
import struct
import subprocess
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from ipc.blocking import Client
from ipc.errors import Code
from ipc.messages import storage
from tests.support.storage_worker import (
    Layer,
    Worker,
    commit,
    eventually,
    in_background,
    info,
    pour,
    put_image,
    refusal,
    simple_tar,
    tar_of,
    upload,
)

DIR, SYM, LNK, CHR, BLK, FIFO = (
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(unpack_max_entries=5000, unpack_max_bytes=400 * 1024**2, unpack_max_ratio=50) as running:
        yield running


@pytest.fixture
def client(worker: Worker) -> Iterator[Client]:
    with worker.client() as connected:
        yield connected


def diff_of(worker: Worker, layer: Layer) -> Path:
    return worker.root / "layers" / layer.chain_id[7:] / "diff"


def store(client: Client, tar: bytes, parent: str = "") -> Layer:
    layer = Layer(tar, parent)
    assert upload(client, layer)
    commit(client, layer)
    return layer


def nothing_left(worker: Worker) -> None:
    eventually(lambda: not worker.staged() and not worker.children() and not worker.layers())


# -- what is unpacked -----------------------------------------------------------------------------------

ZOO = [
    (info("etc/", DIR, mode=0o750, uid=12, gid=34, mtime=1_600_000_000), b""),
    (info("etc/file", uid=1000, gid=70000, mode=0o640), b"hello"),
    (info("bin/su", mode=0o4755), b"setuid"),
    (info("bin/wall", mode=0o2755, gid=5), b"setgid"),
    (info("tmp", DIR, mode=0o1777), b""),
    (info("bin/hard", LNK, linkname="bin/su"), b""),
    (info("lib64", SYM, linkname="/usr/lib64", uid=3, gid=4), b""),
    (info("usr/bin/up", SYM, linkname="../../bin/su"), b""),
    (info("dev/null", CHR, devmajor=1, devminor=3, mode=0o666), b""),
    (info("dev/loop0", BLK, devmajor=7, devminor=0, uid=6), b""),
    (info("run/fifo", FIFO, mode=0o600), b""),
    (info("closed", DIR, mode=0), b""),
    (info("closed/inside", mode=0), b"x"),
    (info("others", DIR, mode=0o700, uid=4321), b""),
    (info("others/deep/er/file", uid=4321), b"y" * 3_000_000),
    (info("n" * 200 + "/" + "m" * 200), b"long names"),
    (info("Umläut-\udcff"), b"any bytes"),
    (info("precise", mtime=1_500_000_000.25), b""),
    (info("old", mtime=-86400), b""),
    (info("empty"), b""),
]


def facts(root: Path) -> dict[str, tuple[object, ...]]:
    """What there is to compare of a tree."""
    found: dict[str, tuple[object, ...]] = {}
    for base, directories, files in os.walk(os.fsencode(root)):
        for name in directories + files:
            path = os.path.join(base, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            size = 0 if stat.S_ISDIR(kind) else status.st_size
            target = os.readlink(path) if stat.S_ISLNK(kind) else b""
            links = 1 if stat.S_ISDIR(kind) else status.st_nlink
            content = Path(os.fsdecode(path)).read_bytes() if stat.S_ISREG(kind) else b""
            attributes = tuple(
                (n, os.getxattr(path, n, follow_symlinks=False))
                for n in sorted(os.listxattr(path, follow_symlinks=False))
            )
            relative = os.fsdecode(os.path.relpath(path, os.fsencode(root)))
            owner = (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), status.st_rdev)
            found[relative] = (kind, *owner, size, target, links, content, attributes, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_layer_is_unpacked_as_tar_unpacks_it(worker: Worker, client: Client, format_: int) -> None:
    members = [m for m in ZOO if format_ == tarfile.PAX_FORMAT or m[0].mtime == int(m[0].mtime)]
    tar = tar_of(members, format_)
    layer = store(client, tar)
    reference = worker.base / "reference"
    reference.mkdir()
    subprocess.run(
        ["tar", "-x", "--same-owner", "-p", "--numeric-owner", "--xattrs"],
        input=tar,
        cwd=reference,
        check=True,
    )
    mine, tars = facts(diff_of(worker, layer)), facts(reference)
    implied = {"bin", "usr", "usr/bin", "dev", "run", "others/deep", "others/deep/er", "n" * 200}
    assert mine.keys() == tars.keys()
    for name in mine.keys() - implied:
        assert mine[name] == tars[name], name
    for name in implied:
        assert mine[name][:4] == (stat.S_IFDIR, 0, 0, 0o755), name


def test_extended_attributes_and_file_capabilities_are_kept(worker: Worker, client: Client) -> None:
    capability = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw+ep
    ping, labelled = info("bin/ping", uid=7), info("dir", DIR)
    ping.pax_headers = {"SCHILY.xattr.security.capability": capability.decode("latin-1")}
    labelled.pax_headers = {"SCHILY.xattr.user.note": "yes", "SCHILY.xattr.security.selinux": "system_u"}
    layer = store(client, tar_of([(ping, b"elf"), (labelled, b"")]))
    diff = diff_of(worker, layer)
    assert os.getxattr(diff / "bin/ping", "security.capability") == capability
    assert os.listxattr(diff / "dir") == ["user.note"]


@pytest.mark.parametrize("format_", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_files_keep_their_holes(worker: Worker, client: Client, format_: str) -> None:
    source = worker.base / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as file:
        for offset in range(0, 30 * 1024**2, 1024**2):
            file.seek(offset)
            file.write(b"data" * 1024)
        file.truncate(64 * 1024**2)
    options = ["--format=gnu"] if format_ == "gnu" else ["--format=pax", f"--sparse-version={format_}"]
    tar = subprocess.run(
        ["tar", "-cS", *options, "sparse"], cwd=source, check=True, capture_output=True
    ).stdout
    assert len(tar) < 2 * 1024**2
    layer = store(client, tar)
    unpacked = diff_of(worker, layer) / "sparse"
    assert unpacked.read_bytes() == (source / "sparse").read_bytes()
    assert unpacked.stat().st_blocks * 512 < 2 * 1024**2


@pytest.mark.parametrize(
    "compress",
    [
        lambda data: data,
        lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + bytes(1024),
        lambda data: zstandard.ZstdCompressor().compress(data),
        lambda data: (
            b"\x50\x2a\x4d\x18\x03\0\0\0abc"
            + zstandard.ZstdCompressor().compress(data[:5000])
            + zstandard.ZstdCompressor().compress(data[5000:])
        ),
    ],
    ids=["plain", "gzip members", "zstd", "zstd frames"],
)
def test_every_compression_is_told_by_its_first_bytes(
    worker: Worker, client: Client, compress: object
) -> None:
    assert callable(compress)
    layer = Layer(simple_tar({"a": os.urandom(100_000), "b": bytes(500_000)}), compress=compress)
    upload(client, layer)
    assert commit(client, layer).entries == 2
    assert (diff_of(worker, layer) / "b").stat().st_size == 500_000


def test_whiteouts_become_what_overlayfs_understands(worker: Worker, client: Client) -> None:
    below = store(client, simple_tar({"gone": b"", "dir/x": b"", "again/x": b"", "kept": b""}))
    members = [
        (info(".wh.gone"), b""),
        (info("dir/.wh..wh..opq"), b""),
        (info("dir/new"), b""),
        (info(".wh.again"), b""),
        (info("again/y"), b""),
        (info("kept"), b"mine"),
        (info(".wh.kept"), b""),
        (info(".wh..wh.plnk/17"), b""),
    ]
    layer = store(client, tar_of(members), below.chain_id)
    diff = diff_of(worker, layer)
    status = (diff / "gone").lstat()
    assert stat.S_ISCHR(status.st_mode)
    assert status.st_rdev == 0
    assert os.getxattr(diff / "dir", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(diff / "again", "trusted.overlay.opaque") == b"y"
    assert (diff / "kept").read_bytes() == b"mine"
    assert sorted(os.listdir(diff)) == ["again", "dir", "gone", "kept"]


def test_directories_that_are_only_implied_look_as_they_do_below(worker: Worker, client: Client) -> None:
    described = info("a", DIR, mode=0o2711, uid=5, gid=6, mtime=1_234_567_890)
    described.pax_headers = {"SCHILY.xattr.user.color": "red"}
    root = info("./", DIR, mode=0o710, uid=9, mtime=1_111_111_111)
    lowest = store(
        client, tar_of([(root, b""), (described, b""), (info("a/b", DIR, mode=0o700, uid=8), b"")])
    )
    middle = store(client, simple_tar({"other": b""}), lowest.chain_id)
    top = store(client, simple_tar({"a/b/c/file": b""}), middle.chain_id)
    diff = diff_of(worker, top)
    assert (diff.stat().st_mode & 0o7777, diff.stat().st_uid) == (0o710, 9)
    status = (diff / "a").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o2711, 5, 6)
    assert status.st_mtime == 1_234_567_890
    assert os.getxattr(diff / "a", "user.color") == b"red"
    assert ((diff / "a/b").stat().st_mode & 0o7777, (diff / "a/b").stat().st_uid) == (0o700, 8)
    assert ((diff / "a/b/c").stat().st_mode & 0o7777, (diff / "a/b/c").stat().st_uid) == (0o755, 0)


def test_a_hidden_directory_gives_no_looks_to_a_new_one(worker: Worker, client: Client) -> None:
    lowest = store(client, tar_of([(info("d", DIR, mode=0o700, uid=5), b"")]))
    hiding = store(client, tar_of([(info(".wh.d"), b"")]), lowest.chain_id)
    top = store(client, simple_tar({"d/x": b""}), hiding.chain_id)
    status = (diff_of(worker, top) / "d").stat()
    assert (status.st_mode & 0o7777, status.st_uid) == (0o755, 0)


def test_later_entries_replace_earlier_ones(worker: Worker, client: Client) -> None:
    members = [
        (info("file"), b"first"),
        (info("file", mode=0o600), b"second"),
        (info("tree/a/b/c"), b""),
        (info("tree/link", SYM, linkname="a"), b""),
        (info("tree"), b"now a file"),
        (info("was-link", SYM, linkname="file"), b""),
        (info("was-link"), b"content"),
        (info("dir", DIR, mode=0o700), b""),
        (info("dir/kept"), b""),
        (info("dir", DIR, mode=0o711), b""),
        (info("itself"), b"x"),
        (info("itself", LNK, linkname="itself"), b""),
    ]
    layer = store(client, tar_of(members))
    diff = diff_of(worker, layer)
    assert (diff / "file").read_bytes() == b"second"
    assert (diff / "tree").read_bytes() == b"now a file"
    assert (diff / "was-link").read_bytes() == b"content"
    assert (diff / "dir/kept").exists()
    assert (diff / "dir").stat().st_mode & 0o777 == 0o711
    assert (diff / "itself").read_bytes() == b"x"


def test_names_may_begin_at_the_image_root_and_pass_relative_links_of_the_layer(
    worker: Worker, client: Client
) -> None:
    members = [
        (info("/ko-app/app"), b"absolute"),
        (info("usr/lib", DIR), b""),
        (info("lib", SYM, linkname="usr/lib"), b""),
        (info("usr/lib/here", SYM, linkname="../lib"), b""),
        (info("lib/here/libc.so"), b"through"),
        (info("hard", LNK, linkname="/lib/libc.so"), b""),
    ]
    diff = diff_of(worker, store(client, tar_of(members)))
    assert (diff / "ko-app/app").read_bytes() == b"absolute"
    assert (diff / "usr/lib/libc.so").read_bytes() == b"through"
    assert (diff / "usr/lib/libc.so").samefile(diff / "hard")


def test_directories_deeper_than_a_path_may_be_are_refused_and_deep_ones_deleted(
    worker: Worker, client: Client
) -> None:
    deep = store(client, simple_tar({"/".join(["d" * 100] * 39) + "/f": b""}))
    image = put_image(client, [deep])
    client.call(storage.ImageRemove(reference=image.id))
    nothing_left(worker)
    layer = Layer(simple_tar({"/".join(["d" * 100] * 42) + "/f": b""}))
    upload(client, layer)
    assert refusal(lambda: commit(client, layer)).code is Code.INVALID_ARGUMENT
    nothing_left(worker)


# -- what is refused ------------------------------------------------------------------------------------


def hostile_xattr() -> tuple[tarfile.TarInfo, bytes]:
    header = info("x", DIR)
    header.pax_headers = {"SCHILY.xattr.trusted.overlay.redirect": "/etc"}
    return header, b""


HOSTILE = {
    "dot dot": [(info("../evil"), b"")],
    "dot dot within": [(info("a/../../evil"), b"")],
    "absolute dot dot": [(info("/../evil"), b"")],
    "hard link out": [(info("l", LNK, linkname="../../etc/passwd"), b"")],
    "hard link to the host": [(info("l", LNK, linkname="/etc/passwd"), b"")],
    "hard link to nothing": [(info("l", LNK, linkname="nothing"), b"")],
    "hard link to a directory": [(info("d", DIR), b""), (info("l", LNK, linkname="d"), b"")],
    "hard link through a link": [
        (info("e", SYM, linkname="/etc"), b""),
        (info("l", LNK, linkname="e/passwd"), b""),
    ],
    "link out of the root": [(info("a/l", SYM, linkname="../../etc"), b"")],
    "write through an absolute link": [(info("l", SYM, linkname="/etc"), b""), (info("l/evil"), b"")],
    "write through links that climb": [
        (info("a/b/c", DIR), b""),
        (info("x", SYM, linkname="a/b/c"), b""),
        (info("y", SYM, linkname="x/.."), b""),
        (info("a/b/z", SYM, linkname="../.."), b""),
        (info("l", SYM, linkname="l"), b""),
        (info("l/evil"), b""),
    ],
    "through a file": [(info("f"), b""), (info("f/evil"), b"")],
    "whiteout of dot dot": [(info("a/.wh..."), b"")],
    "whiteout of nothing": [(info("a/.wh."), b"")],
    "root as a file": [(info("./"), b""), (info("."), b"")],
    "trusted attribute": [hostile_xattr()],
    "impossible device": [(info("d", CHR, devmajor=0o777777, devminor=1), b"")],
    "name too long": [(info("x" * 300), b"")],
    "unknown type": [(info("x", b"M"), b"")],
    "owner minus one": [(info("x", uid=2**32 - 1), b"")],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    worker: Worker, client: Client, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    victim = worker.base / "evil"
    layer = Layer(tar_of([(info("innocent"), b"x"), *members]))
    upload(client, layer)
    error = refusal(lambda: commit(client, layer))
    assert error.code is Code.INVALID_ARGUMENT, error
    assert not victim.exists()
    assert not Path("/etc/evil").exists()
    nothing_left(worker)


def test_a_device_node_can_be_made_but_not_opened_by_the_child(worker: Worker, client: Client) -> None:
    """Later entries write to names, never through nodes; and the child's mount is nodev all the same."""
    members = [(info("disk", BLK, devmajor=7, devminor=7), b""), (info("disk"), b"content")]
    diff = diff_of(worker, store(client, tar_of(members)))
    assert stat.S_ISREG((diff / "disk").lstat().st_mode)


BIG = simple_tar({"data": os.urandom(300_000)})
LIES = {
    "digest": ({"blob_digest": "sha256:" + "0" * 64}, None),
    "longer": ({"blob_size": 10_000_000}, None),
    "shorter": ({"blob_size": 100}, None),
    "cut off": ({}, Layer(BIG).blob[:-1000]),
    "more": ({}, Layer(BIG).blob + b"more"),
    "damaged": ({}, Layer(BIG).blob[:5000] + b"\0\1\2\3" + Layer(BIG).blob[5004:]),
    "empty": ({}, b""),
}


@pytest.mark.parametrize(("changes", "blob"), LIES.values(), ids=LIES.keys())
def test_a_blob_that_is_not_what_was_announced_is_data_loss(
    worker: Worker, client: Client, changes: dict[str, object], blob: bytes | None
) -> None:
    layer = Layer(BIG)
    upload(client, layer, blob, **changes)
    error = refusal(lambda: commit(client, layer))
    assert error.code is Code.DATA_LOSS, error
    nothing_left(worker)


def test_a_wrong_diff_id_is_data_loss(worker: Worker, client: Client) -> None:
    layer = Layer(BIG)
    layer.diff_id = layer.chain_id = "sha256:" + "1" * 64
    upload(client, layer)
    assert refusal(lambda: commit(client, layer)).code is Code.DATA_LOSS
    nothing_left(worker)


def test_a_chain_id_that_does_not_follow_is_refused(client: Client) -> None:
    layer = Layer(BIG)
    layer.chain_id = "sha256:" + "1" * 64
    assert refusal(lambda: upload(client, layer)).code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "blob", [b"this is no archive" * 100, gzip.compress(os.urandom(2000)), b"\x1f\x8bjunk" * 100]
)
def test_what_is_no_archive_is_refused(worker: Worker, client: Client, blob: bytes) -> None:
    layer = Layer(blob, compress=lambda data: data)
    if blob[:2] == b"\x1f\x8b" and blob[2:6] != b"junk":
        layer.diff_id = layer.chain_id = Layer(zlib.decompress(blob, 31)).diff_id
    upload(client, layer)
    assert refusal(lambda: commit(client, layer)).code is Code.INVALID_ARGUMENT
    nothing_left(worker)


def gzip_bomb(size: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    head = info("zeros")
    head.size = size
    parts = [packer.compress(head.tobuf())]
    parts += [packer.compress(bytes(1024**2)) for _ in range(size // 1024**2)]
    return b"".join([*parts, packer.flush()])


def zstd_bomb(size: int) -> bytes:
    packer = zstandard.ZstdCompressor().compressobj()
    head = info("zeros")
    head.size = size
    parts = [packer.compress(head.tobuf())]
    parts += [packer.compress(bytes(1024**2)) for _ in range(size // 1024**2)]
    return b"".join([*parts, packer.flush()])


@pytest.mark.parametrize("bomb", [gzip_bomb, zstd_bomb])
@pytest.mark.parametrize("megabytes", [300, 500], ids=["ratio", "bytes"])
def test_a_bomb_is_resource_exhausted(worker: Worker, client: Client, bomb: object, megabytes: int) -> None:
    assert callable(bomb)
    layer = Layer(b"", compress=lambda _: bomb(megabytes * 1024**2))
    upload(client, layer)
    error = refusal(lambda: commit(client, layer))
    assert error.code is Code.RESOURCE_EXHAUSTED, error
    nothing_left(worker)


def test_too_many_entries_are_resource_exhausted(worker: Worker, client: Client) -> None:
    layer = Layer(tar_of((info(f"f{n}"), b"") for n in range(5001)))
    upload(client, layer)
    assert refusal(lambda: commit(client, layer)).code is Code.RESOURCE_EXHAUSTED
    implied = Layer(simple_tar({"/".join("abcdefgh"): b"", **{f"{n}/a/b": b"" for n in range(2000)}}))
    upload(client, implied)
    assert refusal(lambda: commit(client, implied)).code is Code.RESOURCE_EXHAUSTED
    nothing_left(worker)


# -- the unpack child's cage ----------------------------------------------------------------------------


def test_an_unpack_child_sees_only_its_layer_and_holds_five_capabilities(
    worker: Worker, client: Client
) -> None:
    layer = Layer(BIG)
    _reply, fds = client.call_fds(layer.begin())
    with fds:
        os.write(fds.get(), layer.blob[:5000])
        eventually(
            lambda: [c for c in worker.children() if "Seccomp:\t2" in Path(f"/proc/{c}/status").read_text()]
        )
        (child,) = worker.children()
        status = Path(f"/proc/{child}/status").read_text()
        mounts = Path(f"/proc/{child}/mountinfo").read_text().splitlines()
        title = Path(f"/proc/{child}/cmdline").read_bytes()
        assert "NoNewPrivs:\t1" in status
        capabilities = int(status.split("CapEff:\t")[1].split()[0], 16)
        assert bin(capabilities).count("1") == 5
        assert capabilities & (1 << 21 | 1 << 1) == 0  # SYS_ADMIN, DAC_OVERRIDE
        assert len(mounts) == 1
        assert {"nodev", "nosuid", "noexec"} <= set(mounts[0].split()[5].split(","))
        assert title.startswith(b"bulkhead: unpack")
        assert sorted(os.listdir(f"/proc/{child}/root")) in ([], ["data"])
    assert refusal(lambda: commit(client, layer)).code is Code.DATA_LOSS
    nothing_left(worker)


@pytest.mark.parametrize("uid", [0, 65534])
def test_unpacking_works_as_another_user(uid: int) -> None:
    with Worker(unpack_uid=uid) as worker, worker.client() as client:
        below = store(client, tar_of(ZOO))
        layer = store(client, tar_of([*ZOO, (info(".wh.etc"), b""), (info("x/y"), b"")]), below.chain_id)
        assert (diff_of(worker, layer) / "bin/su").stat().st_mode & 0o7777 == 0o4755
        assert (diff_of(worker, layer) / "bin/su").stat().st_uid == 0
        assert (diff_of(worker, layer)).stat().st_uid == 0


# -- begin, commit, abort -------------------------------------------------------------------------------


def test_a_layer_that_is_there_is_present_and_committed_again_with_the_same_answer(
    worker: Worker, client: Client
) -> None:
    layer = Layer(BIG)
    assert upload(client, layer)
    first = commit(client, layer)
    assert not upload(client, layer)
    assert commit(client, layer) == first
    assert first.size >= 300_000
    assert worker.staged() == []


def test_layers_unpack_at_the_same_time_and_are_committed_in_chain_order(
    worker: Worker, client: Client
) -> None:
    lower = Layer(simple_tar({"a": os.urandom(200_000)}))
    upper = Layer(simple_tar({"b": os.urandom(200_000)}), lower.chain_id)
    _, lower_fds = client.call_fds(lower.begin())
    _, upper_fds = client.call_fds(upper.begin())
    pour(upper_fds.take(), upper.blob)
    error = refusal(lambda: commit(client, upper))
    assert error.code is Code.FAILED_PRECONDITION
    pour(lower_fds.take(), lower.blob)
    commit(client, lower)
    commit(client, upper)
    assert len(worker.layers()) == 2


def test_a_layer_begun_again_throws_the_first_staging_away(worker: Worker, client: Client) -> None:
    layer = Layer(BIG)
    _, first = client.call_fds(layer.begin())
    with first:
        os.write(first.get(), layer.blob[:1000])
        assert upload(client, layer)
        commit(client, layer)
        eventually(lambda: not worker.staged())
    assert len(worker.layers()) == 1


def test_an_aborted_layer_leaves_nothing_and_commit_says_begin_again(worker: Worker, client: Client) -> None:
    layer = Layer(BIG)
    _, fds = client.call_fds(layer.begin())
    with fds:
        client.call(storage.LayerAbort(chain_id=layer.chain_id))
        nothing_left(worker)
        assert refusal(lambda: commit(client, layer)).code is Code.UNAVAILABLE


@pytest.mark.parametrize("whole", [False, True])
def test_a_connection_that_closes_takes_its_stagings_with_it(worker: Worker, whole: bool) -> None:
    client = worker.client()
    layer = Layer(BIG)
    _, fds = client.call_fds(layer.begin())
    with fds:
        if whole:
            pour(fds.take(), layer.blob)
            eventually(lambda: not worker.children())
        client.close()
        nothing_left(worker)


def test_a_commit_that_waits_is_answered_when_the_blob_has_come(worker: Worker, client: Client) -> None:
    layer = Layer(BIG)
    _, fds = client.call_fds(layer.begin())
    answers: list[object] = []
    thread = in_background(lambda: answers.append(commit(client, layer)))
    time.sleep(0.1)
    pour(fds.take(), layer.blob)
    thread.join()
    assert isinstance(answers[0], storage.LayerCommitted)


def test_a_commit_that_has_started_is_finished_without_its_caller(worker: Worker) -> None:
    client = worker.client()
    layer = Layer(simple_tar({"data": os.urandom(2_000_000)}))
    _, fds = client.call_fds(layer.begin())
    pour(fds.take(), layer.blob)
    eventually(lambda: not worker.children())
    answers: list[storage.LayerCommitted] = []  # the client asks again on a new connection
    thread = in_background(lambda: answers.append(commit(client, layer)))
    while not (committing := worker.children()):
        assert not worker.layers(), "the commit was too quick to be interrupted"
    os.kill(committing[0], signal.SIGSTOP)
    channel = client._channel
    assert channel is not None
    socket.socket(fileno=os.dup(channel.fileno())).shutdown(socket.SHUT_RDWR)
    with worker.client() as other:
        assert other.call(storage.InventoryList()).pods == []
        assert worker.layers() == []
        os.kill(committing[0], signal.SIGCONT)
        committed = commit(other, layer)
    thread.join()
    client.close()
    assert answers == [committed]
    assert worker.staged() == []


def test_a_killed_unpack_child_fails_its_layer_only(worker: Worker, client: Client) -> None:
    layer = Layer(BIG)
    _, fds = client.call_fds(layer.begin())
    with fds:
        eventually(worker.children)
        os.kill(worker.children()[0], signal.SIGKILL)
        error = refusal(lambda: commit(client, layer))
    assert error.code is Code.UNAVAILABLE
    nothing_left(worker)
    assert upload(client, layer)
    commit(client, layer)


def test_a_child_that_takes_too_long_is_killed() -> None:
    with Worker(unpack_timeout=0.3) as worker, worker.client() as client:
        layer = Layer(BIG)
        _, fds = client.call_fds(layer.begin())
        with fds:
            assert refusal(lambda: commit(client, layer)).code is Code.DEADLINE_EXCEEDED
        nothing_left(worker)
