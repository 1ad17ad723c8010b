"""Hooks, CDI specifications and labels: files of the node's administrator, and what they mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc import yamlfiles
from ipc.errors import Code, RemoteError
from ipc.messages.storage import HookFacts
from workers.storage import cdi, hookfiles
from workers.storage.mounts import Progress

NAME = "vendor.com/gpu=one"


@pytest.fixture
def progress() -> Iterator[Progress]:
    made = Progress()
    yield made
    made.close()


# -- hooks ------------------------------------------------------------------------------------------------


def hook_file(directory: Path, name: str, **fields: Any) -> None:
    content: dict[str, Any] = {
        "version": "1.0.0",
        "hook": {"path": "/bin/true"},
        "when": {"always": True},
        "stages": ["prestart"],
    }
    (directory / name).write_text(json.dumps(content | fields))


def facts(**fields: Any) -> HookFacts:
    chosen: dict[str, Any] = {"command": "/usr/bin/server"} | fields
    return HookFacts(**chosen)


@pytest.mark.parametrize(
    ("when", "chosen"),
    [
        ({"always": True}, True),
        ({"always": False}, False),
        ({}, False),
        ({"commands": ["server$"]}, True),
        ({"commands": ["^server"]}, False),
        ({"commands": ["nothing", "^/usr"]}, True),
        ({"annotations": {"^a$": "^1$"}}, True),
        ({"annotations": {"^a$": "^2$"}}, False),
        ({"annotations": {"a": "1", "b": "2"}}, False),
        ({"hasBindMounts": True}, True),
        ({"hasBindMounts": False}, False),
        ({"always": True, "commands": ["x"]}, False),
        ({"always": True, "commands": ["server"], "annotations": {"a": ""}, "hasBindMounts": True}, True),
    ],
)
def test_all_conditions_that_are_given_must_hold(
    tmp_path: Path, progress: Progress, when: dict[str, Any], chosen: bool
) -> None:
    hook_file(tmp_path, "h.json", when=when)
    found = hookfiles.matching(facts(annotations={"a": "1"}, bind_mounts=True), [str(tmp_path)], progress)
    assert bool(found) is chosen


def test_hooks_come_in_the_order_of_their_names_and_later_directories_replace(
    tmp_path: Path, progress: Progress
) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for directory in (first, second):
        directory.mkdir()
    hook_file(first, "20-b.json", hook={"path": "/bin/ls"})
    hook_file(first, "30-c.json", hook={"path": "/bin/cat", "args": ["cat", "x"], "timeout": 3})
    hook_file(
        second, "20-b.json", hook={"path": "/bin/echo", "env": ["A=1"]}, stages=["prestart", "poststop"]
    )
    hook_file(second, "10-a.json", hook={"path": "/bin/sh"})
    found = hookfiles.matching(facts(), [str(first), str(second), "/nowhere"], progress)
    assert [hook.path for hook in found["prestart"]] == ["/bin/sh", "/bin/echo", "/bin/cat"]
    assert [hook.env for hook in found["poststop"]] == [["A=1"]]
    assert found["prestart"][2].timeout == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"version": "0.1.0"},
        {"stages": []},
        {"stages": ["now"]},
        {"hook": {"path": "relative"}},
        {"hook": {"path": "/nowhere/hook"}},
        {"hook": {"path": "/bin/true", "timeout": 0}},
        {"hook": {"path": "/bin/true", "args": ["a\0b"]}},
        {"when": {"commands": ["("]}},
        {"when": {"unknown": True}},
        {"surprise": 1},
    ],
)
def test_hook_that_cannot_be_used_is_skipped(
    tmp_path: Path, progress: Progress, fields: dict[str, Any]
) -> None:
    hook_file(tmp_path, "bad.json", **fields)
    hook_file(tmp_path, "good.json")
    found = hookfiles.matching(facts(), [str(tmp_path)], progress)
    assert [hook.path for hook in found["prestart"]] == ["/bin/true"]


def test_the_condition_that_is_being_tried_is_noted(tmp_path: Path, progress: Progress) -> None:
    hook_file(tmp_path, "slow.json")
    hookfiles.matching(facts(), [str(tmp_path)], progress)
    assert "slow.json" in progress.read()[1]


def test_nobody_asked_means_no_hooks(progress: Progress) -> None:
    assert hookfiles.matching(None, ["/"], progress) == {}


# -- CDI --------------------------------------------------------------------------------------------------


def cdi_file(
    directory: Path, name: str = "v.json", edits: dict[str, Any] | None = None, **fields: Any
) -> Path:
    device = {"name": "one", "containerEdits": {"env": ["A=1"]} if edits is None else edits}
    content: dict[str, Any] = {"cdiVersion": "0.6.0", "kind": "vendor.com/gpu", "devices": [device]}
    path = directory / name
    path.write_text(json.dumps(content | fields))
    return path


def test_edits_of_a_file_come_once_before_those_of_its_devices(tmp_path: Path, progress: Progress) -> None:
    devices = [{"name": name, "containerEdits": {"env": [f"D={name}"]}} for name in ("one", "two")]
    cdi_file(tmp_path, devices=devices, containerEdits={"env": ["F=1"]})
    names = ["vendor.com/gpu=two", NAME, "vendor.com/gpu=two"]
    edits, _ = cdi.resolve(names, [str(tmp_path)], progress)
    assert edits.env == ["F=1", "D=two", "D=one"]


@pytest.mark.parametrize("version", ["0.3.0", "0.5.0", "0.8.0", "1.0.0"])
def test_versions_of_the_specification_are_read(tmp_path: Path, progress: Progress, version: str) -> None:
    cdi_file(tmp_path, cdiVersion=version)
    assert cdi.resolve([NAME], [str(tmp_path)], progress)[0].env == ["A=1"]


def test_a_device_node_takes_its_numbers_from_the_host(tmp_path: Path, progress: Progress) -> None:
    nodes = [
        {"path": "/dev/x", "hostPath": "/dev/null"},
        {"path": "/dev/zero", "type": "c", "permissions": "r", "uid": 7, "fileMode": 0o600},
        {"path": "/dev/said", "type": "b", "major": 7, "minor": 3},
        {"path": "/dev/pipe", "type": "p"},
    ]
    cdi_file(tmp_path, edits={"deviceNodes": nodes})
    found = cdi.resolve([NAME], [str(tmp_path)], progress)[0].nodes
    assert [(n.path, n.type, n.major, n.minor, n.permissions) for n in found] == [
        ("/dev/x", "c", 1, 3, "rwm"),
        ("/dev/zero", "c", 1, 5, "r"),
        ("/dev/said", "b", 7, 3, "rwm"),
        ("/dev/pipe", "p", 0, 0, ""),
    ]
    assert (found[1].uid, found[1].mode) == (7, 0o600)


@pytest.mark.parametrize(
    "node", [{"path": "/dev/none"}, {"path": "/dev/null", "type": "b"}, {"path": "/etc"}]
)
def test_a_device_node_that_is_not_there_is_refused(
    tmp_path: Path, progress: Progress, node: dict[str, Any]
) -> None:
    cdi_file(tmp_path, edits={"deviceNodes": [node]})
    with pytest.raises(RemoteError) as refused:
        cdi.resolve([NAME], [str(tmp_path)], progress)
    assert refused.value.code is Code.FAILED_PRECONDITION


def test_mounts_groups_rdt_and_hooks_are_taken(tmp_path: Path, progress: Progress) -> None:
    edits = {
        "mounts": [
            {"hostPath": "/a", "containerPath": "/b"},
            {"hostPath": "tmpfs", "containerPath": "/c", "type": "tmpfs", "options": ["size=1m"]},
            {"hostPath": "/d", "containerPath": "/e", "options": ["bind", "ro"]},
        ],
        "additionalGids": [0, 44],
        "intelRdt": {"closID": "x", "enableCMT": True},
        "hooks": [{"hookName": "createContainer", "path": "/bin/true", "args": ["true"], "timeout": 2}],
    }
    cdi_file(tmp_path, edits=edits)
    found, hooks = cdi.resolve([NAME], [str(tmp_path)], progress)
    assert [(m.destination, m.type, m.options) for m in found.mounts] == [
        ("/b", "bind", ["rbind"]),
        ("/c", "tmpfs", ["size=1m"]),
        ("/e", "bind", ["bind", "ro"]),
    ]
    assert found.additional_gids == [44]
    assert found.intel_rdt == {"closID": "x", "enableCMT": True}
    assert [(hook.path, hook.timeout) for hook in hooks["createContainer"]] == [("/bin/true", 2)]


@pytest.mark.parametrize(
    "fields",
    [
        {"cdiVersion": "2.0.0"},
        {"kind": "nokind"},
        {"kind": "../x"},
        {"devices": []},
        {"devices": [{"name": "a b", "containerEdits": {}}]},
        {"devices": [{"name": "one", "containerEdits": {}}] * 2},
        {"containerEdits": {"env": ["novalue"]}},
        {"containerEdits": {"deviceNodes": [{"path": "relative"}]}},
        {"containerEdits": {"deviceNodes": [{"path": "/dev/x", "type": "z"}]}},
        {"containerEdits": {"deviceNodes": [{"path": "/dev/x", "permissions": "q"}]}},
        {"containerEdits": {"mounts": [{"hostPath": "", "containerPath": "/x"}]}},
        {"containerEdits": {"hooks": [{"hookName": "soon", "path": "/bin/true"}]}},
        {"containerEdits": {"netDevices": []}},
        {"surprise": 1},
    ],
)
def test_specification_that_is_not_understood_is_skipped_and_named(
    tmp_path: Path, progress: Progress, fields: dict[str, Any]
) -> None:
    path = cdi_file(tmp_path, **fields)
    with pytest.raises(RemoteError, match="is not described") as refused:
        cdi.resolve([NAME], [str(tmp_path)], progress)
    assert str(path) in refused.value.text


def test_a_fifo_and_giants_are_skipped(tmp_path: Path, progress: Progress) -> None:
    cdi_file(tmp_path)
    os.mkfifo(tmp_path / "b.json")
    for name, limit in (("a.yaml", yamlfiles.MAX_YAML), ("c.json", cdi.MAX_FILE)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(limit + 1)
    registry = cdi.read([str(tmp_path)], progress)
    assert set(registry.devices) == {NAME}
    assert [Path(path).name for path in registry.skipped] == ["a.yaml", "b.json", "c.json"]


def test_a_specification_in_yaml_is_what_it_would_be_in_json(tmp_path: Path, progress: Progress) -> None:
    (tmp_path / "gpu.yml").write_text(
        """---
