"""Upgrades in place, what can be seen without a process: the heritage, the trial's word, the kept tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ipc.messages.supervisor import UpgradeState
from supervisor import heritage
from supervisor.config import Config
from supervisor.heritage import Heritage, KindRow, WardRow, WorkerRow
from supervisor.sandbox.spec import Identity
from supervisor.upgrade import Trial, clean, fixed, obstacle, started_as, trial

WHO = {"cri": Identity(64101, 64101)}


def worker(control_fd: int = 11) -> WorkerRow:
    return WorkerRow(
        kind="cri",
        pid=7,
        phase="ready",
        started=1.5,
        started_at_ns=2,
        release="1",
        asked=3,
        control_fd=control_fd,
        stderr_fd=12,
    )


def left(*workers: WorkerRow) -> Heritage:
    kind = KindRow(kind="cri", listener_fd=9, extra_fds={"http": 10}, workers=list(workers))
    ward = WardRow(container_id="c", pod_id="p", vault_fd=13)
    return Heritage(
        release="1",
        started_at_ns=1,
        lock_fds=[5, 6],
        listener_fd=7,
        log_fd=8,
        kinds=[kind],
        upgrade=UpgradeState(),
        wards=[ward],
    )


def test_a_heritage_names_every_descriptor_that_stays_open_once() -> None:
    assert left(worker()).descriptors() == [5, 6, 7, 8, 9, 10, 12, 11, 13]
    assert 11 not in left(worker(control_fd=-1)).descriptors()


def test_a_heritage_is_read_as_it_was_left_and_only_in_a_known_format() -> None:
    whole = left(worker())
    assert heritage.decode(heritage.encode(whole)) == whole
    whole.format = 99
    with pytest.raises(ValueError, match="format 99"):
        heritage.decode(heritage.encode(whole))
    with pytest.raises(ValueError, match="cannot be read"):
        heritage.decode(b"{}")


def test_a_program_that_stands_on_something_else_is_no_successor() -> None:
    ours = fixed(Config(), WHO)
    assert obstacle(trial(Config(), WHO), ours) == ""
    elsewhere = trial(Config(run_root="/elsewhere"), {"cri": Identity(1, 1)})
    assert obstacle(elsewhere, ours) == "these keys take a restart: run_root, users.cri"
    assert "does not read" in obstacle(Trial(release="2", formats=[0], fixed={}), ours)


def test_a_launcher_is_executed_again_and_a_module_by_its_interpreter(tmp_path: Path) -> None:
    launcher = tmp_path / "bulkhead"
    launcher.write_text("#!/bin/sh\n")
    launcher.chmod(0o755)
    words = [str(launcher), "serve"]
    assert started_as(words, ["/usr/bin/python3", "-I", *words]) == words
    module = ["/usr/bin/python3", "-m", "supervisor", "serve"]
    assert started_as(["/x/supervisor/__main__.py", "serve"], module) == [sys.executable, *module[1:]]


def test_no_descriptor_of_an_earlier_start_is_named_to_the_next_program() -> None:
    environ = {
        "PATH": "/bin",
        "NOTIFY_SOCKET": "/n",
        "LISTEN_FDS": "2",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "a",
    }
    assert clean({**environ, heritage.VARIABLE: "9"}) == {"PATH": "/bin", "NOTIFY_SOCKET": "/n"}


def test_what_is_imported_after_the_tree_was_removed_comes_from_the_copy_beside_it(tmp_path: Path) -> None:
    for name in ("1.0", ".1.0"):
        package = tmp_path / name / "workers"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "late.py").write_text(f"PLACE = {name!r}\n")
    script = (
        "import shutil, sys\n"
        f"sys.path.insert(0, {str(tmp_path / '1.0')!r})\n"
        "import workers\n"
        "from supervisor.spawn import look_in_kept_tree\n"
        f"shutil.rmtree({str(tmp_path / '1.0')!r})\n"
        f"look_in_kept_tree({str(tmp_path / '1.0')!r})\n"
        "from workers.late import PLACE\n"
        "print(PLACE)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == ".1.0\n", done.stderr
