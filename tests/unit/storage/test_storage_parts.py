"""Runs in: pytest. Storage's sans-I/O parts and those that need no privilege."""

from __future__ import annotations

import gzip
import hashlib
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from ipc.errors import Code, RemoteError
from workers.storage import decompress, mounts, users, whiteouts
from workers.storage.commit import find_below
from workers.storage.database import Database, LayerRow
from workers.storage.decompress import BrokenStream, HashedSource
from workers.storage.extract import check_link, split
from workers.storage.layers import chain_id_of
from workers.storage.mounts import Progress
from workers.storage.paths import checked_digest, checked_id
from workers.storage.pods import hosts
from workers.storage.serial import Done, Serial
from workers.storage.trees import delete_trees
from workers.storage.unpack import Lane, _Closed
from workers.storage.whiteouts import Meaning

TEXT = b"".join(hashlib.sha256(str(n).encode()).digest() * 50 for n in range(3000))


def source(data: bytes, size: int = 1000) -> HashedSource:
    position = 0

    def read(limit: int) -> bytes:
        nonlocal position
        piece = data[position : position + min(limit, size)]
        position += len(piece)
        return piece

    return HashedSource(read)


@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
@pytest.mark.parametrize(
    "pack",
    [
        bytes,
        gzip.compress,
        lambda t: gzip.compress(t[:70]) + gzip.compress(b"") + gzip.compress(t[70:]) + bytes(5000),
        lambda t: zstandard.ZstdCompressor().compress(t),
        lambda t: zstandard.ZstdCompressor().compress(t[:9]) + zstandard.ZstdCompressor().compress(t[9:]),
    ],
)
def test_streams_are_inflated_hashed_and_counted(pack: Callable[[bytes], bytes], size: int) -> None:
    text = TEXT[:5000] if size == 1 else TEXT
    data = pack(text)
    stream = source(data, size)
    chunks = list(decompress.plain(stream))
    stream.drain()
    assert b"".join(chunks) == text
    assert max(map(len, chunks)) <= decompress.CHUNK
    assert (stream.size, stream.digest) == (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(TEXT)[:-9],
        gzip.compress(TEXT) + b"\0\0junk",
        gzip.compress(TEXT)[:500] + b"\0" * 100 + gzip.compress(TEXT)[600:],
        b"\x1f\x8b\x08",
        zstandard.ZstdCompressor().compress(TEXT) + b"junkjunk",
    ],
)
def test_a_damaged_stream_is_told(data: bytes) -> None:
    with pytest.raises(BrokenStream):
        list(decompress.plain(source(data)))


def test_a_bomb_comes_out_in_small_pieces() -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(64)), packer.flush()])
    assert sum(len(c) for c in decompress.plain(source(bomb, 1 << 20))) == 64 << 20
    assert all(len(c) <= decompress.CHUNK for c in decompress.plain(source(bomb, 1 << 20)))


def test_a_lane_hands_over_everything_and_then_the_error() -> None:
    lane = Lane()
    got: list[bytes] = []

    def consume() -> None:
        with pytest.raises(KeyError):
            got.extend(lane)

    thread = threading.Thread(target=consume)
    thread.start()
    for number in range(100):
        lane.put(str(number).encode())
    lane.end(KeyError("x"))
    thread.join()
    assert len(got) == 100
    lane.close()
    with pytest.raises(_Closed):
        lane.put(b"")


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (b"file", (Meaning.PLAIN, b"file")),
        (b".whfile", (Meaning.PLAIN, b".whfile")),
        (b".wh.file", (Meaning.WHITEOUT, b"file")),
        (b".wh..wh..opq", (Meaning.OPAQUE, b"")),
        (b".wh..wh.plnk", (Meaning.METADATA, b"")),
        (b".wh..hidden", (Meaning.WHITEOUT, b".hidden")),
    ],
)
def test_names_mean_what_the_image_spec_says(base: bytes, expected: tuple[Meaning, bytes]) -> None:
    assert whiteouts.meaning(base) == expected


@pytest.mark.parametrize("base", [b".wh.", b".wh..", b".wh..."])
def test_whiteouts_of_no_name_are_refused(base: bytes) -> None:
    with pytest.raises(RemoteError):
        whiteouts.meaning(base)


def test_names_are_split_and_those_that_climb_refused() -> None:
    assert split(b"./a//b/./c/") == [b"a", b"b", b"c"]
    assert split(b"/") == []
    for name in (b"..", b"a/../b", b"a/..", b"x\0y"):
        with pytest.raises(RemoteError):
            split(name)
    for target in (b"/anywhere", b"x", b"../x", b"../../y/../z"):
        check_link([b"a", b"b", b"l"], target)
    for target in (b"../../../x", b"x/../../../../y"):
        with pytest.raises(RemoteError):
            check_link([b"a", b"b", b"l"], target)


def test_chain_ids_follow_the_image_spec() -> None:
    first, second = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    assert chain_id_of("", first) == first
    assert chain_id_of(first, second) == "sha256:" + hashlib.sha256(f"{first} {second}".encode()).hexdigest()


def test_ids_and_digests_are_checked() -> None:
    assert checked_id("a1_B.c-d", "pod") == "a1_B.c-d"
    for bad in ("", ".", "..", "a/b", "a\0", "a" * 129):
        with pytest.raises(RemoteError):
            checked_id(bad, "pod")
    for bad in ("", "sha256:xyz", "md5:" + "a" * 32, "sha256:" + "A" * 64, "sha256:" + "a" * 64 + "\n"):
        with pytest.raises(RemoteError):
            checked_digest(bad, "layer")


