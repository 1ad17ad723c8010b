"""Runs in: the tests. The monitor's parts that need no container."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ipc.errors import Code, RemoteError
from ipc.loop import Loop
from ipc.messages.monitor import ExitRecord
from workers.monitor import oom, procfs, records
from workers.monitor.cgroups import Cgroups, directory, own_path, parse
from workers.monitor.console import ConsoleSocket
from workers.monitor.execs import Collector
from workers.monitor.procfs import Disposition
from workers.monitor.reaper import Reaper, exit_code
from workers.monitor.runtime import (
    Launcher,
    OomScore,
    Outcome,
    Runtime,
    Streams,
    classify,
    environment,
    last_error,
    start_exit_code,
)
from workers.monitor.stopping import Stopper
from workers.monitor.updating import set_properties

# -- what the runtime says ----------------------------------------------------------------------------------

CRUN = b'{"msg":"executable file `x` not found in $PATH: No such file or directory","level":"error"}\n'
RUNC = (
    b'{"level":"error","msg":"exec failed: exec: \\"x\\": executable file not found in $PATH","time":"t"}\n'
)


@pytest.mark.parametrize(
    "log", [CRUN, RUNC, b'{"level":"warning","msg":"w"}\n' + CRUN, CRUN + b"exec failed\n"]
)
def test_the_runtimes_own_sentence_is_found(log: bytes) -> None:
    sentence = last_error(log)
    assert "executable file" in sentence
    assert classify(sentence) is Code.INVALID_ARGUMENT


def test_plain_last_words_serve_where_there_is_no_json() -> None:
    assert last_error(b"first\nlast words\n\n") == "last words"
    assert last_error(b"") == ""
    assert last_error(b'[1]\n"x"\n') == ""


def test_a_fault_of_the_node_is_not_one_of_the_request() -> None:
    assert classify("cgroup: device or resource busy") is Code.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("outcome", "code", "text"),
    [
        (Outcome(1, "", True), Code.DEADLINE_EXCEEDED, "in time"),
        (Outcome(1), Code.FAILED_PRECONDITION, "ended with 1"),
        (Outcome(1, "no such file or directory"), Code.INVALID_ARGUMENT, "create: no such file"),
    ],
)
def test_every_bad_outcome_is_an_error_with_a_cause(outcome: Outcome, code: Code, text: str) -> None:
    assert not outcome.ok
    assert outcome.error("create").code is code
    assert text in outcome.error("create").text


@pytest.mark.parametrize(
    ("sentence", "code"), [("x: not found", 127), ("exec: permission denied", 126), ("something else", 128)]
)
def test_a_failed_start_has_the_shells_code(sentence: str, code: int) -> None:
    assert start_exit_code(sentence) == code


def test_global_options_stand_before_the_command() -> None:
    argv = Runtime("/r", "/state", ("--debug",), systemd_cgroup=True).argv("start", "id")
    assert argv[0] == "/r"
    assert argv[1:3] == ["--root", "/state"]
    assert argv[-4:] == ["--debug", "--systemd-cgroup", "start", "id"]


def test_a_runtime_gets_nothing_of_systemds_sockets() -> None:
    assert environment({"NOTIFY_SOCKET": "/n", "LISTEN_FDS": "3", "WATCHDOG_USEC": "1"}) == {
        "PATH": os.defpath
    }
    assert environment({"PATH": "/p", "TMPDIR": "/t"}) == {"PATH": "/p", "TMPDIR": "/t"}


def test_the_oom_score_is_lowered_and_raised_around_a_fork(tmp_path: Path) -> None:
    path = tmp_path / "oom_score_adj"
    path.write_bytes(b"-900")
    score = OomScore(str(path))
    assert score.lowered
    assert path.read_bytes() == b"-999"
    with score:
        assert path.read_bytes()[:1] == b"0"
    assert path.read_bytes() == b"-999"


def test_where_the_oom_score_may_not_be_lowered_it_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "oom_score_adj"
    path.write_bytes(b"5")

    def refuse(*_arguments: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pwrite", refuse)
    score = OomScore(str(path))
    with score:
        assert path.read_bytes() == b"5"
    assert not score.lowered


# -- children -----------------------------------------------------------------------------------------------


def turn_until(loop: Loop, condition: object, turns: int = 500) -> None:
    for _ in range(turns):
        if condition():  # type: ignore[operator]  # any callable
            return
        loop.turn(0.02)
    raise AssertionError("the condition never held")


@pytest.fixture
def loop() -> object:
    loop = Loop()
    yield loop
    loop.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def test_a_call_gets_its_streams_and_tells_its_outcome(loop: Loop) -> None:
    launcher = Launcher(loop, Reaper(loop))
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    extra = os.memfd_create("extra")
    os.write(extra, b"handed down")
    outcomes: list[Outcome] = []
    script = "cat /proc/self/fd/4; echo bad >&2; test -e /proc/self/fd/5 || exit 3"
    launcher.call(
        ["/bin/sh", "-c", script],
        outcomes.append,
        timeout=10,
        streams=Streams(stdout=write_fd, extra=(extra,)),
    )
    os.close(write_fd)
    turn_until(loop, lambda: outcomes)
    assert outcomes == [Outcome(3, "bad")]
    assert os.read(read_fd, 100) == b"handed down"
    os.close(read_fd)
    os.close(extra)


def test_a_call_over_its_time_is_killed_with_its_children(loop: Loop) -> None:
    launcher = Launcher(loop, Reaper(loop))
    outcomes: list[Outcome] = []
    launcher.call(["/bin/sh", "-c", "sleep 50 & wait"], outcomes.append, timeout=0.1)
    turn_until(loop, lambda: outcomes)
    assert outcomes[0].timed_out


def test_a_runtime_that_is_not_there_is_told_at_once(loop: Loop) -> None:
    before = len(os.listdir("/proc/self/fd"))
    launcher = Launcher(loop, Reaper(loop))
    with pytest.raises(RemoteError, match="/no/such"):
        launcher.call(["/no/such"], lambda _: None, timeout=1)
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # the loop's wake-up, /dev/null, the score


def test_a_child_that_ended_before_it_was_claimed_is_still_told(loop: Loop) -> None:
    reaper = Reaper(loop)
    codes: list[int] = []
    reaper.expect()
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 9"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    reaper.reap()
    reaper.claim(pid, codes.append)
    reaper.expected()
    loop.turn(0)
    assert codes == [9]


def test_a_child_nobody_knows_is_reaped(loop: Loop) -> None:
    reaper = Reaper(loop)
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    reaper.reap()
    assert procfs.stat(pid) is None


def test_codes_of_signals_are_128_and_the_number() -> None:
    assert [exit_code(code) for code in (0, 3, -9)] == [0, 3, 137]


# -- processes and signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("SIGTERM", 15),
        ("term", 15),
        (" 9 ", 9),
        ("SIGRTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-1", 63),
        ("64", 64),
        ("SIGCLD", 17),
    ],
)
def test_signals_are_known_by_name_and_number(name: str, number: int) -> None:
    assert procfs.signal_number(name) == number


@pytest.mark.parametrize(
    "name", ["", "SIGNOT", "0", "65", "SIGTERM+1", "SIGRTMIN+x", "SIGRTMAX+1", "_DFL", "-9"]
)
def test_what_is_no_signal_is_refused(name: str) -> None:
    with pytest.raises(RemoteError):
        procfs.signal_number(name)


STATUS = b"Name:\tx\nNSpid:\t77\t1\nSigBlk:\t0000000000000200\nSigIgn:\t0\nSigCgt:\t0000000000004000\n"


def test_an_init_drops_what_it_neither_handles_nor_blocks() -> None:
    found = procfs.parse_disposition(STATUS)
    assert [found.drops(number) for number in (15, 10, 1, 9)] == [False, False, True, False]
    assert not procfs.parse_disposition(STATUS.replace(b"\t1\n", b"\n")).drops(1)
    assert not procfs.parse_disposition(STATUS.replace(b"\t1\n", b"\t5\n")).drops(1)


def test_a_process_is_described_whatever_its_name() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "open('/proc/self/comm','w').write(') x (');input()"], stdin=-1
    )
    try:
        fact = procfs.stat(child.pid)
        assert fact is not None
        assert fact.parent == os.getpid()
        assert procfs.stat(2**22 + 1) is None
        assert procfs.disposition(2**22 + 1) is None
    finally:
        child.kill()
        child.communicate()


class Stopped:
    """A target whose dispositions are given one by one."""

    def __init__(self, *dispositions: Disposition | None) -> None:
        self.dispositions = list(dispositions)
        self.sent: list[int] = []
        self.kills = 0

    def send(self, number: int) -> None:
        self.sent.append(number)

    def kill(self) -> None:
        self.kills += 1

    def disposition(self) -> Disposition | None:
        return self.dispositions.pop(0) if len(self.dispositions) > 1 else self.dispositions[0]


BARE = Disposition(0, 0, True)
READY = Disposition(0, 1 << 14, True)
#: With handlers of the OCI runtime's own, which do nothing.
EARLY = READY._replace(early=True)


@pytest.mark.parametrize("lost", [BARE, EARLY])
def test_a_dropped_signal_is_sent_again_once_it_would_be_taken(loop: Loop, lost: Disposition) -> None:
    target = Stopped(lost, lost, READY)
    stopper = Stopper(loop, target)
    stopper.request(15, 10)
    turn_until(loop, lambda: len(target.sent) == 2)
    for _ in range(5):
        loop.turn(0.02)
    assert target.sent == [15, 15]
    stopper.ended()


def test_a_taken_signal_is_sent_once_however_often_it_is_asked_for(loop: Loop) -> None:
    target = Stopped(READY)
    stopper = Stopper(loop, target)
    stopper.request(15, 10)
    stopper.request(15, 10)
    loop.turn(0.05)
    assert target.sent == [15]
    stopper.request(2, 10)
    assert target.sent == [15, 2]
    stopper.ended()


def test_killing_goes_on_until_the_end(loop: Loop) -> None:
    target = Stopped(READY)
    stopper = Stopper(loop, target)
    stopper.request(15, 0)
    turn_until(loop, lambda: target.kills >= 1)
    turn_until(loop, lambda: target.kills >= 3)
    stopper.ended()
    kills = target.kills
    loop.turn(0.5)
    assert target.kills == kills
    assert target.sent == []


def test_nothing_is_signalled_once_the_init_is_gone(loop: Loop) -> None:
    target = Stopped(READY)
    stopper = Stopper(loop, target)
    stopper.ended()
    stopper.request(15, 10)
    stopper.request(15, 0)
    stopper.kill()
    loop.turn(0.05)
    assert (target.sent, target.kills) == ([], 0)


# -- groups and the OOM killer -----------------------------------------------------------------------------


def test_groups_are_read_as_the_kernel_writes_them() -> None:
    assert parse("4:memory:/a:b\n1:name=systemd:/x\n0::/y\n") == {
        "memory": "/a:b",
        "name=systemd": "/x",
        "": "/y",
    }


@pytest.mark.parametrize(
    ("actual", "given", "own"),
    [
        ("/pods/c1", "/pods/c1", "/pods/c1"),
        ("/pods/c1/container", "pods/c1", "/pods/c1"),
        ("/pods/d10", "/pods/d1", ""),
        ("/", "/", ""),
        ("/", "", ""),
        ("/pods/crun-c1.scope", "", "/pods/crun-c1.scope"),
        ("/pods/other", "", ""),
    ],
)
def test_only_the_containers_own_group_is_touched(actual: str, given: str, own: str) -> None:
    assert own_path(actual, given, "c1") == own


def test_hierarchies_are_found_in_their_places(tmp_path: Path) -> None:
    mount = str(tmp_path)
    assert directory("cpu,cpuacct", "/a", mount) == f"{mount}/cpu,cpuacct/a"
    assert directory("name=systemd", "/a", mount) == f"{mount}/systemd/a"
    assert directory("", "/a", mount) == f"{mount}/a"
    (tmp_path / "unified").mkdir()
    assert directory("", "/a", mount) == f"{mount}/a"
    (tmp_path / "unified/cgroup.controllers").touch()
    assert directory("", "/a", mount) == f"{mount}/unified/a"


def test_a_v2_group_is_killed_with_one_word(tmp_path: Path) -> None:
    victim = subprocess.Popen(["sleep", "100"])
    (tmp_path / "cgroup.kill").touch()
    (tmp_path / "cgroup.freeze").touch()
    (tmp_path / "cgroup.procs").write_text(f"{victim.pid}\n")
    groups = Cgroups({"": str(tmp_path)})
    assert groups.pids() == [victim.pid]
    assert groups.memory == str(tmp_path)
    assert groups.kill() == 1
    assert (tmp_path / "cgroup.kill").read_text() == "1"
    assert victim.wait(5) == -signal.SIGKILL


def test_a_v1_group_is_frozen_killed_and_thawed(tmp_path: Path) -> None:
    victim = subprocess.Popen(["sleep", "100"])
    for name in ("freezer", "memory"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text(f"{victim.pid}\n")
    (tmp_path / "freezer/freezer.state").touch()
    groups = Cgroups({"freezer": str(tmp_path / "freezer"), "memory": str(tmp_path / "memory")})
    assert groups.memory == str(tmp_path / "memory")
    assert groups.kill() == 1
    assert victim.wait(5) == -signal.SIGKILL
    assert (tmp_path / "freezer/freezer.state").read_text() == "THAWED"


def test_groups_that_are_gone_are_empty(tmp_path: Path) -> None:
    for groups in (Cgroups({}), Cgroups({"": str(tmp_path / "gone")})):
        assert groups.kill() == 0
        groups.freeze(False)
        groups.remove()


V2 = b"low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"
V1 = b"oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"


def test_kills_are_read_from_either_version() -> None:
    assert oom.parse_kills(V2) == 2
    assert oom.parse_kills(V1) == 4
    assert oom.parse_kills(b"oom_kill_disable 0\nunder_oom 1\n") is None


def test_v1_adds_the_groups_below(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for path in (tmp_path, tmp_path / "inner"):
        (path / oom.V1_FILE).write_bytes(V1)
    assert oom.count_kills(str(tmp_path), 1) == 8
    assert oom.count_kills(str(tmp_path / "gone"), 1) is None


def test_the_last_count_serves_when_the_group_is_gone(tmp_path: Path) -> None:
    (tmp_path / oom.V2_FILE).write_bytes(V2)
    watch = oom.OomWatch(str(tmp_path), 2)
    assert watch.kills() == 2
    (tmp_path / oom.V2_FILE).unlink()
    assert watch.kills() == 2
    watch.close()


@pytest.mark.parametrize(("total", "kills"), [(7, 0), (8, 1), (5, 0)])
def test_a_group_that_vanished_unread_is_told_by_its_parents_counter(
    tmp_path: Path, total: int, kills: int
) -> None:
    group = tmp_path / "container.scope"
    group.mkdir()
    (group / oom.V2_FILE).write_bytes(b"oom_kill 0\n")
    (tmp_path / oom.V2_FILE).write_bytes(b"oom_kill 7\n")
    watch = oom.OomWatch(str(group), 2, oom.follow(str(group), 2))
    (tmp_path / oom.V2_FILE).write_bytes(f"oom_kill {total}\n".encode())
    (group / oom.V2_FILE).unlink()
    group.rmdir()
    assert watch.kills() == kills
    watch.close()


def test_without_a_memory_group_there_are_no_kills() -> None:
    watch = oom.OomWatch("", 2)
    assert watch.kills() == 0
    watch.close()


def test_systemd_is_told_of_changed_limits_in_its_own_words() -> None:
    argv = set_properties("bulkhead-c.scope", {"MemoryMax": 1 << 20, "TasksMax": 5})
    assert argv[argv.index("SetUnitProperties") :] == [
        *("SetUnitProperties", "sba(sv)", "bulkhead-c.scope", "true", "2"),
        *("MemoryMax", "t", "1048576", "TasksMax", "t", "5"),
    ]


# -- the rest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kills", "reason"),
    [(0, 0, "Completed"), (1, 0, "Error"), (137, 1, "OOMKilled"), (0, 1, "Completed")],
)
def test_reasons_are_the_cris_words(code: int, kills: int, reason: str) -> None:
    assert records.exit_reason(code, oom_kills=kills) == reason


def test_an_exit_record_comes_back(tmp_path: Path) -> None:
    record = ExitRecord(container_id="c", exit_code=137, signal=9, oom_killed=True, finished_at_ns=7)
    assert records.read_exit(str(tmp_path)) is None
    records.write_exit(str(tmp_path), record)
    assert records.read_exit(str(tmp_path)) == record
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_the_record_is_synced_before_it_is_renamed_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(fd: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def watched_rename(old: str, new: str) -> None:
        steps.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    records.write_exit(str(tmp_path), ExitRecord(container_id="c", exit_code=0))
    assert steps == [f"{tmp_path}/exit.json.new", "rename", str(tmp_path)]


def test_a_record_of_an_older_monitor_is_read() -> None:
    assert msgspec.json.decode(b'{"container_id":"c","exit_code":3}', type=ExitRecord).exit_code == 3


def test_a_collector_keeps_its_limit_and_counts_the_rest() -> None:
    collector = Collector(5)
    for chunk in (b"abc", b"def", b"ghi"):
        collector.take(chunk, False)
    assert (collector.bytes(), collector.dropped) == (b"abcde", 4)


def test_a_terminal_is_taken_once_and_the_socket_goes(tmp_path: Path, loop: Loop) -> None:
    path = str(tmp_path / "tty.sock")
    received: list[int] = []
    console = ConsoleSocket(loop, path, received.append)
    impostor = socket.socket(socket.AF_UNIX)
    impostor.connect(path)
    loop.turn(0.1)
    impostor.send(b"no descriptor")
    loop.turn(0.1)
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    master, slave = os.openpty()
    socket.send_fds(client, [b"/dev/ptmx"], [master])
    console.receive_now()
    assert len(received) == 1
    assert not os.get_inheritable(received[0])
    assert not os.path.exists(path)
    console.close()
    for fd in (received[0], master, slave):
        os.close(fd)
    client.close()
    impostor.close()


@pytest.mark.parametrize(
    ("files", "used"),
    [
        ({"memory.current": "1000", "memory.stat": "anon 3\ninactive_file 400\n"}, 600),
        ({"memory.usage_in_bytes": "1000", "memory.stat": "total_inactive_file 300\ninactive_file 1\n"}, 700),
        ({"memory.current": "10", "memory.stat": "inactive_file 400\n"}, 0),
        ({"memory.current": "10"}, 10),
        ({}, 0),
    ],
)
def test_memory_in_use_is_what_the_kernel_cannot_take_back(
    tmp_path: Path, files: dict[str, str], used: int
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert Cgroups({"memory": str(tmp_path)}).memory_in_use() == used


def test_groups_of_a_container_that_never_came_to_be_are_its_own_alone(tmp_path: Path) -> None:
    for group in ("cpu/pod/bulkhead-c1", "memory/pod/bulkhead-c1", "memory/pod/other"):
        (tmp_path / group).mkdir(parents=True)
    Cgroups.of_path("/pod/bulkhead-c1", "c1", str(tmp_path)).remove()
    Cgroups.of_path("/pod/other", "c1", str(tmp_path)).remove()
    Cgroups.of_path("", "c1", str(tmp_path)).remove()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*/*"))
    assert left == ["memory/pod/other"]


def test_huge_pages_are_limited_in_either_spelling(tmp_path: Path) -> None:
    groups = Cgroups({"hugetlb": str(tmp_path)})
    assert not groups.limit_hugepages("2MB", 5)
    (tmp_path / "hugetlb.2MB.limit_in_bytes").touch()
    assert groups.limit_hugepages("2MB", 5)
    assert (tmp_path / "hugetlb.2MB.limit_in_bytes").read_text() == "5"
