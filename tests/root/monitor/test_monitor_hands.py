"""Runs in: the tests (as root). What becomes of a container whose monitor's hand dies or hangs."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ipc import kernel
from ipc.errors import RemoteError
from ipc.messages import Body, Request
from ipc.messages import monitor as messages
from tests.support.monitor_process import MonitorProcess, Wish, busybox_root, children_of, monitor, until
from workers.monitor import hand, lastact, records
from workers.monitor.main import Monitor
from workers.monitor.runtime import Invocation, Launcher

T = TypeVar("T", bound=Body)
COUNTER = "trap 'exit 7' TERM; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return busybox_root(tmp_path_factory.mktemp("rootfs"))


@pytest.fixture
def mon(root: Path) -> Iterator[MonitorProcess]:
    with monitor(root, "crun") as process:
        yield process


def hand_of(mon: MonitorProcess, init: int) -> int:
    """The pid of the hand that lives."""
    (found,) = set(children_of(mon.pid)) - {init}
    return found


def logged_without_a_gap(mon: MonitorProcess) -> bool:
    lines = mon.log_text().decode().splitlines()
    return lines == [f"line {number}" for number in range(len(lines))]


def test_a_hand_that_dies_takes_its_calls_along_and_nothing_else(mon: MonitorProcess) -> None:
    init = mon.sh(COUNTER)
    failures: list[RemoteError] = []

    def execute() -> None:
        with pytest.raises(RemoteError) as caught:
            mon.exec("sleep", "100")
        failures.append(caught.value)

    caller = threading.Thread(target=execute)
    caller.start()
    until(lambda: len(list(mon.directory.glob("exec-*.pid"))) == 0 and mon.state().execs == 1)
    os.kill(hand_of(mon, init), signal.SIGKILL)
    caller.join(10)
    assert len(failures) == 1
    assert mon.state().pid == init  # of the next one
    assert mon.state().status == "running"
    before = len(mon.log_lines())
    until(lambda: len(mon.log_lines()) > before + 5)
    assert mon.exec("sh", "-c", "echo again").stdout == b"again\n"
    assert mon.stop().exit_code == 7
    assert logged_without_a_gap(mon)
    mon.wait()


def test_a_hand_that_hangs_is_ended_and_the_next_one_serves(
    mon: MonitorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand, "PATIENCE", 1)
    mon.sh(COUNTER)
    until(mon.log_path.exists)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)  # a file system that never answers
    place = str(mon.log_path.parent)
    kernel.mount("none", place, "fuse", 0, f"fd={device},rootmode=40000,user_id=0,group_id=0")
    try:
        began = time.monotonic()
        with pytest.raises(RemoteError):
            mon.client().call(messages.LogReopen(), timeout=30)
        assert time.monotonic() - began < 10
        assert mon.exec("sh", "-c", "echo again").stdout == b"again\n"
        assert mon.stop().exit_code == 7
    finally:
        kernel.umount(place, kernel.MNT_DETACH)
        os.close(device)
    assert logged_without_a_gap(mon)
    mon.wait()


def test_a_container_ends_though_its_hand_never_says_its_last_word(
    mon: MonitorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lastact, "PATIENCE", 0.3)
    init = mon.run("sh", "-c", "sleep 0.5; echo over; exit 3")
    os.kill(hand_of(mon, init), signal.SIGSTOP)
    record = mon.wait()
    assert (record.exit_code, mon.log_text()) == (3, b"over\n")


def test_a_hand_that_ends_just_when_the_container_does_is_not_waited_for(
    mon: MonitorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Monitor.end

    def late(self: Monitor) -> None:
        keeper = self.keeper
        os.kill(keeper.hand_pid, signal.SIGKILL)
        until(lambda: ") Z " in Path(f"/proc/{keeper.hand_pid}/stat").read_text())
        original(self)

    monkeypatch.setattr(Monitor, "end", late)
    mon.run("sh", "-c", "sleep 0.3; exit 3")
    mon.client()  # keeps the hand
    assert mon.wait().exit_code == 3


@pytest.mark.parametrize("runtime", ["crun", "runc"])
@pytest.mark.parametrize("moment", ["asked", "created", "noted", "ended"])
def test_a_hand_that_dies_while_it_creates_leaves_a_container_or_none(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, runtime: str
) -> None:
    """`asked`: the OCI runtime is at work; `created`: nobody knows of it; `noted`: the state is written and
    nothing is handed over; `ended`: and the container has ended by itself."""
    flag = tmp_path / "first"
    flag.touch()

    def die_once() -> None:
        if flag.exists():
            flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def write_state(directory: str, record: records.StateRecord, write: Any = records.write_state) -> None:
        if moment == "created":
            die_once()
        write(directory, record)
        if moment == "ended":
            os.kill(record.pid, signal.SIGKILL)
            time.sleep(0.1)
        die_once()

    def call(self: Launcher, *words: Any, call: Any = Launcher.call, **options: Any) -> Invocation:
        invocation: Invocation = call(self, *words, **options)
        if moment == "asked":
            time.sleep(0.01)
            die_once()
        return invocation

    monkeypatch.setattr(records, "write_state", write_state)
    monkeypatch.setattr(Launcher, "call", call)
    with monitor(root, runtime) as mon:
        if moment == "ended":
            with pytest.raises(RemoteError):
                mon.create("sh", "-c", COUNTER)
            assert mon.wait().exit_code == 137
            return
        init = mon.create("sh", "-c", COUNTER)  # is asked again, of the next hand
        assert not flag.exists()
        assert json.loads((mon.directory / "state.json").read_text())["pid"] == init
        mon.client().call(messages.Start())
        until(lambda: mon.log_path.exists() and len(mon.log_lines()) > 2)
        assert mon.stop().exit_code == 7
        mon.wait()
        assert logged_without_a_gap(mon)


def beheaded(mon: MonitorProcess, request: Request[T], delay: float) -> T:
    """Make a call, kill the hand `delay` after it is there, and make it again; return the answer."""

    def ask() -> T:
        return mon.client().call(request)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask)
        until(lambda: hands_of(mon) or first.done())
        time.sleep(delay)
        for pid in hands_of(mon):
            os.kill(pid, signal.SIGKILL)
        first.exception(20)  # it may have been answered by then
    return ask()


def hands_of(mon: MonitorProcess) -> list[int]:
    programs = {pid: os.path.basename(os.readlink(f"/proc/{pid}/exe")) for pid in children_of(mon.pid)}
    return [pid for pid, program in programs.items() if program.startswith("python")]


@pytest.mark.parametrize("runtime", ["crun", "runc"])
@pytest.mark.parametrize("delay", [0.0, 0.004, 0.01, 0.03])
def test_a_hand_that_dies_over_a_create_or_a_start_costs_neither(
    root: Path, runtime: str, delay: float
) -> None:
    """Before, while and after the runtime does it; the call is made again, as cri does."""
    with monitor(root, runtime) as mon:
        mon.start_monitor()
        init = beheaded(mon, mon.create_request(Wish(["sh", "-c", COUNTER])), delay).pid
        beheaded(mon, messages.Start(), delay)
        assert (mon.state().status, mon.state().pid) == ("running", init)
        until(lambda: len(mon.log_lines()) > 3)
        assert mon.stop().exit_code == 7
        assert logged_without_a_gap(mon)
        mon.wait()
