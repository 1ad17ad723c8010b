"""What writable layers occupy: the walk, and when it is made."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import Code, RemoteError
from ipc.loop import Loop
from ipc.messages.storage import UsageList
from workers.jobs import Jobs
from workers.storage import usage
from workers.storage.paths import Paths
from workers.storage.usage import HUNG, PERIOD, SHARE, Usages, measure


def test_a_tree_is_measured_as_du_does(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/data").write_bytes(b"x" * 100_000)
    os.link(tmp_path / "a/b/data", tmp_path / "a/again")  # counts once
    (tmp_path / "a/away").symlink_to("/usr")  # is not followed
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "\udcff\n").touch()
    said = subprocess.run(["du", "-s", "-B1", tmp_path], capture_output=True, text=True, check=True)
    names = subprocess.run(["du", "-s", "--inodes", tmp_path], capture_output=True, text=True, check=True)
    assert measure(str(tmp_path)) == (int(said.stdout.split()[0]), int(names.stdout.split()[0]))
    assert measure(str(tmp_path / "absent")) == (0, 0)
    assert measure(str(tmp_path / "sparse")) == (0, 0)


def test_a_deep_tree_does_not_eat_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "DEEPEST", 20)
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(60):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    before = os.listdir("/proc/self/fd")
    assert measure(str(tmp_path))[1] == 22  # the top, and what is seen from the deepest that is entered
    assert os.listdir("/proc/self/fd") == before


class World:
    """A storage root with writable layers and the figures of them."""

    def __init__(self, tmp_path: Path) -> None:
        self.paths = Paths(str(tmp_path / "root"), str(tmp_path / "run"))
        self.paths.make()
        self.loop = Loop()
        self.usages = Usages(self.loop, Jobs(self.loop), self.paths)

    def layer(self, container_id: str, size: int = 0) -> Path:
        upper = self.paths.containers / container_id / "upper"
        upper.mkdir(parents=True)
        (upper / "file").write_bytes(b"x" * size)
        return upper

    def ask(self) -> dict[str, int]:
        answer = self.usages.list_all(None, UsageList())  # type: ignore[arg-type]  # it looks at no call
        return {one.container_id: one.used_inodes for one in answer.usages}

    def turn(self, condition: Any) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            self.loop.turn(0.05)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_nothing_is_walked_for_the_one_who_asks_but_soon_after(world: World) -> None:
    world.layer("a", 5000)
    world.usages.found({"a", "gone"})
    before = time.time_ns()
    assert world.ask() == {}
    world.turn(world.ask)
    (one,) = world.usages.list_all(None, UsageList()).usages  # type: ignore[arg-type]
    assert (one.container_id, one.used_inodes) == ("a", 2)
    assert one.used_bytes >= 5000
    assert before <= one.timestamp_ns <= time.time_ns()
    assert world.usages.totals() == (one.used_bytes, 2)
    world.usages.gone("a")
    assert world.ask() == {}
    world.loop.close()


def test_a_new_container_is_known_to_be_empty_and_measured_later(world: World) -> None:
    world.layer("a").joinpath("file").unlink()
    world.usages.made("a")
    assert world.ask() == {"a": 1}
    assert world.usages._layers["a"].due > world.loop.time() + PERIOD / 2
    world.usages._take("a", 1, 5, 0, 7.0)  # the longer it took, the rarer it is
    assert world.usages._layers["a"].due > world.loop.time() + 7 * SHARE - 1
    world.usages.made("a")  # found again as it is
    assert world.ask() == {"a": 5}
    world.loop.close()


def test_a_layer_that_hangs_is_put_off_and_the_others_have_their_turn(world: World) -> None:
    world.usages.found({"a", "b"})
    world.usages._measured("a", RemoteError(Code.DEADLINE_EXCEEDED, "too late"))
    now = world.loop.time()
    assert world.usages._layers["a"].due > now + HUNG - 1
    assert world.usages._layers["b"].due <= now
    world.loop.close()


def test_nobody_asks_and_nothing_is_measured(world: World) -> None:
    world.layer("a")
    world.usages.found({"a"})
    world.usages._begin()
    assert not world.usages.jobs.running
    world.ask()
    world.usages._asked -= usage.INTEREST + 1
    world.loop.turn(0.05)
    assert not world.usages.jobs.running
    world.loop.close()
