"""What a layer held is known: what its archive did to its own entries is no damage, and damage is named."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipc.messages.checking import Known
from tests.support.storage_worker import Layer, Worker, info, put_image, tar_of
from workers.storage import offline

DIRECTORY, LINK, HARD_LINK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
#: Files, links and directories that later entries replace by each other, hide, or reach through a link.
ENTRIES = [
    (info("bin", LINK, linkname="usr/bin"), b""),
    (info("bin/tool"), b"through the link"),
    (info("a"), b"once"),
    (info("a"), b"twice"),
    (info("b"), b"a file"),
    (info("b", DIRECTORY), b""),
    (info("b/deep/er"), b"e"),
    (info("c", DIRECTORY), b""),
    (info("c/lost"), b"lost with c"),
    (info("c/far/ther"), b"lost too"),
    (info("c", LINK, linkname="a"), b""),
    (info("d"), b"first name"),
    (info("e", HARD_LINK, linkname="d"), b""),
    (info("d"), b"second content"),
    (info(".wh.hidden"), b""),
    (info("b/.wh..wh..opq"), b""),
    (info("empty"), b""),
]


@pytest.fixture(scope="module")
def stopped() -> Iterator[tuple[Worker, Path]]:
    with Worker() as worker:
        layer = Layer(tar_of(ENTRIES))
        with worker.client() as client:
            put_image(client, [layer])
        worker.stop()
        yield worker, worker.root / "layers" / layer.chain_id.partition(":")[2] / "diff"


def problems(worker: Worker) -> list[str]:
    return [finding.problem for finding in offline.inspect(worker.settings, Known(), deep=True)]


def test_what_an_archive_did_to_its_own_entries_is_no_damage(stopped: tuple[Worker, Path]) -> None:
    assert problems(stopped[0]) == []


def relink(path: Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere")


def replace(path: Path) -> None:
    path.unlink()
    path.mkdir()


def turn_a_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("usr/bin/tool", turn_a_bit, "usr/bin/tool: the content is not what was unpacked"),
    ("d", turn_a_bit, "d: the content is not what was unpacked"),
    ("a", lambda path: os.truncate(path, 2), "a: 2 bytes, not 5"),
    ("c", relink, "c: 9 bytes, not 1"),
    ("empty", Path.unlink, "1 of its files are missing"),
    ("b/deep/er", replace, "b/deep/er: another kind of file"),
]


@pytest.mark.parametrize(("name", "break_", "problem"), DAMAGE, ids=[name for name, *_ in DAMAGE])
def test_damage_is_named(
    stopped: tuple[Worker, Path], name: str, break_: Callable[[Path], object], problem: str
) -> None:
    worker, diff = stopped
    path, aside = diff / name, worker.base / "aside"
    os.rename(path, aside)
    if aside.is_symlink():
        path.symlink_to(os.readlink(aside))
    else:
        path.write_bytes(aside.read_bytes())
    try:
        break_(path)
        assert problems(worker) == [problem]
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        os.rename(aside, path)
    assert problems(worker) == []
