"""Runs in: the tests (as root). Log files, terminals, standard input, the OOM killer."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.messages import monitor as messages
from tests.support.monitor_process import RUNTIMES, MonitorProcess, busybox_root, joined, monitor, until

RECORD = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}[+-]\d\d:\d\d (stdout|stderr) [FP] [^\n]*\n")
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return busybox_root(tmp_path_factory.mktemp("rootfs"))


@pytest.fixture(params=RUNTIMES)
def mon(request: pytest.FixtureRequest, root: Path) -> Iterator[MonitorProcess]:
    with monitor(root, request.param) as process:
        yield process


@pytest.fixture
def crun(root: Path) -> Iterator[MonitorProcess]:
    with monitor(root, "crun") as process:
        yield process


def test_a_prompt_without_a_newline_is_in_the_log_at_once(crun: MonitorProcess) -> None:
    crun.sh("printf 'name? '; sleep 100")
    until(lambda: crun.log_text() == b"name? ")
    assert b" stdout P name? \n" in crun.log_path.read_bytes()
    crun.stop(grace_ms=0)


def test_binary_output_comes_back_exactly(crun: MonitorProcess) -> None:
    crun.sh("head -c 3000000 /bin/busybox | head -c 1900000; head -c 100000 /bin/busybox >&2")
    crun.wait()
    busybox = Path("/bin/busybox").read_bytes()
    assert crun.log_text("stdout") == busybox[:1_900_000]
    assert crun.log_text("stderr") == busybox[:100_000]
    assert re.fullmatch(rb"(?:%s)*" % RECORD.pattern, crun.log_path.read_bytes())


def test_rotation_loses_doubles_and_tears_nothing(mon: MonitorProcess) -> None:
    mon.sh("i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; seq 1 50000; sleep 100")
    client = mon.client()
    files = []
    for number in range(50):
        files.append(Path(f"{mon.log_path}.{number}"))
        os.rename(mon.log_path, files[-1])
        client.call(messages.LogReopen())
        time.sleep(0.005)
    files.append(mon.log_path)
    written = b"".join(b"line %d\n" % n for n in range(3000)) + b"".join(b"%d\n" % n for n in range(1, 50001))
    until(lambda: joined(b"".join(file.read_bytes() for file in files), "stdout").endswith(b"\n50000\n"))
    mon.stop(grace_ms=0)
    mon.wait()
    for file in files:
        assert re.fullmatch(rb"(?:%s)*" % RECORD.pattern, file.read_bytes())
    assert joined(b"".join(file.read_bytes() for file in files), "stdout") == written


def test_a_full_disk_drops_whole_records_counts_them_and_blocks_nobody(crun: MonitorProcess) -> None:
    from ipc import kernel

    small = crun.run_root.parent / "small"
    small.mkdir()
    kernel.mount("tmpfs", str(small), "tmpfs", 0, "size=128k")
    try:
        crun.log_path = small / "0.log"
        crun.sh("seq 1 100000; echo done > /dev/null; sleep 100")
        until(lambda: crun.state().log_bytes_dropped > 0)
        until(lambda: crun.state().log_bytes + crun.state().log_bytes_dropped > 100_000 * 50)
        full = crun.log_path.read_bytes()
        os.truncate(crun.log_path, 0)
        # The record that did not fit is finished first, so that a file that kept growing would be whole.
        assert crun.exec("true").exit_code == 0
        assert crun.state().log_bytes >= len(full)
        crun.stop(grace_ms=0)
        crun.wait()
    finally:
        kernel.umount(str(small), 2)
    assert full.count(b"\n") > 1000
    assert RECORD.fullmatch(full[: full.index(b"\n") + 1])


def test_without_a_log_path_output_is_read_and_dropped(crun: MonitorProcess) -> None:
    crun.sh("seq 1 100000", log=False)
    assert crun.wait().exit_code == 0
    assert not crun.log_path.exists()


def test_a_terminal_is_logged_as_stdout_and_ends_with_its_last_process(mon: MonitorProcess) -> None:
    mon.sh("test -t 0 && test -t 1 && echo tty; echo err >&2; exit 5", terminal=True)
    assert mon.wait().exit_code == 5
    assert mon.log_text("stdout") == b"tty\r\nerr\r\n"
    assert mon.log_text("stderr") == b""
    assert not (mon.directory / "tty.sock").exists()


def test_a_terminal_container_is_stopped(mon: MonitorProcess) -> None:
    mon.sh("trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done", terminal=True)
    until(lambda: b"ready" in mon.log_text())
    assert mon.stop().exit_code == 3


def test_stdin_stays_open_where_it_is_wanted_and_is_empty_where_not(mon: MonitorProcess) -> None:
    pid = mon.run("sleep", "100", stdin=True)
    fd = os.open(f"/proc/{pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert not select.select([fd], [], [], 0.1)[0]
    finally:
        os.close(fd)
    mon.stop(grace_ms=0)


def test_a_reader_of_no_stdin_sees_its_end_at_once(mon: MonitorProcess) -> None:
    mon.run("cat")
    assert mon.wait().exit_code == 0


EATER = "sh -c 'x=$(yes | head -c 200000000); echo ${#x}'"


def test_an_oom_kill_of_the_init_is_told(mon: MonitorProcess) -> None:
    mon.run("sh", "-c", "x=$(yes | head -c 200000000); echo ${#x}", memory=24 * MIB)
    record = mon.wait()
    assert record.oom_killed
    assert (record.exit_code, record.reason) == (137, "OOMKilled")


def test_an_oom_kill_of_another_process_is_told(mon: MonitorProcess) -> None:
    mon.sh(f"{EATER}; exit 9", memory=24 * MIB)
    record = mon.wait()
    assert record.oom_killed
    assert (record.exit_code, record.reason) == (9, "OOMKilled")


def test_a_container_that_ends_well_is_completed(mon: MonitorProcess) -> None:
    mon.sh("true", memory=24 * MIB)
    record = mon.wait()
    assert not record.oom_killed
    assert record.reason == "Completed"
