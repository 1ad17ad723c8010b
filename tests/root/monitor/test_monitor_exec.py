"""Runs in: the tests (as root). ExecSync: output, codes, time-outs, and nothing left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.errors import Code, RemoteError
from ipc.messages import monitor as messages
from tests.support.monitor_process import (
    RUNTIMES,
    MonitorProcess,
    busybox_root,
    children_of,
    monitor,
    until,
)
from workers.monitor import procfs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return busybox_root(tmp_path_factory.mktemp("rootfs"))


@pytest.fixture(params=RUNTIMES)
def mon(request: pytest.FixtureRequest, root: Path) -> Iterator[MonitorProcess]:
    with monitor(root, request.param) as process:
        process.run("sleep", "1000")
        yield process


@pytest.fixture
def crun(root: Path) -> Iterator[MonitorProcess]:
    with monitor(root, "crun") as process:
        process.run("sleep", "1000")
        yield process


def commands(mon: MonitorProcess) -> list[str]:
    """The command lines in the container's group."""
    pids = (mon.cgroups()[0] / "cgroup.procs").read_text().split()
    found = []
    for pid in pids:
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or read
            continue
    return sorted(found)


def test_output_and_code_come_back(mon: MonitorProcess) -> None:
    done = mon.exec("sh", "-c", "echo out; echo err >&2; exit 42")
    assert (done.exit_code, done.stdout, done.stderr, done.timed_out) == (42, b"out\n", b"err\n", False)
    assert list(mon.directory.glob("exec-*")) == []
    assert mon.state().execs == 0


@pytest.mark.parametrize("code", [0, 1, 126, 127, 255])
def test_a_commands_own_code_is_never_taken_for_the_runtimes(mon: MonitorProcess, code: int) -> None:
    assert mon.exec("sh", "-c", f"exit {code}").exit_code == code


def test_a_command_killed_by_a_signal_has_128_and_its_number(mon: MonitorProcess) -> None:
    assert mon.exec("sh", "-c", "kill -KILL $$").exit_code == 137


def test_a_missing_command_is_an_error_with_the_runtimes_sentence(mon: MonitorProcess) -> None:
    with pytest.raises(RemoteError) as caught:
        mon.exec("no-such-command")
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert "no-such-command" in caught.value.text


def test_a_command_that_may_not_run_is_an_error(mon: MonitorProcess) -> None:
    with pytest.raises(RemoteError) as caught:
        mon.exec("/tmp")
    assert caught.value.code in (Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION)


def test_a_process_that_is_no_process_is_an_error(mon: MonitorProcess) -> None:
    with pytest.raises(RemoteError):
        mon.client().call(messages.ExecSync(process=b"{nonsense"))


def test_output_over_the_limit_is_counted_not_kept(mon: MonitorProcess) -> None:
    done = mon.exec("sh", "-c", "yes | head -c 3000000; yes | head -c 10 >&2", limit=1_000_000)
    assert (len(done.stdout), done.stdout_dropped) == (1_000_000, 2_000_000)
    assert (done.stderr, done.stderr_dropped) == (b"y\n" * 5, 0)


