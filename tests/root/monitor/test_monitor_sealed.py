"""A program in sealed memory: what is executed, what cannot be changed, and when the file itself is taken."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.monitor_process import MonitorProcess, Wish, busybox_root, monitor
from workers.monitor import sealed
from workers.monitor.sealed import Sealed


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return Path(shutil.copy("/usr/bin/crun", tmp_path / "crun"))


@pytest.fixture
def crun(tmp_path: Path) -> Iterator[MonitorProcess]:
    with monitor(busybox_root(tmp_path / "root"), "crun") as process:
        yield process


def test_a_copy_is_executed_and_cannot_be_written_to(program: Path) -> None:
    copies = Sealed([str(program)])
    copy = copies.path(str(program))
    said = subprocess.run([copy, "--version"], pass_fds=copies.fds, stdout=subprocess.PIPE, check=True)
    assert said.stdout.startswith(b"crun version")
    with pytest.raises(PermissionError):
        os.pwrite(copies.fds[0], b"#", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(copies.fds[0], 0)
    copies.close()
    assert copies.path(str(program)) == str(program)


def test_a_program_that_was_replaced_is_executed_itself(program: Path) -> None:
    copies = Sealed([str(program)])
    successor = program.with_name("new")
    shutil.copy("/usr/bin/crun", successor)
    successor.rename(program)
    assert copies.path(str(program)) == str(program)
    program.unlink()
    assert copies.path(str(program)) == str(program)
    copies.close()


def test_what_cannot_be_copied_is_executed_itself(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    missing = str(tmp_path / "missing")
    copies = Sealed([str(script), missing])
    assert (copies.fds, copies.path(str(script)), copies.path(missing)) == ([], str(script), missing)
    monkeypatch.setattr(sealed, "LARGEST", 1000)
    assert Sealed([str(program)]).fds == []
    monkeypatch.undo()
    monkeypatch.setattr(sealed, "SELINUX", str(script))
    assert Sealed([str(program)]).fds == []


def test_crun_runs_from_sealed_memory_and_makes_no_copy_of_its_own(
    crun: MonitorProcess, tmp_path: Path
) -> None:
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"readlink /proc/$PPID/exe > {tmp_path}/link"]}
    request = crun.create_request(Wish(["sleep", "100"]))
    spec = {**msgspec.json.decode(request.spec), "hooks": {"createRuntime": [hook]}}
    crun.start_monitor()
    crun.client().call(msgspec.structs.replace(request, spec=msgspec.json.encode(spec)))
    assert (tmp_path / "link").read_text() == "/memfd:crun (deleted)\n"
