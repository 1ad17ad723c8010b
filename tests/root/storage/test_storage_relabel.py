"""SELinux labels of volumes, written for real: a kernel without SELinux keeps them for root too."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.errors import Code, RemoteError
from workers.storage import relabel
from workers.storage.mounts import Progress

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


@pytest.fixture
def progress() -> Iterator[Progress]:
    made = Progress()
    yield made
    made.close()


def label(path: Path) -> bytes:
    try:
        return os.getxattr(path, relabel.ATTRIBUTE, follow_symlinks=False)
    except OSError:
        return b""


def test_everything_below_is_labelled_but_links_are_not_followed_nor_mounts_entered(
    tmp_path: Path, progress: Progress
) -> None:
    volume, outside = tmp_path / "volume", tmp_path / "outside"
    for directory in (volume / "a/b", volume / "mount", outside):
        directory.mkdir(parents=True)
    (volume / "a/b/file").write_text("")
    (outside / "file").write_text("")
    (volume / "link").symlink_to(outside)
    subprocess.run(["mount", "-t", "tmpfs", "other", volume / "mount"], check=True)
    try:
        (volume / "mount/file").write_text("")
        relabel.relabel(str(volume), LABEL, progress)
        for path in (volume, volume / "a", volume / "a/b", volume / "a/b/file", volume / "link"):
            assert label(path) == LABEL.encode() + b"\0"
        for path in (outside, outside / "file", volume / "mount/file"):
            assert label(path) == b""
    finally:
        subprocess.run(["umount", volume / "mount"], check=True)


@pytest.mark.parametrize("path", ["/", "/etc", "/usr/lib", "/var/log"])
def test_the_systems_directories_are_refused(progress: Progress, path: str) -> None:
    with pytest.raises(RemoteError) as refused:
        relabel.relabel(path, LABEL, progress)
    assert refused.value.code is Code.FAILED_PRECONDITION


def test_a_file_system_without_labels_is_left_as_it_is(progress: Progress) -> None:
    relabel.relabel("/proc/self/task", LABEL, progress)