def test_sixteen_mebibytes_come_back_whole_and_no_more(crun: MonitorProcess) -> None:
    size = 16 * 1024 * 1024
    done = crun.exec("sh", "-c", f"yes | head -c {size + 5}", limit=2**40)
    assert (len(done.stdout), done.stdout_dropped) == (size, 5)
    assert done.stdout == b"y\n" * (size // 2)


def test_a_timeout_kills_the_command_and_keeps_what_it_said(mon: MonitorProcess) -> None:
    started = time.monotonic()
    done = mon.exec("sh", "-c", "echo before; sleep 500; echo after", timeout_ms=500)
    assert done.timed_out
    assert done.stdout == b"before\n"
    assert time.monotonic() - started < 3
    until(lambda: commands(mon) == ["sleep 1000"])


def test_a_timeout_kills_what_the_command_started(mon: MonitorProcess) -> None:
    script = "sleep 501 & (sleep 502 &) ; setsid sleep 503 & sh -c 'sleep 504 & sleep 505' & sleep 506"
    assert mon.exec("sh", "-c", script, timeout_ms=500).timed_out
    until(lambda: commands(mon) == ["sleep 1000"])


def test_a_timeout_kills_a_daemon_that_holds_the_output(mon: MonitorProcess) -> None:
    assert mon.exec("sh", "-c", "(setsid sh -c 'setsid sleep 507' &) ; sleep 508", timeout_ms=500).timed_out
    until(lambda: commands(mon) == ["sleep 1000"])


def test_a_timeout_leaves_other_execs_alone(crun: MonitorProcess) -> None:
    results: list[messages.ExecDone] = []
    other = threading.Thread(target=lambda: results.append(crun.exec("sh", "-c", "sleep 0.8; echo fine")))
    other.start()
    assert crun.exec("sleep", "509", timeout_ms=300).timed_out
    other.join(10)
    assert results[0].stdout == b"fine\n"


def test_an_abandoned_exec_is_killed(mon: MonitorProcess) -> None:
    client = mon.client()
    with pytest.raises(RemoteError):
        client.call(
            messages.ExecSync(process=mon.process(["sh", "-c", "sleep 510 & sleep 511"])), timeout=0.3
        )
    client.close()
    until(lambda: commands(mon) == ["sleep 1000"])
    until(lambda: mon.state().execs == 0)


def test_who_is_forked_while_the_family_is_being_stopped_is_killed_too() -> None:
    root = subprocess.Popen(["sh", "-c", "sleep 514 & sleep 515"], start_new_session=True)
    until(lambda: len(children_of(root.pid)) == 2)
    children = children_of(root.pid)
    seen: list[int] = []

    def candidates() -> list[int]:
        """Who is forked last shows when all others are known and stopped."""
        seen.append(0)
        return [root.pid, children[0], *(children[1:] if len(seen) > 2 else [])]

    try:
        procfs.kill_family(root.pid, root.pid, candidates, [])
        until(lambda: not any(Path(f"/proc/{child}/cmdline").exists() for child in children))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(root.pid, signal.SIGKILL)
        assert root.wait() == -signal.SIGKILL


def test_a_caller_that_vanishes_at_once_leaves_no_exec(mon: MonitorProcess) -> None:
    client = mon.client()
    with pytest.raises(RemoteError):
        client.call(messages.ExecSync(process=mon.process(["sleep", "512"])), timeout=0.001)
    client.close()
    until(lambda: mon.state().execs == 0)
    assert commands(mon) == ["sleep 1000"]


def test_a_background_child_that_holds_the_output_does_not_hold_the_answer(mon: MonitorProcess) -> None:
    started = time.monotonic()
    done = mon.exec("sh", "-c", "echo said; sleep 513 & exit 4")
    assert (done.exit_code, done.stdout) == (4, b"said\n")
    assert time.monotonic() - started < 1.5
    assert "sleep 513" in commands(mon)


def test_a_background_child_that_goes_on_writing_does_not_hold_the_answer_for_ever(
    crun: MonitorProcess,
) -> None:
    started = time.monotonic()
    done = crun.exec("sh", "-c", "(while :; do echo more; sleep 0.05; done) & exit 0")
    assert done.exit_code == 0
    assert 1.5 < time.monotonic() - started < 4


def test_many_execs_at_once_keep_their_outputs_apart(crun: MonitorProcess) -> None:
    results: dict[int, messages.ExecDone] = {}

    def ask(number: int) -> None:
        results[number] = crun.exec("sh", "-c", f"echo {number}; exit {number}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {n: (d.exit_code, d.stdout) for n, d in results.items()} == {
        n: (n, b"%d\n" % n) for n in range(20)
    }


def test_an_exec_ends_with_its_container(mon: MonitorProcess) -> None:
    results: list[object] = []

    def ask() -> None:
        try:
            results.append(mon.exec("sleep", "514"))
        except RemoteError as error:
            results.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: mon.state().execs == 1)
    mon.stop(grace_ms=0)
    asking.join(10)
    assert isinstance(results[0], RemoteError) or results[0].exit_code == 137  # type: ignore[attr-defined]


def test_exec_in_a_container_that_does_not_run_is_refused(root: Path) -> None:
    with monitor(root, "crun") as created:
        created.create("sleep", "1000")
        with pytest.raises(RemoteError) as caught:
            created.exec("true")
        assert caught.value.code is Code.FAILED_PRECONDITION
