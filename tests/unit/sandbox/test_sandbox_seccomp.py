"""Runs in: the tests. The assembler of seccomp programs, judged by a small interpreter of classic BPF."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import confine, seccomp, syscall_groups, syscalls
from ipc.seccomp import ALLOW, KILL_PROCESS, SELF, Check, Policy, assemble, one_of, refuse
from supervisor.sandbox.seccomp import LISTS

PID = 4711
EPERM, ENOSYS = refuse(errno.EPERM), refuse(errno.ENOSYS)
ALL = [*LISTS.values(), *confine.LISTS.values()]
CLOSED = [policy for policy in ALL if not policy.open_list]
MACHINES = sorted(syscalls.MACHINES)


def judge(program: bytes, number: int, arguments: Sequence[int] = (), arch: int | None = None) -> int:
    """What the kernel would answer (only the instructions that the assembler uses)."""
    machine_arch = struct.unpack_from("=HBBI", program, 8)[3] if arch is None else arch
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=iIQ6Q", number, machine_arch, 0, *(a & 0xFFFFFFFFFFFFFFFF for a in padded))
    code = list(struct.iter_unpack("=HBBI", program))
    counter, accumulator = 0, 0
    while True:
        op, jt, jf, k = code[counter]
        counter += 1
        if op == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif op == 0x54:
            accumulator &= k
        elif op == 0x15:
            counter += jt if accumulator == k else jf
        elif op == 0x35:
            counter += jt if accumulator >= k else jf
        else:
            assert op == 0x06
            return int(k)


def answer(policy: Policy, name: str, *arguments: int, machine: str = "x86_64") -> int:
    return judge(assemble(policy, machine, PID), syscalls.numbers(machine)[name], arguments)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_every_call_of_the_table_is_answered_as_the_list_says(policy: Policy, machine: str) -> None:
    program = assemble(policy, machine, PID)
    for name, number in syscalls.numbers(machine).items():
        if name in policy.conditional:
            continue
        expected = ALLOW if policy.open_list or name in policy.allowed else EPERM
        if name in policy.denied:
            expected = EPERM
        if name in policy.missing:
            expected = ENOSYS
        assert judge(program, number) == expected, name


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_a_program_is_short_enough_and_its_jumps_stay_inside(policy: Policy, machine: str) -> None:
    code = list(struct.iter_unpack("=HBBI", assemble(policy, machine, PID)))
    assert len(code) <= 4096
    for place, (_, jt, jf, _) in enumerate(code):
        assert place + 1 + max(jt, jf) < len(code) or (jt, jf) == (0, 0)
    assert code[-1][0] == 0x06


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_another_machines_calls_kill(policy: Policy) -> None:
    i386 = 0x40000003
    assert judge(assemble(policy, "x86_64", PID), 1, arch=i386) == KILL_PROCESS


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_x32_and_newer_calls_are_missing(policy: Policy) -> None:
    program = assemble(policy, "x86_64", PID)
    newest = max(syscalls.numbers("x86_64").values())
    for number in (newest + 1, 1000, 0x40000000, 0x40000000 + 59, -1):
        assert judge(program, number) == ENOSYS


@pytest.mark.parametrize("policy", CLOSED, ids=lambda policy: policy.name)
def test_no_closed_list_lets_anything_dangerous_pass(policy: Policy) -> None:
    forbidden = syscall_groups.DANGEROUS | {
        *("execve", "execveat", "fork", "vfork", "mount", "umount2", "pivot_root", "setns", "unshare", "bpf"),
        *("setuid", "setresuid", "setgroups", "capset", "chroot", "seccomp", "open_tree", "move_mount"),
        *("fsopen", "fsmount", "mount_setattr", "pidfd_open", "pidfd_send_signal", "tkill", "setrlimit"),
    }
    if policy.name == "cri":  # it waits for the ends of monitors; it may not signal through one
        forbidden -= {"pidfd_open"}
    assert not forbidden & (policy.allowed | set(policy.conditional))


@pytest.mark.parametrize("policy", CLOSED, ids=lambda policy: policy.name)
def test_signals_and_limits_are_for_oneself_only(policy: Policy) -> None:
    for name in ("kill", "tgkill", "prlimit64"):
        assert answer(policy, name, PID) == ALLOW
        assert answer(policy, name, PID + 1) == EPERM
    assert answer(policy, "kill", -1) == EPERM
    assert answer(policy, "kill", 0) == EPERM


@pytest.mark.parametrize("policy", CLOSED, ids=lambda policy: policy.name)
def test_no_memory_becomes_executable(policy: Policy) -> None:
    for name in ("mmap", "mprotect"):
        assert answer(policy, name, 0, 4096, 0x3) == ALLOW
        assert answer(policy, name, 0, 4096, 0x4) == EPERM
        assert answer(policy, name, 0, 4096, 0x7) == EPERM


def test_threads_pass_and_processes_and_namespaces_do_not() -> None:
    thread = 0x3D0F00  # what pthread_create asks for
    assert answer(LISTS["cri"], "clone", thread) == ALLOW
    assert answer(LISTS["cri"], "clone", 0x01200011) == EPERM  # what fork asks for
    for bit in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert answer(LISTS["cri"], "clone", thread | bit) == EPERM
    assert answer(LISTS["cri"], "clone3", 0, 0) == ENOSYS


@pytest.mark.parametrize(
    ("kind", "passing"),
    [
        ("cri", {1}),
        ("ops", {1}),
        ("nri", {1}),
        ("storage", {1}),
        ("image", {1, 2, 10, 16}),
        ("stream", {1, 2, 10, 16}),
    ],
)
def test_families_of_sockets(kind: str, passing: set[int]) -> None:
    allowed = {family for family in range(64) if answer(LISTS[kind], "socket", family, 1, 0) == ALLOW}
    assert allowed == passing


def test_of_netlink_only_routes_can_be_asked() -> None:
    assert answer(LISTS["image"], "socket", 16, 3, 12) == EPERM  # NETLINK_NETFILTER


def test_the_unpack_list_makes_no_socket() -> None:
    assert answer(confine.LISTS["unpack"], "socket", 1) == EPERM
    assert answer(confine.LISTS["unpack"], "mknodat") == ALLOW
    assert answer(confine.LISTS["lookup"], "unlinkat") == EPERM


@given(
    st.integers(0, 5), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8), st.integers(0, 2**64 - 1)
)
def test_one_of_looks_at_the_low_word_of_its_argument(place: int, values: list[int], argument: int) -> None:
    policy = Policy("t", conditional={"ioctl": one_of(place, values)})
    arguments = [0] * 6
    arguments[place] = argument
    expected = ALLOW if argument & 0xFFFFFFFF in values else EPERM
    assert answer(policy, "ioctl", *arguments) == expected
    arguments[place] = values[0]
    assert answer(policy, "ioctl", *arguments) == ALLOW


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_all_tests_of_an_alternative_must_hold(mask: int, first: int, second: int) -> None:
    value = first & mask
    policy = Policy("t", conditional={"prctl": ((Check(0, value, mask), Check(1, SELF)),)})
    assert answer(policy, "prctl", first, PID) == ALLOW
    assert answer(policy, "prctl", first, PID + 1) == EPERM
    assert answer(policy, "prctl", second, PID) == (ALLOW if second & mask == value else EPERM)


def test_a_list_with_a_name_that_is_no_call_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_call"):
        Policy("t", allowed=frozenset({"no_such_call"}))
    with pytest.raises(ValueError, match="either allow or deny"):
        Policy("t", allowed=frozenset({"read"}), denied=frozenset({"bpf"}), open_list=True)


def test_a_machine_without_a_table_is_told() -> None:
    with pytest.raises(LookupError):
        seccomp.assemble(LISTS["cri"], "vax", 1)


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_unique_and_known_ones_are_right(machine: str) -> None:
    numbers = syscalls.numbers(machine)
    assert len(set(numbers.values())) == len(numbers)
    known = {"x86_64": (0, 59, 257, 435), "aarch64": (63, 221, 56, 435)}[machine]
    assert tuple(numbers[name] for name in ("read", "execve", "openat", "clone3")) == known
