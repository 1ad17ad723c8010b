"""Runs in: the tests (as root). A container's life through its monitor, with both OCI runtimes."""

from __future__ import annotations

import importlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc import kernel
from ipc.errors import Code, RemoteError
from ipc.messages import monitor as messages
from tests.support.monitor_process import (
    RUNTIMES,
    MonitorProcess,
    Wish,
    busybox_root,
    children_of,
    monitor,
    until,
)
from workers.monitor import ending


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


def failed(call: object, *args: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        call(*args)  # type: ignore[operator]  # any callable
    return caught.value


def test_what_the_caller_wants_kept_is_on_disk_before_the_runtime_is_asked(
    crun: MonitorProcess, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    runtime = tmp_path / "runtime"
    runtime.write_text(f"#!/bin/sh\ncp -n {crun.directory}/cri.json {copy}\nexit 1\n")
    runtime.chmod(0o755)
    crun.start_monitor()
    request = crun.create_request(Wish(["true"], runtime_path=str(runtime)))
    request.keep = b"any words"
    failed(crun.client().call, request)
    assert copy.read_bytes() == b"any words"
    found = (crun.directory / "cri.json").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o640, crun.directory.stat().st_gid)
    assert stat.S_IMODE((crun.directory / "bundle" / "config.json").stat().st_mode) == 0o640


def test_a_container_is_created_started_logged_and_recorded(mon: MonitorProcess) -> None:
    mon.create("sh", "-c", "echo out; echo err >&2; exit 3")
    assert mon.state().status == "created"
    assert mon.log_path.stat().st_size == 0
    before = time.time_ns()
    started = mon.client().call(messages.Start()).started_at_ns
    record = mon.wait()
    assert (record.exit_code, record.signal, record.reason, record.oom_killed) == (3, 0, "Error", False)
    assert before <= started == record.started_at_ns <= record.finished_at_ns <= time.time_ns()
    assert mon.log_text("stdout") == b"out\n"
    assert mon.log_text("stderr") == b"err\n"
    assert not mon.alive()
    assert stat.S_IMODE(mon.log_path.stat().st_mode) == 0o640
    assert stat.S_IMODE(mon.log_path.parent.stat().st_mode) == 0o755


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 77", 77), ("exit 255", 255)])
def test_the_exit_code_is_exact(mon: MonitorProcess, script: str, code: int) -> None:
    mon.sh(script)
    assert mon.wait().exit_code == code


def test_a_container_killed_by_a_signal_has_128_and_its_number(mon: MonitorProcess) -> None:
    pid = mon.run("sleep", "100")
    os.kill(pid, signal.SIGKILL)
    record = mon.wait()
    assert (record.exit_code, record.signal) == (137, 9)


def test_requests_that_come_again_get_the_first_answers(mon: MonitorProcess) -> None:
    pid = mon.create("sleep", "100")
    assert mon.client().call(mon.create_request(Wish(["sleep", "100"]))).pid == pid
    first = mon.client().call(messages.Start())
    assert mon.client().call(messages.Start()) == first
    assert mon.stop(grace_ms=0).exit_code == 137


def test_create_of_a_missing_command_says_so_and_leaves_nothing(mon: MonitorProcess) -> None:
    mon.start_monitor()
    client = mon.client()
    request = mon.create_request(Wish(["no-such-command"]))
    error = failed(client.call, request)
    assert error.code is Code.INVALID_ARGUMENT
    assert "no-such-command" in error.text
    assert "not found" in error.text
    assert mon.wait_monitor() == 0
    assert mon.exit_record() is None
    assert mon.leftovers() == []


def test_create_with_a_broken_spec_says_so_and_leaves_nothing(mon: MonitorProcess) -> None:
    mon.start_monitor()
    request = mon.create_request(Wish(["true"]))
    request.spec = request.spec.replace(str(mon.root).encode(), b"/no/such/root")
    error = failed(mon.client().call, request)
    assert "/no/such/root" in error.text or "no such file" in error.text.lower()
    assert mon.wait_monitor() == 0


def test_a_runtime_that_is_not_there_is_a_clear_failure(mon: MonitorProcess) -> None:
    mon.start_monitor()
    error = failed(mon.client().call, mon.create_request(Wish(["true"], runtime_path="/no/such/runtime")))
    assert "/no/such/runtime" in error.text
    assert mon.wait_monitor() == 0


def test_a_create_that_hangs_is_ended_at_its_time(crun: MonitorProcess, tmp_path: Path) -> None:
    script = tmp_path / "slow-runtime"
    script.write_text('#!/bin/sh\ncase "$*" in *create*) sleep 100;; esac\n')
    script.chmod(0o755)
    crun.start_monitor()
    request = crun.create_request(Wish(["true"], runtime_path=str(script), timeout_ms=300))
    assert failed(crun.client().call, request).code is Code.DEADLINE_EXCEEDED
    assert crun.wait_monitor() == 0


def test_a_log_that_cannot_be_opened_fails_the_create(crun: MonitorProcess, tmp_path: Path) -> None:
    crun.start_monitor()
    crun.log_path = tmp_path / "in-the-way" / "0.log"
    crun.log_path.parent.write_text("a file")
    assert failed(crun.client().call, crun.create_request(Wish(["true"]))).code is Code.FAILED_PRECONDITION
    assert crun.wait_monitor() == 0


def test_a_created_container_is_stopped_without_having_run(mon: MonitorProcess) -> None:
    mon.create("sh", "-c", "echo never")
    record = mon.stop()
    assert record.started_at_ns == 0
    assert mon.wait() == record
    assert mon.log_text() == b""


def test_a_created_container_is_deleted_without_having_run(mon: MonitorProcess) -> None:
    mon.create("sleep", "100")
    mon.client().call(messages.Delete())
    assert mon.wait().started_at_ns == 0


def test_delete_ends_a_running_container(mon: MonitorProcess) -> None:
    mon.run("sleep", "100")
    mon.client().call(messages.Delete())
    assert mon.wait().signal == signal.SIGKILL


def test_delete_before_create_just_ends_the_monitor(crun: MonitorProcess) -> None:
    crun.start_monitor()
    assert failed(crun.client().call, messages.Start()).code is Code.FAILED_PRECONDITION
    assert failed(crun.client().call, messages.Stop()).code is Code.FAILED_PRECONDITION
    crun.client().call(messages.Delete())
    assert crun.wait_monitor() == 0
    assert crun.exit_record() is None


def test_record_and_log_are_there_before_anyone_is_told(mon: MonitorProcess) -> None:
    mon.sh("printf last; exit 5")
    told = mon.client().call(messages.Wait()).exit
    assert mon.exit_record() == told
    assert mon.log_text() == b"last"
    assert mon.wait_monitor() == 0
    assert list(mon.runtime_root.glob(mon.id)) == []


def test_a_container_outlives_everybody_who_asked(mon: MonitorProcess) -> None:
    mon.sh("sleep 0.3; echo done; exit 9")
    for client in mon._clients:
        client.close()
    assert mon.wait().exit_code == 9
    assert mon.log_text() == b"done\n"


def test_no_signal_but_the_last_ends_a_monitor(crun: MonitorProcess) -> None:
    crun.run("sleep", "100")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        os.kill(crun.pid, number)
    assert crun.state().status == "running"
    crun.stop(grace_ms=0)


def own_end() -> int:
    """A pidfd of a child that was reaped."""
    child = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(child.pid)
    child.wait()
    return pidfd


def test_an_init_that_is_nobodys_child_is_watched_all_the_same(crun: MonitorProcess, tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "100"])
    script = tmp_path / "machine-runtime"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *create*) echo {other.pid} > {crun.directory}/pid;;\n'
        f'*" kill "*) kill -9 {other.pid};; esac\n'
    )
    script.chmod(0o755)
    try:
        assert crun.run("true", runtime_path=str(script), cgroup=False) == other.pid
        stopping = threading.Thread(target=lambda: crun.stop("SIGKILL"))
        stopping.start()
        assert other.wait(10) == -signal.SIGKILL
        stopping.join(10)
        record = crun.wait()
        told = kernel.pidfd_exit_status(own_end()) is not None  # since Linux 6.15 a pidfd tells
        assert (record.exit_code, record.reason) == (137 if told else -1, "Error")
        assert ("unknown" in record.message) is not told
    finally:
        other.kill()
        other.wait()


