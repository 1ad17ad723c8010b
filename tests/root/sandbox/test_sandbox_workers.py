"""Runs in: the tests, as root. What each worker's sandbox refuses, tried inside the real table's entry."""

from __future__ import annotations

import mmap
import os
import platform
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from ipc import kernel, syscalls
from ipc.messages.supervisor import SandboxReport
from supervisor.sandbox import differences
from supervisor.sandbox.mountview import expand
from supervisor.sandbox.spec import Identity
from supervisor.table import TABLE
from tests.support import sandboxed
from tests.support.sandboxed import UIDS, Host, attempt, inside

UNPRIVILEGED = ("cri", "image", "stream", "ops", "nri")
KINDS = (*UNPRIVILEGED, "storage", "network")
NUMBERS = syscalls.numbers(platform.machine())


@pytest.fixture
def host() -> Iterator[Host]:
    with sandboxed.host() as here:
        yield here


def call(name: str, *arguments: int) -> str:
    return attempt(lambda: kernel.syscall(NUMBERS[name], *arguments))


def answers(kind: str, host: Host, *tries: Callable[[], str]) -> list[str]:
    """What each try said inside the sandbox; none succeeded."""
    said: list[str] = inside(kind, lambda: [one() for one in tries], host).value
    assert "ok" not in said
    return said


def refused(kind: str, host: Host, *tries: Callable[[], str]) -> None:
    """Each try ended with EPERM: not absent, not misused, but forbidden."""
    said = answers(kind, host, *tries)
    assert set(said) == {"EPERM"}, said


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_is_what_the_table_declares(kind: str, host: Host) -> None:
    entry = TABLE[kind].sandbox
    assert entry is not None
    report = inside(kind, lambda: None, host).report
    assert differences(entry, Identity(UIDS[kind], UIDS[kind]), report) == []
    assert set(report.capabilities) == set(report.bounding) == set(entry.capabilities)
    assert set(report.namespaces) == set(entry.namespaces)
    assert report.seccomp == kind
    assert (report.landlock > 0) == entry.landlock
    assert report.no_new_privs
    lower = {name for name, value in entry.rlimits.items() if report.rlimits[name] < value}
    told = {sentence.split(":")[0].removeprefix("rlimit ") for sentence in report.degraded}
    assert lower <= told, "a limit that this host cannot meet is reported"
    assert report.groups == []


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_cannot_open_etc_shadow(kind: str, host: Host) -> None:
    said = answers(
        kind,
        host,
        lambda: attempt(os.open, "/etc/shadow", os.O_RDONLY),
        lambda: attempt(os.open, "/proc/1/root/etc/shadow", os.O_RDONLY),
        lambda: attempt(os.open, "/etc", os.O_RDONLY),
    )
    assert set(said) <= {"ENOENT", "EACCES"}


@pytest.mark.parametrize("kind", ["cri", "ops", "nri", "storage"])
def test_cannot_make_an_inet_socket(kind: str, host: Host) -> None:
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, 40)  # 40: AF_VSOCK
    tries = [lambda f=family: attempt(socket.socket, f, socket.SOCK_STREAM) for family in families]
    refused(kind, host, *tries)


@pytest.mark.parametrize("kind", ["image", "stream"])
def test_cannot_make_raw_or_foreign_sockets(kind: str, host: Host) -> None:
    refused(
        kind,
        host,
        lambda: attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        lambda: attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
        lambda: attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_CRYPTO),
        lambda: attempt(socket.socket, 40, socket.SOCK_STREAM),
    )


