"""The configuration directory, records, locks and lanes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from ipc.settings import NetworkSettings
from workers.network.confdir import ConfDir
from workers.network.lanes import Lanes
from workers.network.main import State
from workers.network.records import READY, Record, Records


def write(path: Path, name: str) -> None:
    path.write_text(json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": [{"type": "bridge"}]}))


def test_the_first_usable_file_in_lexical_order_is_the_network(tmp_path: Path) -> None:
    write(tmp_path / "20-b.conflist", "b")
    write(tmp_path / "10-a.conf", "a")
    (tmp_path / "05-broken.json").write_text("{")
    (tmp_path / "00-other.txt").write_text("{")
    (tmp_path / "01-directory.conf").mkdir()
    os.mkfifo(tmp_path / "02-fifo.conf")
    (tmp_path / "03-link.conf").symlink_to("nowhere")
    selection = ConfDir(str(tmp_path)).current()
    assert selection.network is not None
    assert selection.network.name == "a"
    assert [problem.partition(": ")[2] for problem in selection.problems] == [
        "not a regular file",
        "not a regular file",
        "not JSON: Input data was truncated",
    ]


def test_the_directory_is_read_again_only_when_something_changed(tmp_path: Path) -> None:
    directory = ConfDir(str(tmp_path))
    assert "no file with" in directory.current().message
    write(tmp_path / "1.conflist", "a")
    first = directory.current()
    assert directory.current() is first
    write(tmp_path / "1.conflist", "bb")
    second = directory.current().network
    assert second is not None
    assert second.name == "bb"
    replacement = tmp_path / "replacement"
    write(replacement, "cc")
    os.replace(replacement, tmp_path / "1.conflist")
    third = directory.current().network
    assert third is not None
    assert third.name == "cc"


def test_why_there_is_no_network_is_said(tmp_path: Path) -> None:
    assert "no such directory" in ConfDir(str(tmp_path / "x")).current().message
    write(tmp_path / "1.conflist", "a")
    message = ConfDir(str(tmp_path), "wanted").current().message
    assert message == f'no CNI network "wanted" in {tmp_path}: 1.conflist bear other names'


def test_a_file_that_is_too_large_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.conf").write_bytes(b" " * (1024 * 1024 + 1))
    assert "larger than" in ConfDir(str(tmp_path)).current().message


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    records = Records(str(tmp_path))
    record = Record(pod_id="p", state=READY, namespaces={"net": "/n"}, result={"ips": []}, ips=["10.0.0.1"])
    records.save(record)
    assert records.load("p") == record
    assert (tmp_path / "p.json").stat().st_mode & 0o777 == 0o600
    assert records.pods() == ["p"]
    records.remove("p")
    records.remove("p")
    assert records.load("p") is None
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_a_newer_release_is_understood(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"pod_id": "p", "state": "ready", "added_later": [1]}')
    record = Records(str(tmp_path)).load("p")
    assert record is not None
    assert record.state == READY


def test_a_lock_leaves_no_file(tmp_path: Path) -> None:
    with Records(str(tmp_path)).lock("p"):
        assert (tmp_path / "p.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_who_holds_a_lock_unattended_is_killed(tmp_path: Path) -> None:
    script = "exec 9>'p.lock'; flock 9; echo; sleep 600 & wait"
    with subprocess.Popen(["sh", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with Records(str(tmp_path)).lock("p"):
            assert holder.wait(5) == -9


def test_new_settings_count_at_once_and_their_directories_are_made(tmp_path: Path) -> None:
    settings = NetworkSettings(root="/", run_root=str(tmp_path / "run"), conf_dir=str(tmp_path))
    state = State(settings, "boot")
    assert state.selection().network is None
    write(tmp_path / "1.conflist", "a")
    write(tmp_path / "2.conflist", "b")
    state.use(msgspec.structs.replace(settings, default_network="b", cache_dir=str(tmp_path / "cache")))
    selected = state.selection().network
    assert selected is not None
    assert selected.name == "b"
    assert state.current_places().records == str(tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()
    assert (tmp_path / "run" / "ns").is_dir()


@pytest.fixture
def begun() -> list[str]:
    return []


def operation(
    name: str, begun: list[str], ends: dict[str, Callable[[], None]]
) -> Callable[[Callable[[], None]], None]:
    def begin(done: Callable[[], None]) -> None:
        begun.append(name)
        ends[name] = done

    return begin


def test_one_operation_a_pod_and_pods_side_by_side(begun: list[str]) -> None:
    lanes, ends = Lanes(), dict[str, Callable[[], None]]()
    for pod, name in (("a", "a1"), ("a", "a2"), ("b", "b1"), ("a", "a3")):
        lanes.submit(pod, operation(name, begun, ends))
    assert begun == ["a1", "b1"]
    assert lanes.busy() == ["a", "b"]
    ends["a1"]()
    ends["b1"]()
    assert begun == ["a1", "b1", "a2"]
    ends["a2"]()
    ends["a3"]()
    assert lanes.busy() == []


def test_an_operation_that_is_over_at_once_lets_the_next_begin(begun: list[str]) -> None:
    lanes = Lanes()

    def at_once(done: Callable[[], None]) -> None:
        begun.append("x")
        done()

    for _ in range(3):
        lanes.submit("a", at_once)
    assert begun == ["x", "x", "x"]
    assert lanes.busy() == []