def test_a_runtime_that_cannot_delete_is_asked_again(crun: MonitorProcess, tmp_path: Path) -> None:
    script, asked = tmp_path / "forgetful-runtime", tmp_path / "asked"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *" delete "*) [ -e {asked} ] || {{ touch {asked}; exit 1; }};; esac\n'
        'exec /usr/bin/crun "$@"\n'
    )
    script.chmod(0o755)
    crun.sh("exit 3", runtime_path=str(script))
    assert crun.wait().exit_code == 3
    assert asked.exists()
    assert list(crun.runtime_root.glob(crun.id)) == []


def test_a_runtime_that_never_deletes_is_in_the_record(
    crun: MonitorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "DELETE_DELAYS", (0.01, 0.01))
    script = crun.run_root.parent / "stubborn-runtime"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *" delete "*) echo busy >&2; exit 1;; esac\nexec /usr/bin/crun "$@"\n'
    )
    script.chmod(0o755)
    crun.sh("exit 3", runtime_path=str(script))
    record = crun.wait()
    assert record.exit_code == 3
    assert "could not be deleted" in record.message
    assert "busy" in record.message
    subprocess.run(
        ["/usr/bin/crun", "--root", str(crun.runtime_root), "delete", "--force", crun.id], check=True
    )


def test_a_failed_start_ends_the_container_with_its_reason(crun: MonitorProcess, tmp_path: Path) -> None:
    script = tmp_path / "starter"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *" start "*) echo "exec: x: not found" >&2; exit 1;; esac\n'
        'exec /usr/bin/crun "$@"\n'
    )
    script.chmod(0o755)
    crun.create("sleep", "100", runtime_path=str(script))
    assert "not found" in failed(crun.client().call, messages.Start()).text
    record = crun.wait()
    assert (record.exit_code, record.reason, record.started_at_ns) == (127, "StartError", 0)


