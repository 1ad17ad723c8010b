"""cgroup parents that runtimes make: noted, removed with their last pod; slices by systemd."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ipc.errors import Code, RemoteError
from ipc.log import Log
from supervisor.cgroup import Groups, Hierarchies
from supervisor.parents import Parents, is_empty

A, B = "a" * 64, "b" * 64


class Place:
    """Two hierarchies and a run root."""

    def __init__(self, root: Path) -> None:
        self.run_root = root / "run"
        self.mounts = [root / "cpu", root / "freezer"]
        for directory in (self.run_root, *self.mounts):
            directory.mkdir()
        hierarchies = Hierarchies(1, {m.name: str(m) for m in self.mounts}, (), tuple(map(str, self.mounts)))
        self.ground: Any = SimpleNamespace(
            loop=None, reaper=None, log=Log("test"), groups=Groups(hierarchies, "bulkhead")
        )

    def parents(self, *, systemd: bool = False) -> Parents:
        return Parents(self.ground, str(self.run_root), systemd=systemd)

    def make(self, path: str) -> None:
        """As an OCI runtime does."""
        for mount in self.mounts:
            (mount / path).mkdir(parents=True)

    def groups(self) -> set[str]:
        found = {path.relative_to(m) for m in self.mounts for path in m.rglob("*") if path.is_dir()}
        return set(map(str, found))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_a_runtime_made_goes_with_the_last_pod_and_what_was_there_stays(place: Place) -> None:
    place.make("kube")
    parents = place.parents()
    parents.note(A, "/kube/new/one")
    place.make("kube/new/one/bulkhead-x")
    parents.note(B, "/kube/new")
    parents.release(A)
    assert place.groups() == {"kube", "kube/new", "kube/new/one", "kube/new/one/bulkhead-x"}, "it is used"
    for mount in place.mounts:
        (mount / "kube/new/one/bulkhead-x").rmdir()
    parents.note(A, "/kube/new/one")
    parents.release(A)
    assert place.groups() == {"kube", "kube/new"}
    parents = place.parents()  # another supervisor knows what this one knew
    assert parents.pods() == [B]
    parents.release(B)
    parents.release(B)
    assert (place.groups(), parents.pods()) == ({"kube"}, [])


def test_a_parent_that_leads_elsewhere_and_a_pod_that_is_none_are_refused(place: Place) -> None:
    for pod, parent in ((A, "/a/../.."), ("../x", "/a")):
        with pytest.raises(RemoteError) as caught:
            place.parents().note(pod, parent)
        assert caught.value.code is Code.INVALID_ARGUMENT


def test_damaged_notes_are_forgotten(place: Place) -> None:
    (place.run_root / "parents.json").write_text("[]")
    assert place.parents().pods() == []


def test_systemd_is_told_to_stop_slices_that_are_empty(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr("supervisor.parents.find_program", lambda _name: "/systemctl")
    monkeypatch.setattr("supervisor.parents.Program", lambda _loop, _reaper, argv, _ended: told.append(argv))
    parents = place.parents(systemd=True)
    parents.note(A, "/a.slice/a-b.slice")
    place.make("a.slice/a-b.slice")
    place.make("a.slice/other")
    for group in list(place.mounts[0].rglob("*")):
        (group / "cgroup.procs").write_text("")
    parents.release(A)
    assert told == [["/systemctl", "stop", "a-b.slice"]], "the other one has a group in it"
    assert (place.mounts[0] / "a.slice/a-b.slice").is_dir(), "systemd removes it"
    assert not (place.mounts[1] / "a.slice/a-b.slice").exists(), "systemd does not"


def test_a_group_with_a_process_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text("1\n")
    assert not is_empty(str(tmp_path), set())
    assert is_empty(str(tmp_path / "gone"), set())
