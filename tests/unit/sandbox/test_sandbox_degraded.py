"""Runs in: the tests. A kernel that lacks a mechanism: told in a sentence, never passed over."""

from __future__ import annotations

import errno
import os
import platform
from typing import Any

import pytest

from ipc import confine, kernel, seccomp
from ipc.messages.supervisor import SandboxReport
from supervisor.sandbox import differences, landlock, namespaces
from supervisor.sandbox.seccomp import LISTS
from supervisor.sandbox.spec import Bind, Identity, Sandbox


def failing(number: int) -> Any:
    def fail(*_arguments: object, **_keywords: object) -> int:
        raise OSError(number, "no")

    return fail


def test_a_kernel_without_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "syscall", failing(errno.ENOSYS))
    assert landlock.restrict([Bind("/dev/null")], ()) == ["landlock: not in this kernel, or not enabled"]


@pytest.mark.parametrize(("version", "gap"), [(1, "truncation"), (3, "TCP"), (5, "signals")])
def test_an_old_landlock_says_what_it_does_not_cover(
    version: int, gap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: version)
    answers = iter([os.open("/dev/null", os.O_RDONLY), 0])  # a rule set's descriptor, then: entered
    monkeypatch.setattr(kernel, "syscall", lambda *_arguments, **_keywords: next(answers))
    (sentence,) = landlock.restrict([], ())
    assert sentence.startswith(f"landlock ABI {version}: ")
    assert gap in sentence


def test_a_partial_landlock_excuses_no_missing_one() -> None:
    report = SandboxReport(uid=1, gid=1, no_new_privs=True, degraded=["landlock ABI 3: does not cover TCP"])
    assert differences(Sandbox(), Identity(1, 1), report) == ["landlock: not as declared"]


def test_a_kernel_without_a_kind_of_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "unshare", failing(errno.EINVAL))
    assert namespaces.unshare({"cgroup"})[0].startswith("namespace cgroup: not in this kernel")


@pytest.mark.parametrize(
    ("name", "number"), [("mnt", errno.EINVAL), ("net", errno.ENOSPC), ("net", errno.EPERM)]
)
def test_a_namespace_that_is_refused_is_an_error(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "unshare", failing(number))
    with pytest.raises(OSError, match="no"):
        namespaces.unshare({name})


def test_a_kernel_without_seccomp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "syscall", failing(errno.EINVAL))
    assert confine.filter_calls(LISTS["ops"])[0].startswith("seccomp: not in this kernel")


def test_a_machine_without_a_table_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    assert confine.filter_calls(LISTS["ops"]) == ["seccomp: no table of system calls for vax"]


def test_a_thread_with_a_filter_of_its_own_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "syscall", lambda *_arguments, **_keywords: 4711)
    with pytest.raises(OSError, match="thread 4711"):
        confine.filter_calls(seccomp.Policy("t", allowed=frozenset({"read"})))


def test_what_is_told_as_missing_is_no_difference() -> None:
    entry = Sandbox(namespaces={"cgroup"}, seccomp="ops")
    report = SandboxReport(
        uid=1,
        gid=1,
        no_new_privs=True,
        degraded=["landlock: no", "seccomp: no", "namespace cgroup: no"],
    )
    assert differences(entry, Identity(1, 1), report) == []