def test_operations_on_one_key_wait_for_each_other() -> None:
    serial, ran, ends = Serial(), list[str](), list[Done]()

    def operation(name: str) -> Callable[[Done], object]:
        def run(done: Done) -> None:
            ran.append(name)
            ends.append(done)

        return run

    serial.run("k", operation("first"))
    serial.run("k", operation("second"))
    serial.run("other", operation("third"))
    assert ran == ["first", "third"]
    ends[0]()
    ends[0]()  # called again: nothing
    assert ran == ["first", "third", "second"]
    ends[1]()
    ends[2]()
    assert not serial.busy("k")


def test_a_line_of_operations_that_end_at_once_runs_through() -> None:
    serial, ran = Serial(), list[int]()
    ends: list[Done] = []
    serial.run("k", ends.append)

    def operation(number: int) -> Callable[[Done], object]:
        def run(done: Done) -> None:
            ran.append(number)
            done()

        return run

    for number in range(5):
        serial.run("k", operation(number))
    ends[0]()
    assert ran == [0, 1, 2, 3, 4]


def test_mountinfo_lines_are_read() -> None:
    line = r"36 35 98:0 /mnt1 /mnt\0402\134x rw,noatime,nosuid shared:7 master:1 - ext3 /dev/root rw"
    mount = mounts.parse_mountinfo(line)
    assert mount.mount_point == "/mnt 2\\x"
    assert mount.options == ("rw", "noatime", "nosuid")
    assert mount.shared
    assert mount.slave
    plain = mounts.parse_mountinfo("36 35 98:0 / / ro - ext3 /dev/root rw")
    assert not plain.shared
    assert not plain.slave


def test_overlay_options_escape_what_separates() -> None:
    options = mounts.overlay_options(["1", "a:b"], "/x,y", "/w\\z")
    assert options.startswith("lowerdir=1:a\\:b,upperdir=/x\\,y,workdir=/w\\\\z,")


def test_progress_is_seen_by_the_parent_and_bounded() -> None:
    progress = Progress()
    pid = os.fork()
    if pid == 0:
        progress.at("x" * 10_000)
        progress.at("/some/path")
        os._exit(0)
    os.waitpid(pid, 0)
    assert progress.read() == (2, "/some/path")
    progress.close()


def test_passwd_and_group_lines_are_read_with_patience() -> None:
    entry = users.parse_passwd("app:x:1000:100:Name:/home/app:/bin/sh")
    assert entry == users.PasswdEntry("app", 1000, 100, "/home/app")
    assert users.parse_passwd("app:x:1:2") == users.PasswdEntry("app", 1, 2, "/")
    for bad in ("", "+::::::", "app:x:a:b:::", "app:x:-1:0:::", ":x:0:0:::", "a:x:4294967295:0:::", "x"):
        assert users.parse_passwd(bad) is None
    assert users.parse_group("g:x:5:a, b ,") == users.GroupEntry("g", 5, ("a", "b"))
    assert users.parse_group("g:x:5") == users.GroupEntry("g", 5, ())
    assert users.parse_group("g:x:") is None


def test_hosts_name_the_pod() -> None:
    assert hosts("").splitlines()[0] == "127.0.0.1\tlocalhost"
    assert "web-0" in hosts("web-0")


def test_trees_are_deleted_however_deep_and_links_are_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "link").symlink_to(kept)
    (victim / "file").touch()
    fd = os.open(victim, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d" * 200, dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert delete_trees([str(victim), str(tmp_path / "absent")], str(tmp_path / "trash")) == 0
    assert os.listdir(tmp_path) == ["kept"]
    assert (kept / "file").exists()


def test_the_directory_below_is_found_or_known_to_be_hidden(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "f").touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    found, ends = find_below(fd, b"a/b")
    assert found is not None
    assert ends
    os.close(found)
    assert find_below(fd, b"a/c") == (None, False)
    assert find_below(fd, b"f/c") == (None, True)
    os.close(fd)


def test_a_database_of_another_schema_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "images.db"
    database = Database(path)
    row = LayerRow(chain_id="c", parent="", diff_id="d", size=5, entries=2, opaque=True)
    database.add_layer(row)
    assert database.layer("c") == (1, row)
    assert database.totals() == (5, 2)
    assert database.unreferenced_layers() == ["c"]
    database.rows("PRAGMA user_version = 99")
    database.close()
    fresh = Database(path)
    assert fresh.chain_ids() == set()
    fresh.close()
    assert len(list(tmp_path.glob("images.db.broken-*"))) >= 1


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "images.db")

    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO containers VALUES ('a', 'b', 'c')")
        raise KeyError

    with pytest.raises(KeyError):
        database.write(fail)
    assert database.container_ids() == set()
    database.add_container("a", "b", "c")
    assert database.container("a") == ("b", "c")
    database.close()


def test_an_image_file_that_is_a_link_out_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").symlink_to("../../../../etc/passwd")
    fd = os.open(tmp_path, os.O_PATH)
    with pytest.raises(RemoteError) as caught:
        list(users.lines(fd, users.USERS_FILE))
    assert caught.value.code is Code.INVALID_ARGUMENT  # a link to itself, seen from inside
    assert list(users.lines(fd, users.GROUPS_FILE)) == []
    os.close(fd)
