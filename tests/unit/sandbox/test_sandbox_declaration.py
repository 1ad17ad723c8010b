"""Runs in: the tests. What is sans-IO of the sandbox: declarations, paths, names of capabilities."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import supervisor.sandbox as package
from ipc import capabilities
from supervisor.sandbox.mountview import expand
from supervisor.sandbox.preload import host_services
from supervisor.sandbox.seccomp import LISTS
from supervisor.sandbox.spec import Bind, Sandbox
from supervisor.table import TABLE

UNPRIVILEGED = ("cri", "image", "stream", "ops", "nri")


def test_a_path_template_becomes_every_path_that_its_value_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = {"dirs": f"{tmp_path}/a:{tmp_path}/b:{tmp_path}/absent", "none": ""}
    view = (Bind("{dirs}", optional=True, writable=True), Bind("{none}"), Bind("/dev/null"))
    expanded = expand(view, paths)
    assert [bind.path for bind in expanded] == [f"{tmp_path}/a", f"{tmp_path}/b", "/dev/null"]
    assert [bind.writable for bind in expanded] == [True, True, False]


def test_an_absent_path_that_must_be_there_stays_in_the_list() -> None:
    assert expand((Bind("/no/such/path"),), {}) == [Bind("/no/such/path")]


def test_an_unknown_template_is_an_error() -> None:
    with pytest.raises(KeyError):
        expand((Bind("{nowhere}/x"),), {})


def test_a_view_without_a_mount_namespace_is_refused() -> None:
    with pytest.raises(ValueError, match="mount namespace"):
        Sandbox(view=(Bind("/dev/null"),))


@given(st.sets(st.sampled_from(capabilities.NAMES)))
def test_capability_masks_go_there_and_back(names: set[str]) -> None:
    assert set(capabilities.from_mask(capabilities.to_mask(names))) == names


def test_capabilities_have_the_kernels_numbers() -> None:
    known = {"CHOWN": 0, "KILL": 5, "NET_ADMIN": 12, "SYS_ADMIN": 21, "SETFCAP": 31, "CHECKPOINT_RESTORE": 40}
    assert {name: capabilities.NAMES.index(name) for name in known} == known


def test_host_services_are_read_without_reactions_and_comments() -> None:
    text = "passwd: files\nhosts:   files mdns4_minimal [NOTFOUND=return] dns # resolve\n"
    assert host_services(text) == ["files", "mdns4_minimal", "dns"]
    assert host_services("") == []


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_a_worker_without_a_task_for_root_has_nothing_of_root(kind: str) -> None:
    entry = TABLE[kind]
    assert entry.user != "root"
    sandbox = entry.sandbox
    assert sandbox is not None
    assert not sandbox.capabilities
    assert sandbox.landlock
    assert sandbox.no_new_privs
    assert sandbox.view
    assert {"mnt", "ipc", "uts"} <= set(sandbox.namespaces)
    assert not LISTS[sandbox.seccomp].open_list


def test_what_containers_would_inherit_a_monitor_does_not_have() -> None:
    assert TABLE["monitor"].sandbox is None


def test_every_worker_has_a_list_of_its_own_and_every_list_a_worker() -> None:
    lists = [entry.sandbox.seccomp for entry in TABLE.values() if entry.sandbox]
    assert sorted(lists) == sorted(LISTS)


def test_users_are_changed_in_the_files_meant_for_it() -> None:
    directory = Path(package.__file__).parent
    for path in directory.glob("*.py"):
        names = {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
        assert not names & {"setuid", "setresuid", "setgroups", "fork"}, path.name


def test_the_page_on_the_sandbox_names_every_capability_and_list() -> None:
    page = (Path(package.__file__).parents[2] / "docs" / "sandbox.md").read_text()
    kept = {name for entry in TABLE.values() if entry.sandbox for name in entry.sandbox.capabilities}
    assert [name for name in sorted({*kept, *LISTS}) if name not in page] == []