def test_state_json_names_the_process_for_the_next_cri(mon: MonitorProcess) -> None:
    import msgspec

    from workers.monitor.records import StateRecord

    pid = mon.run("sleep", "100")
    record = msgspec.json.decode((mon.directory / "state.json").read_bytes(), type=StateRecord)
    start = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    assert (record.status, record.pid, record.pid_start) == ("running", pid, start)
    assert record.monitor_pid == mon.pid
    mon.stop(grace_ms=0)


def test_the_container_inherits_nothing_of_the_monitor(mon: MonitorProcess) -> None:
    pid = mon.run("sleep", "100")
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
    descriptors = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert set(descriptors) == {"0", "1", "2"}
    assert descriptors["0"] == "/dev/null"
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    standard = (1 << 31) - 1  # glibc's posix_spawn leaves a signal of its own, 32, ignored
    assert int(status["SigIgn"], 16) & standard == 0
    assert int(status["SigBlk"], 16) == 0
    assert int(status["Seccomp"]) == int(
        dict(
            line.split(":\t", 1)
            for line in Path("/proc/self/status").read_text().splitlines()
            if ":\t" in line
        )["Seccomp"]
    )
    mon.stop(grace_ms=0)


def test_orphans_are_reaped_so_that_a_failed_exec_cannot_keep_a_container_alive(mon: MonitorProcess) -> None:
    mon.run("sleep", "100")
    for _ in range(3):
        failed(lambda: mon.exec("no-such-command"))
    assert mon.stop(grace_ms=200).signal == signal.SIGKILL
    assert mon.wait_monitor() == 0
    assert children_of(mon.pid) == []


def test_a_monitor_loads_nothing_after_the_fork(mon: MonitorProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.monitor import main

    importlib.import_module("workers.monitor.keeper")  # by prepare_process, before the fork that counts

    known = set(sys.modules)
    original = main.run

    def watched(*args: object, **kwargs: object) -> None:
        try:
            original(*args, **kwargs)  # type: ignore[arg-type]  # passed through
        finally:
            new = sorted(set(sys.modules) - known)
            (mon.directory / "modules").write_text(repr(new))

    monkeypatch.setattr(main, "run", watched)
    mon.run("sh", "-c", "echo one; sleep 100")
    mon.exec("true")
    failed(lambda: mon.exec("no-such-command"))
    mon.client().call(messages.LogReopen())
    mon.stop("SIGRTMIN+3", 100)
    mon.wait_monitor()
    assert (mon.directory / "modules").read_text() == "[]"


def test_the_whole_container_ends_with_its_first_process_without_a_pid_namespace(mon: MonitorProcess) -> None:
    mon.sh("nohup setsid sleep 1000 & sleep 0.2; exit 4", pid_namespace=False)
    started = time.monotonic()
    assert mon.wait().exit_code == 4
    assert time.monotonic() - started < 5
    assert mon.leftovers() == []


def test_a_process_outside_that_holds_the_output_delays_the_end_only_shortly(mon: MonitorProcess) -> None:
    pid = mon.run("sh", "-c", "echo first; sleep 100")
    until(lambda: mon.log_text() == b"first\n")
    held = os.open(f"/proc/{pid}/fd/1", os.O_WRONLY)
    try:
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        record = mon.wait()
        assert 0.2 < time.monotonic() - started < 2.5
    finally:
        os.close(held)
    assert record.exit_code == 137
    assert mon.log_text() == b"first\n"


def test_everything_written_before_the_end_is_in_the_log(mon: MonitorProcess) -> None:
    mon.sh("seq 1 100000")
    mon.wait()
    assert mon.log_text() == b"".join(b"%d\n" % n for n in range(1, 100001))
