"""Small parts of the supervisor: notify, log sink, sockets, locks, host facts, tally, trees of files."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import pytest

from ipc.errors import RemoteError
from ipc.fds import close_all
from ipc.log import Log
from ipc.loop import Loop
from supervisor import directories, files, held, hostinfo, notify, nursery, sockets
from supervisor.config import Config, RuntimeConfig
from supervisor.logsink import BURST, STDERR_LINE, Lines, LogSink
from supervisor.logwriter import LogWriter
from supervisor.notify import Notifier
from supervisor.tally import KEPT, Tally, describe


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


# -- notify --------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    address = f"@bulkhead-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if abstract else address)
        Notifier({"NOTIFY_SOCKET": address}).send(READY="1", STATUS="all is well")
        assert sock.recv(200) == b"READY=1\nSTATUS=all is well"


def test_nobody_to_tell_is_no_error(tmp_path: Path) -> None:
    Notifier({}).send(READY="1")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).send(READY="1")


def test_the_watchdog_is_ours_or_nobodys() -> None:
    assert Notifier({"WATCHDOG_USEC": "2000000"}).watchdog == 2.0
    assert Notifier({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}).watchdog == 2.0
    assert Notifier({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}).watchdog == 0.0
    assert Notifier({"WATCHDOG_USEC": "soon"}).watchdog == 0.0


def test_the_environment_of_children_has_no_notify_socket() -> None:
    listen = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "vault.a"}  # of somebody else
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "PATH": "/bin", **listen}
    Notifier(environ)
    assert environ == {"PATH": "/bin"}


def test_the_service_manager_keeps_descriptors_until_it_is_told_otherwise(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    notifier = Notifier({"NOTIFY_SOCKET": address})
    assert not notifier.store("vault.a", 0)  # nobody hears it: it is to be tried again
    read_fd, write_fd = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        assert notifier.store("vault.a", read_fd)
        os.close(read_fd)
        data, fds, _, _ = socket.recv_fds(sock, 200, 4)
        assert data == b"FDSTORE=1\nFDNAME=vault.a\nFDPOLL=0"
        os.write(write_fd, b"x")
        assert os.read(fds[0], 1) == b"x"
        notifier.unstore("vault.a")
        assert sock.recv(200) == b"FDSTOREREMOVE=1\nFDNAME=vault.a"
    for fd in (*fds, write_fd):
        os.close(fd)
    assert Notifier({}).store("vault.a", 0)  # without a manager there is nothing to be done


def test_what_the_service_manager_has_kept_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fds = [os.dup2(0, at, inheritable=True) for at in (900, 901, 902)]
    monkeypatch.setattr(notify, "FIRST_STORED", fds[0])
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "one:two:one"}
    found = Notifier(environ).stored
    assert found == {"one": 902, "two": 901}
    assert not environ
    assert not any(os.get_inheritable(fd) for fd in found.values())
    for fd in found.values():
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[0])


# -- log sink --------------------------------------------------------------------------------


def sink_of(tmp_path: Path, clock: Clock) -> tuple[Loop, LogSink, Path]:
    loop, out = Loop(), tmp_path / "out"
    fd = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    return (
        loop,
        LogSink(loop, str(tmp_path / "log.sock"), {os.getuid()}, writer=LogWriter(fd), clock=clock),
        out,
    )


def test_a_line_bears_the_pid_that_the_kernel_vouches_for(tmp_path: Path) -> None:
    loop, sink, out = sink_of(tmp_path, Clock())
    Log("cri", sink=str(tmp_path / "log.sock")).info("hello", key="a b")
    loop.turn(1)
    line = out.read_text()
    assert 'level=info worker=cri msg=hello key="a b" pid=' in line
    assert line.endswith(f" pid={os.getpid()}\n")
    sink.close()


def test_one_packet_is_one_line_whatever_is_in_it(tmp_path: Path) -> None:
    _, sink, out = sink_of(tmp_path, Clock())
    sink.line(7, b"a\nforged=1\r\x1b[2J\x00")
    assert out.read_bytes() == b"a?forged=1??[2J? pid=7\n"
    sink.close()


def test_a_flood_is_cut_and_counted_and_others_are_not_hit(tmp_path: Path) -> None:
    clock = Clock()
    _, sink, out = sink_of(tmp_path, clock)
    for _ in range(int(BURST) + 50):
        sink.line(7, b"x")
    sink.line(8, b"y")
    assert out.read_text().count("x pid=7") == int(BURST)
    assert out.read_text().count("y pid=8") == 1
    clock.now += 1.0
    sink.line(7, b"z")
    assert out.read_text().endswith("z pid=7 lines_suppressed=50\n")
    sink.close()


def test_a_full_pipe_costs_lines_and_no_time(tmp_path: Path) -> None:
    loop = Loop()
    read_fd, write_fd = os.pipe()
    sink = LogSink(loop, str(tmp_path / "log.sock"), set(), writer=LogWriter(write_fd), clock=Clock())
    for _ in range(200):
        sink.line(7, b"x" * 1000)
    assert sink.dropped > 0
    os.close(read_fd)
    sink.line(7, b"nobody reads")
    sink.close()


def test_pieces_of_a_pipe_become_whole_lines() -> None:
    lines = Lines()
    assert lines.take(b"Fatal error: ") == []
    assert lines.take(b"Aborted\n\nCurr") == [b"Fatal error: Aborted"]
    assert lines.take(b"ent\nthread") == [b"Current"]
    assert (lines.rest(), lines.rest()) == ([b"thread"], [])
    for _ in range(3):
        assert lines.take(b"x" * STDERR_LINE) == []
    assert lines.take(b"\n") == [b"x" * STDERR_LINE]


# -- sockets --------------------------------------------------------------------------------


def test_an_access_list_names_its_users_and_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o600)
    sockets.allow(str(path), [64101, 64104])
    assert os.getxattr(path, "system.posix_acl_access") == sockets.access_list([64104, 64101])
    assert path.stat().st_mode & 0o007 == 0


def bound(directory: Path, name: str = "s") -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(directory / name))
    return str(directory / name)


def test_a_bound_socket_is_published_over_the_old_one(tmp_path: Path) -> None:
    private = tmp_path / "bind"
    private.mkdir()
    public = tmp_path / "public.sock"
    public.write_text("old")
    sockets.publish(bound(private), str(private), str(public))
    assert public.is_socket()
    assert public.stat().st_mode & 0o777 == 0o660
    assert list(private.iterdir()) == []


def test_only_a_socket_in_the_private_directory_is_published(tmp_path: Path) -> None:
    private = tmp_path / "bind"
    private.mkdir()
    public = tmp_path / "public.sock"
    (private / "file").write_text("x")
    (private / "dir").mkdir()
    (private / "link").symlink_to("/etc/passwd")
    for path in (
        bound(tmp_path),
        f"{private}/file",
        f"{private}/dir",
        f"{private}/link",
        f"{private}/none",
        f"{private}/..",
    ):
        with pytest.raises(RemoteError):
            sockets.publish(path, str(private), str(public))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bind", "s"]
    assert os.path.exists("/etc/passwd")


# -- locks and directories -------------------------------------------------------------------------


def test_a_second_lock_on_a_directory_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    first, second = directories.Locks(), directories.Locks()
    first.take(str(tmp_path))
    with pytest.raises(directories.InstanceRunning, match=rf"pid {os.getpid()}"):
        second.take(str(tmp_path))
    first.release()
    second.take(str(tmp_path))
    second.release()


def test_held_means_alive_and_the_holder_is_who_it_says(tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert not held.is_held(directory)
    fd = held.acquire(directory)
    assert fd is not None
    assert held.acquire(directory) is None
    assert held.holder(directory) == 0
    held.write_holder(fd, os.getpid())
    assert held.holder(directory) == os.getpid()
    os.pwrite(fd, f"{os.getpid()} 1\n".encode().ljust(40), 0)
    assert held.holder(directory) == 0
    os.close(fd)
    assert not held.is_held(directory)


def test_a_tree_is_removed_without_following_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "kept").mkdir(parents=True)
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/file").write_text("x")
    (tree / "a/link").symlink_to(outside)
    files.remove_tree(str(tree))
    files.remove_tree(str(tree))
    assert not tree.exists()
    assert (outside / "kept").is_dir()
    link = tmp_path / "link"
    link.symlink_to(outside)
    files.remove_tree(str(link))
    assert (outside / "kept").is_dir()


def test_a_program_is_found_like_a_shell_finds_it(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("")
    assert files.find_program("tool", f"/none:{tmp_path}") == ""
    (tmp_path / "tool").chmod(0o755)
    assert files.find_program("tool", f"/none:{tmp_path}") == f"{tmp_path}/tool"


# -- host facts and tally --------------------------------------------------------------------------

RUNC = {
    "ociVersionMax": "1.1.0",
    "mountOptions": ["ro", "rro"],
    "linux": {"namespaces": ["mount", "user"], "mountExtensions": {"idmap": {"enabled": True}}},
}


def test_a_runtimes_features_are_read_as_the_specification_writes_them() -> None:
    config = Config(runtimes={"runc": RuntimeConfig(path="/r")}, default_runtime="runc")
    info = hostinfo.runtime_info(config, "runc", "1.2", RUNC)
    assert (info.known, info.recursive_read_only, info.idmap) == (True, True, True)
    assert (info.oci_version_max, info.default, info.user_namespaces) == ("1.1.0", True, True)


@pytest.mark.parametrize("features", [None, {}, {"mountOptions": 3, "linux": []}])
def test_a_runtime_that_says_little_or_nonsense_is_taken_as_old(features: dict[str, object] | None) -> None:
    config = Config(runtimes={"crun": RuntimeConfig(path="/c")})
    info = hostinfo.runtime_info(config, "crun", "", features)
    assert (info.recursive_read_only, info.idmap, info.oci_version_max) == (False, False, "1.0.2")
    assert not info.user_namespaces


@pytest.mark.parametrize(
    ("output", "kernel", "honours"),
    [
        ("crun version 1.4\n", "5.12.0-amd64", True),
        ("crun version 1.10.1\n", "6.1.0", True),
        ("crun version 1.3\n", "6.1.0", False),
        ("crun version 1.8.1\n", "5.10.0", False),
        ("runc version 1.1.5+ds1\n", "6.1.0", False),
        ("", "nonsense", False),
    ],
)
def test_old_runtimes_that_honour_rro_are_known_by_their_version(
    output: str, kernel: str, honours: bool
) -> None:
    assert hostinfo.makes_read_only_recursively(output, kernel) is honours


@pytest.mark.parametrize(
    ("output", "joins"),
    [
        ("crun version 1.8.1\n", True),
        ("runc version 1.1.5+ds1\n", True),
        ("crun version 0.21\n", False),
        ("runsc version release-20230904.0\n", False),
        ("", False),
    ],
)
def test_the_runtimes_that_join_a_user_namespace_are_known_by_their_version(output: str, joins: bool) -> None:
    assert (hostinfo.JOINS_USER_NAMESPACES.match(output) is not None) == joins


@pytest.mark.parametrize(
    ("output", "version"),
    [("crun version 1.8.1\ncommit: x\n", "1.8.1"), ("runc version 1.1.5+ds1\n", "1.1.5+ds1"), ("?", "")],
)
def test_a_version_is_found_in_the_first_line(output: str, version: str) -> None:
    assert hostinfo.version_of(output) == version


def test_the_tally_keeps_the_last_deaths_in_order(tmp_path: Path) -> None:
    tally = Tally(str(tmp_path))
    for number in range(KEPT + 5):
        tally.add("cri", number, describe(-9, 1.2), "why\nnot")
    lines = tally.read("cri")
    assert len(lines) == KEPT
    assert lines[-1].startswith(f"pid {KEPT + 4}: signal 9 (SIGKILL) at ")
    assert lines[-1].endswith("after 1 s: why not")


def test_deaths_are_described_for_people() -> None:
    assert describe(3, 0).startswith("status 3 at ")
    assert describe(-64, 0).startswith("signal 64")


def test_the_nurserys_answers_are_heard_where_select_knows_no_descriptor() -> None:
    """With a thousand monitors every new descriptor is one."""
    read_fd, write_fd = os.pipe()
    high_fd = fcntl.fcntl(read_fd, fcntl.F_DUPFD_CLOEXEC, 1100)
    try:
        assert not nursery.readable(high_fd, 0.0)
        os.write(write_fd, b"1")
        assert nursery.readable(high_fd, 1.0)
    finally:
        close_all([read_fd, write_fd, high_fd])
