"""Runs in: the tests (as root). Stopping a container, whatever it does about it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.errors import Code, RemoteError
from ipc.messages import monitor as messages
from tests.support.monitor_process import RUNTIMES, MonitorProcess, busybox_root, monitor, until

READY = "echo ready; while :; do sleep 0.05; done"


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


def ready(mon: MonitorProcess) -> None:
    until(lambda: b"ready\n" in mon.log_text())


def test_a_container_that_handles_the_stop_signal_ends_by_itself(mon: MonitorProcess) -> None:
    mon.sh(f"trap 'echo bye; exit 7' TERM; {READY}")
    ready(mon)
    started = time.monotonic()
    assert mon.stop().exit_code == 7
    assert time.monotonic() - started < 2
    assert mon.log_text() == b"ready\nbye\n"


@pytest.mark.parametrize(
    ("name", "trapped"), [("USR1", "USR1"), ("sigusr2", "USR2"), ("15", "TERM"), ("SIGRTMIN+3", "RTMIN+3")]
)
def test_stop_signals_go_by_name_and_number(crun: MonitorProcess, name: str, trapped: str) -> None:
    number = 37 if trapped == "RTMIN+3" else signal.Signals["SIG" + trapped].value
    crun.sh(f"trap 'exit {number}' {number}; {READY}")
    ready(crun)
    assert crun.stop(name).exit_code == number


def test_an_unknown_signal_is_refused_and_stops_nothing(crun: MonitorProcess) -> None:
    crun.run("sleep", "100")
    with pytest.raises(RemoteError) as caught:
        crun.stop("SIGNONSENSE")
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert crun.state().status == "running"


def test_a_container_that_ignores_the_signal_is_killed_after_the_grace(mon: MonitorProcess) -> None:
    mon.sh(f"trap '' TERM; {READY}")
    ready(mon)
    started = time.monotonic()
    assert mon.stop(grace_ms=400).signal == signal.SIGKILL
    assert 0.4 <= time.monotonic() - started < 2


def test_no_grace_kills_at_once(mon: MonitorProcess) -> None:
    mon.sh(f"trap 'exit 0' TERM; {READY}")
    ready(mon)
    assert mon.stop(grace_ms=0).signal == signal.SIGKILL


def test_a_signal_lost_on_an_entry_point_that_starts_is_sent_again(mon: MonitorProcess) -> None:
    mon.sh(f"echo early; sleep 0.6; trap 'exit 8' TERM; {READY}")
    until(lambda: b"early\n" in mon.log_text())
    started = time.monotonic()
    assert mon.stop(grace_ms=10_000).exit_code == 8
    assert time.monotonic() - started < 3


def test_a_stop_right_after_the_start_is_not_lost(mon: MonitorProcess) -> None:
    mon.sh(f"trap 'exit 8' TERM; {READY}")
    started = time.monotonic()
    mon.stop(grace_ms=10_000)
    assert time.monotonic() - started < 3


def test_a_later_shorter_grace_shortens_and_a_longer_changes_nothing(crun: MonitorProcess) -> None:
    crun.sh(f"trap '' TERM; {READY}")
    ready(crun)
    results: list[messages.ExitRecord] = []
    waiting = threading.Thread(target=lambda: results.append(crun.stop(grace_ms=60_000)))
    waiting.start()
    time.sleep(0.1)
    started = time.monotonic()
    shorter = threading.Thread(target=lambda: results.append(crun.stop(grace_ms=300)))
    shorter.start()
    time.sleep(0.05)
    assert crun.stop(grace_ms=60_000).signal == signal.SIGKILL
    for thread in (waiting, shorter):
        thread.join(10)
    assert 0.2 < time.monotonic() - started < 3
    assert len(results) == 2


def test_a_stop_goes_on_when_its_caller_is_gone(mon: MonitorProcess) -> None:
    mon.sh(f"trap '' TERM; {READY}")
    ready(mon)
    client = mon.client()
    with pytest.raises(RemoteError):
        client.call(messages.Stop(grace_ms=500), timeout=0.05)
    client.close()
    assert mon.wait().signal == signal.SIGKILL


def test_a_stop_ends_a_start_whose_runtime_waits_for_the_dead_init(
    mon: MonitorProcess, tmp_path: Path
) -> None:
    # crun and runc open the FIFO that the init reads; when it is killed just before, nobody ever will.
    runtime = tmp_path / "waiting"
    runtime.write_text(
        '#!/bin/sh\ncase " $* " in *" start "*) exec sleep 600;; esac\n' + f'exec {mon.runtime} "$@"\n'
    )
    runtime.chmod(0o755)
    mon.create("sleep", "100", runtime_path=str(runtime))
    told: list[RemoteError] = []

    def start() -> None:
        with pytest.raises(RemoteError) as caught:
            mon.client().call(messages.Start())
        told.append(caught.value)

    starter = threading.Thread(target=start)
    starter.start()
    until(lambda: mon.state().starting)
    since = time.monotonic()
    record = mon.stop(grace_ms=0)
    assert time.monotonic() - since < 10
    assert (record.exit_code, record.signal, record.started_at_ns) == (137, signal.SIGKILL, 0)
    assert record.reason != "StartError"
    starter.join()
    assert told[0].code is Code.FAILED_PRECONDITION
    assert "ended before its command" in told[0].text


@pytest.mark.parametrize("grace_ms", [0, 300])
def test_a_frozen_container_is_stopped(mon: MonitorProcess, grace_ms: int) -> None:
    init = mon.run("sleep", "100")
    # A Go runtime's init that is frozen while it executes the command never is: its threads cannot end.
    until(lambda: Path(f"/proc/{init}/comm").read_text() == "sleep\n")
    freezer = next(path / "freezer.state" for path in mon.cgroups() if (path / "freezer.state").exists())
    freezer.write_text("FROZEN")
    until(lambda: freezer.read_text() == "FROZEN\n")
    assert mon.stop(grace_ms=grace_ms).signal == signal.SIGKILL


def test_a_thawed_container_still_ends_in_its_own_way(mon: MonitorProcess) -> None:
    mon.sh(f"trap 'exit 6' TERM; {READY}")
    ready(mon)
    freezer = next(path / "freezer.state" for path in mon.cgroups() if (path / "freezer.state").exists())
    freezer.write_text("FROZEN")
    until(lambda: freezer.read_text() == "FROZEN\n")
    assert mon.stop().exit_code == 6


def test_stopping_kills_everything_where_the_pid_namespace_does_not(mon: MonitorProcess) -> None:
    mon.sh(
        "setsid sh -c \"trap '' TERM; while :; do sleep 1; done\" & setsid sleep 1000 & sleep 1000",
        pid_namespace=False,
    )
    until(lambda: len((mon.cgroups()[0] / "cgroup.procs").read_text().split()) >= 3)
    assert mon.stop(grace_ms=3000).signal == signal.SIGTERM
    assert mon.wait_monitor() == 0
    assert mon.leftovers() == []


def test_a_fork_storm_does_not_escape(crun: MonitorProcess) -> None:
    crun.sh(
        "f() { setsid sh -c 'while :; do sleep 0.01 & done' & }; f; f; sleep 0.3; exit 2", pid_namespace=False
    )
    assert crun.wait().exit_code == 2
    assert crun.leftovers() == []


def test_start_of_a_stopped_container_is_refused(mon: MonitorProcess) -> None:
    mon.create("sleep", "100")
    os.kill(mon.pid, signal.SIGSTOP)  # so that both requests wait for the monitor
    stopping = threading.Thread(target=mon.stop)
    stopping.start()
    time.sleep(0.1)
    caught: list[RemoteError] = []

    def start() -> None:
        try:
            mon.client().call(messages.Start())
        except RemoteError as error:
            caught.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    time.sleep(0.1)
    os.kill(mon.pid, signal.SIGCONT)
    for thread in (stopping, starting):
        thread.join(10)
    assert [error.code for error in caught] in ([Code.FAILED_PRECONDITION], [Code.UNAVAILABLE])
    assert mon.wait().started_at_ns == 0
