"""Runs in: the tests, as root. What a confined child of a worker can do and what not."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ipc import capabilities, confine
from tests.support.sandboxed import attempt

UNPACK = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "MKNOD", "SETFCAP")


def confined(
    root: Path,
    function: Callable[[], Any],
    *,
    keep: Collection[str] = UNPACK,
    name: str = "unpack",
    uid: int = 0,
) -> Any:
    """The result of `function` in a child that was confined to `root`."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            write_fd = os.dup2(write_fd, 3)
            os.closerange(4, os.sysconf("SC_OPEN_MAX"))  # as a worker's child: what the test run holds counts
            confine.confine(str(root), keep, name, {"NOFILE": 64, "CORE": 0}, uid=uid, gid=uid)
            os.write(write_fd, json.dumps(function()).encode())
        finally:
            os._exit(1)
    os.close(write_fd)
    os.waitpid(pid, 0)
    with os.fdopen(read_fd) as pipe:
        return json.loads(pipe.read())


def test_an_unpack_child_makes_all_that_a_layer_may_contain(tmp_path: Path) -> None:
    def work() -> list[str]:
        os.mkdir("d", 0o555)
        os.close(os.open("d/file", os.O_CREAT | os.O_WRONLY, 0o600))
        os.chown("d/file", 1000, 1000)
        os.chmod("d/file", 0o4755)
        os.utime("d/file", ns=(1, 1))
        os.link("d/file", "d/hard")
        os.symlink("/etc/passwd", "d/soft")
        os.mknod("d/null", 0o020666, os.makedev(1, 3))
        os.mkfifo("d/fifo")
        os.setxattr("d/file", "security.capability", bytes.fromhex("0100000200040000") + bytes(12))
        os.setxattr("d/file", "user.x", b"1")
        return sorted(os.listdir("/d"))

    assert confined(tmp_path, work) == ["fifo", "file", "hard", "null", "soft"]
    assert (tmp_path / "d" / "file").stat().st_uid == 1000


def test_it_cannot_leave_its_root_or_do_anything_else(tmp_path: Path) -> None:
    def work() -> list[str]:
        return [
            attempt(os.chroot, "/"),
            attempt(socket.socket, socket.AF_UNIX),
            attempt(socket.socket, socket.AF_INET),
            attempt(os.execv, "/bin/true", ["true"]),
            attempt(os.fork),
            attempt(os.setuid, 1),
            attempt(os.kill, os.getppid(), 0),
            attempt(os.setgroups, [1]),
            attempt(os.nice, 1),
        ]

    assert set(confined(tmp_path, work)) == {"EPERM"}
    assert confined(tmp_path, lambda: os.listdir("/../..")) == []
    assert confined(tmp_path, lambda: attempt(os.open, "/etc/shadow", os.O_RDONLY)) == "ENOENT"


def test_it_keeps_exactly_its_capabilities(tmp_path: Path) -> None:
    assert set(confined(tmp_path, lambda: sorted(capabilities.effective()))) == set(UNPACK)
    assert set(confined(tmp_path, lambda: sorted(capabilities.effective()), uid=61009)) == set(UNPACK)
    assert confined(tmp_path, lambda: sorted(capabilities.effective()), keep=(), uid=61009) == []
    assert confined(tmp_path, os.getresuid, keep=(), uid=61009) == [61009] * 3


def test_it_has_threads_and_its_limits(tmp_path: Path) -> None:
    def work() -> list[int]:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(1))
        thread.start()
        thread.join()
        return [*seen, *resource.getrlimit(resource.RLIMIT_NOFILE)]

    assert confined(tmp_path, work) == [1, 64, 64]


def test_a_lookup_child_only_reads(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")

    def work() -> list[str]:
        with open("/passwd", encoding="utf-8") as file:
            text = file.read()
        return [
            text[:4],
            attempt(os.unlink, "/passwd"),
            attempt(os.mkdir, "/x"),
            attempt(os.chmod, "/passwd", 0),
        ]

    assert confined(tmp_path, work, keep=(), name="lookup") == ["root", "EPERM", "EPERM", "EPERM"]


def test_a_limit_above_the_hosts_is_told(tmp_path: Path) -> None:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        os.write(write_fd, json.dumps(confine.limit({"NOFILE": 200, "CORE": 0})).encode())
        os._exit(0)
    os.close(write_fd)
    os.waitpid(pid, 0)
    with os.fdopen(read_fd) as pipe:
        assert json.loads(pipe.read()) == ["rlimit NOFILE: 100 instead of 200, the hard limit of this host"]