cdiVersion: "0.6.0"
kind: vendor.com/gpu
# as vendors' tools write it
containerEdits: {env: [DRIVER=yes]}
devices:
- name: "0"
  containerEdits:
    deviceNodes:
    - path: /dev/x
      hostPath: /dev/null
      fileMode: 0660
    hooks:
    - hookName: createContainer
      path: /bin/true
      args:
      - true-ish
      - |
        two
        lines
"""
    )
    edits, hooks = cdi.resolve(["vendor.com/gpu=0"], [str(tmp_path)], progress)
    assert edits.env == ["DRIVER=yes"]
    assert [(node.path, node.minor, node.mode) for node in edits.nodes] == [("/dev/x", 3, 0o660)]
    assert hooks["createContainer"][0].args == ["true-ish", "two\nlines\n"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &x [1]\nb: *x\n", "alias"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "alias"),
        ("!!python/object/apply:os.system ['true']", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("[" * 100_000, "levels deep"),
        ("a: 1\n---\nb: 2\n", "more than one document"),
        ("a: [1, 2", "while parsing"),
        ("a: \x01", "special characters|control characters|not allowed"),
        ("a: 2024-13-45", "month"),
        ("", "Expected `object`"),
        ("1: 2", "Expected `str`|missing required"),
        ("cdiVersion: 0.6\nkind: v.c/d\ndevices: []", "Expected `str`"),
    ],
)
def test_yaml_that_is_more_than_data_is_skipped(
    tmp_path: Path, progress: Progress, text: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert cdi.read([str(tmp_path)], progress).skipped == [str(tmp_path / "bad.yaml")]
    assert re.search(why, capfd.readouterr().err)


@pytest.mark.parametrize(
    "name",
    ["", "x", "vendor.com/gpu", "vendor.com=x", "/gpu=x", "vendor.com/gpu=", "v/c=../x", "1/c=x", "v/c=a b"],
)
def test_what_is_no_qualified_name_is_refused(progress: Progress, name: str) -> None:
    with pytest.raises(RemoteError) as refused:
        cdi.resolve([name], [], progress)
    assert refused.value.code is Code.INVALID_ARGUMENT


def test_nothing_is_read_for_a_container_without_devices(progress: Progress) -> None:
    edits, hooks = cdi.resolve([], ["/proc/self/mem"], progress)
    assert (edits.env, hooks) == ([], {})