def test_image_cannot_listen_on_tcp(host: Host) -> None:
    assert answers("image", host, lambda: attempt(socket.socket().bind, ("127.0.0.1", 0))) == ["EACCES"]


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_cannot_mount_or_change_root(kind: str, host: Host) -> None:
    refused(
        kind,
        host,
        lambda: attempt(kernel.mount, "none", "/", "tmpfs"),
        lambda: attempt(kernel.umount, "/"),
        lambda: attempt(kernel.pivot_root, "/", "/"),
        lambda: attempt(os.chroot, "/"),
        lambda: call("fsopen", 0, 0),
        lambda: call("open_tree", -100, 0, 0),
        lambda: call("move_mount", -1, 0, -1, 0, 0),
        lambda: call("mount_setattr", -100, 0, 0, 0, 0),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_cannot_trace_or_read_another_process(kind: str, host: Host) -> None:
    parent = os.getpid()
    ptrace_attach = 16
    refused(
        kind,
        host,
        lambda: call("ptrace", ptrace_attach, parent, 0, 0),
        lambda: call("ptrace", 0, 0, 0, 0),  # PTRACE_TRACEME
        lambda: call("process_vm_readv", parent, 0, 0, 0, 0, 0),
        lambda: call("pidfd_getfd", 0, 0, 0),
        lambda: call("kcmp", parent, parent, 0, 0, 0),
    )


@pytest.mark.parametrize("kind", [*UNPRIVILEGED, "storage"])
def test_cannot_execute_anything(kind: str, host: Host) -> None:
    memory = os.memfd_create("program")
    os.write(memory, b"#!/bin/sh\n")
    refused(
        kind,
        host,
        lambda: attempt(os.execv, "/bin/true", ["true"]),
        lambda: attempt(os.execv, f"/proc/self/fd/{memory}", ["true"]),
        lambda: call("execveat", memory, 0, 0, 0, 0x1000),
    )
    os.close(memory)


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_cannot_fork(kind: str, host: Host) -> None:
    refused(kind, host, lambda: attempt(os.fork), lambda: call("vfork"))


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_cannot_load_new_code(kind: str, host: Host) -> None:
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

    def writable_and_executable() -> None:
        mmap.mmap(-1, 4096, private, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)

    refused(
        kind,
        host,
        lambda: attempt(writable_and_executable),
        lambda: attempt(lambda: mmap.mmap(-1, 4096, private, mmap.PROT_READ | mmap.PROT_EXEC)),
        lambda: call("mprotect", 0, 4096, 0x4),
        lambda: call("pkey_mprotect", 0, 4096, 0x4, 0),
    )


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_cannot_become_another_user(kind: str, host: Host) -> None:
    refused(
        kind,
        host,
        lambda: attempt(os.setuid, 0),
        lambda: attempt(os.setresuid, 0, 0, 0),
        lambda: attempt(os.setgid, 0),
        lambda: attempt(os.setgroups, [0]),
        lambda: call("setfsuid", 0),
        lambda: call("capset", 0, 0),
    )


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_cannot_make_or_join_a_namespace(kind: str, host: Host) -> None:
    user = kernel.CLONE_NEWUSER
    refused(
        kind,
        host,
        lambda: attempt(kernel.unshare, user),
        lambda: attempt(kernel.unshare, kernel.CLONE_NEWNS),
        lambda: attempt(kernel.setns, 0, 0),
        lambda: call("clone", user | signal.SIGCHLD, 0, 0, 0, 0),
    )
    assert answers(kind, host, lambda: call("clone3", 0, 0)) == ["ENOSYS"]


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_cannot_signal_another_users_process(kind: str, host: Host) -> None:
    parent = os.getpid()
    refused(
        kind,
        host,
        lambda: attempt(os.kill, parent, 0),
        lambda: attempt(os.kill, 1, 0),
        lambda: attempt(os.kill, -1, 0),
        lambda: attempt(os.kill, 0, 0),
        lambda: call("tgkill", parent, parent, 0),
        lambda: call("tkill", parent, 0),
        lambda: call("rt_sigqueueinfo", parent, 0, 0),
        lambda: call("pidfd_send_signal", 0, 0, 0, 0),
        *([lambda: call("pidfd_open", parent, 0)] if kind != "cri" else []),  # it watches monitors by them
    )
    assert inside(kind, lambda: attempt(os.kill, os.getpid(), 0), host).value == "ok"


@pytest.mark.parametrize("kind", KINDS)
def test_cannot_change_the_kernel(kind: str, host: Host) -> None:
    refused(
        kind,
        host,
        lambda: call("init_module", 0, 0, 0),
        lambda: call("finit_module", -1, 0, 0),
        lambda: call("kexec_load", 0, 0, 0, 0),
        lambda: call("reboot", 0, 0, 0, 0),
        lambda: call("swapon", 0, 0),
        lambda: call("perf_event_open", 0, 0, 0, 0, 0),
        lambda: call("io_uring_setup", 1, 0),
        lambda: call("userfaultfd", 0),
        lambda: call("keyctl", 0, 0, 0, 0, 0),
        lambda: call("settimeofday", 0, 0),
    )


@pytest.mark.parametrize("kind", [*UNPRIVILEGED, "storage"])
def test_cannot_load_bpf(kind: str, host: Host) -> None:
    refused(kind, host, lambda: call("bpf", 0, 0, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_newer_than_the_table_is_missing_and_not_forbidden(kind: str, host: Host) -> None:
    newer = max(NUMBERS.values()) + 1
    assert answers(kind, host, lambda: attempt(lambda: kernel.syscall(newer))) == ["ENOSYS"]


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_sees_no_path_but_those_declared(kind: str, host: Host) -> None:
    def visible() -> list[str]:
        there = (
            "/home",
            "/root",
            "/usr/bin",
            "/var",
            "/boot",
            "/tmp/bh-other",
            "/bin",
            "/lib",
            "/sys/kernel",
        )
        return [path for path in there if os.path.exists(path)]

    assert inside(kind, visible, host).value == []
    assert inside(kind, lambda: attempt(os.listdir, "/"), host).value == "EACCES"


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_keeps_no_mount_of_the_host(kind: str, host: Host) -> None:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        sandboxed.enter(kind, host)
        os.write(write_fd, b"x")
        time.sleep(30)
        os._exit(0)
    os.close(write_fd)
    try:
        assert os.read(read_fd, 1) == b"x"
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8") as file:
            points = [line.split()[4] for line in file]
    finally:
        os.close(read_fd)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert points[0] == "/"
    assert all(under_a_declared_path(kind, host, point) for point in points[1:]), points


def under_a_declared_path(kind: str, host: Host, point: str) -> bool:
    entry = TABLE[kind].sandbox
    assert entry is not None
    binds = expand(entry.view, host.paths)
    return any(point == bind.path or (bind.tree and point.startswith(f"{bind.path}/")) for bind in binds)


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_cannot_write_outside(kind: str, host: Host) -> None:
    flags = os.O_WRONLY | os.O_CREAT
    files = ("/new", "/etc/hosts", "/tmp/new", f"{host.run_root}/ipc/new", f"{host.run_root}/new", "/dev/new")
    said = answers(
        kind,
        host,
        *[lambda path=path: attempt(os.open, path, flags) for path in files],
        lambda: attempt(os.mkdir, "/new"),
        lambda: attempt(os.unlink, f"{host.run_root}/ipc/cri.sock"),
        lambda: attempt(os.open, "/proc/self/oom_score_adj", os.O_WRONLY),
        lambda: attempt(os.open, "/proc/sys/kernel/hostname", os.O_WRONLY),
    )
    assert set(said) <= {"EACCES", "EROFS", "ENOENT", "EPERM"}


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_cannot_widen_its_limits(kind: str, host: Host) -> None:
    def widen() -> str:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
        except ValueError:
            return "EPERM"
        return "ok"

    refused(kind, host, widen)


@pytest.mark.parametrize("kind", KINDS)
def test_dies_with_its_parent(kind: str, host: Host) -> None:
    read_fd, write_fd = os.pipe()
    middle = os.fork()
    if middle == 0:
        _parent_of_a_worker(kind, host, write_fd)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        assert pipe.read(5) == b"ready"
        os.kill(middle, signal.SIGKILL)
        os.waitpid(middle, 0)
        assert pipe.read() == b""  # the end of file: the worker, last holder of the pipe, is gone


def _parent_of_a_worker(kind: str, host: Host, write_fd: int) -> None:
    if os.fork() == 0:
        signal.alarm(30)
        sandboxed.enter(kind, host)
        os.write(write_fd, b"ready")
        time.sleep(60)
        os._exit(0)
    os.close(write_fd)
    time.sleep(60)
    os._exit(0)


@pytest.mark.parametrize("kind", KINDS)
def test_entering_takes_less_than_30_ms(kind: str, host: Host) -> None:
    """Of the processor, since the fork: whatever else the machine does."""
    assert min(inside(kind, time.process_time, host).value for _ in range(5)) < 0.030


def test_a_missing_bind_is_an_error_and_not_a_hole(host: Host) -> None:
    (host.run_root / "ipc" / "cri.sock").unlink()
    with pytest.raises(AssertionError, match="FileNotFoundError"):
        inside("ops", lambda: None, host)


def test_a_second_thread_is_refused(host: Host) -> None:
    def with_thread() -> str:
        import threading

        gate = threading.Event()
        thread = threading.Thread(target=gate.wait)
        thread.start()
        try:
            sandboxed.enter("ops", host)
        except Exception as error:  # noqa: BLE001 - its name is the result
            return type(error).__name__
        finally:
            gate.set()
            thread.join()
        return "ok"

    assert in_a_child(with_thread) == "SandboxError"


def in_a_child(function: Callable[[], str]) -> str:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write_fd, function().encode())
        os._exit(0)
    os.close(write_fd)
    os.waitpid(pid, 0)
    with os.fdopen(read_fd) as pipe:
        return pipe.read()


def test_a_freer_process_is_told_apart() -> None:
    entry = TABLE["ops"].sandbox
    assert entry is not None
    loose = SandboxReport(uid=0, gid=0, capabilities=["SYS_ADMIN"], degraded=["landlock: not in this kernel"])
    found = differences(entry, Identity(61004, 61004), loose)
    assert {sentence.split(":")[0] for sentence in found} >= {"uid", "gid", "capabilities", "seccomp"}
    assert not any(sentence.startswith("landlock") for sentence in found)
