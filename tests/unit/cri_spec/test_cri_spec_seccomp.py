"""Seccomp: which profile, what the default one holds, how files are read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ipc import syscalls
from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError
from tests.support import spec_inputs as make
from workers.cri.spec import seccomp
from workers.cri.spec import seccomp_default as table
from workers.cri.spec.capabilities import DEFAULT, NAMES

Security = api_pb2.LinuxContainerSecurityContext


def profile(security: Security | None = None, **changes: Any) -> dict[str, Any] | None:
    linux: dict[str, dict[str, Any]] = make.spec(make.container(security), **changes)["linux"]
    return linux.get("seccomp")


def request(kind: str, reference: str = "") -> Security:
    return Security(seccomp=api_pb2.SecurityProfile(profile_type=kind, localhost_ref=reference))


def default(granted: frozenset[str] = frozenset(DEFAULT)) -> dict[str, Any]:
    return seccomp.default_profile(granted, table.ARCHITECTURES["x86_64"])


def names(made: dict[str, Any], action: str, *, conditional: bool = False) -> set[str]:
    rules = [r for r in made["syscalls"] if r["action"] == action and bool(r.get("args")) is conditional]
    return {name for rule in rules for name in rule["names"]}


def test_profile_is_the_one_asked_for_and_none_without_a_word() -> None:
    assert profile(request("RuntimeDefault")) == default()
    assert profile(Security(seccomp_profile_path="runtime/default")) == default()
    assert profile(request("Unconfined")) is None
    assert profile(Security(seccomp_profile_path="unconfined")) is None
    assert profile() is None


def test_privileged_container_is_unconfined_whatever_is_asked_for() -> None:
    for security in (Security(), request("RuntimeDefault"), request("Localhost", "/p.json")):
        security.privileged = True
        assert profile(security, sandbox=make.privileged_sandbox()) is None
        assert seccomp.localhost_path(security) == ""


def test_node_or_machine_without_profile_is_noted() -> None:
    for changes in ({"host": make.host(seccomp=False)}, {"machine": "riscv64"}):
        made = make.built(make.container(request("RuntimeDefault")), **changes)
        assert "seccomp" not in msgspec.json.decode(made.spec)["linux"]
        assert any("seccomp" in note for note in made.degraded)


def test_no_call_is_both_allowed_and_denied() -> None:
    for granted in (frozenset[str](), frozenset(DEFAULT), frozenset(NAMES)):
        made = default(granted)
        allowed, denied = names(made, seccomp.ALLOW), names(made, seccomp.ERRNO)
        assert not allowed & denied
        assert not (allowed | denied) & {"personality", "socket"}
    assert not set(table.ALLOWED) & {name for group in table.GATED.values() for name in group}
    assert len(set(table.ALLOWED)) == len(table.ALLOWED)


def test_calls_of_the_whole_node_are_denied_to_everybody() -> None:
    made = default(frozenset(NAMES))
    assert {"kexec_load", "keyctl", "swapon"} <= names(made, seccomp.ERRNO)


@pytest.mark.parametrize(
    ("capability", "call"),
    [
        ("CAP_SYS_ADMIN", "mount"),
        ("CAP_SYS_ADMIN", "clone3"),
        ("CAP_SYS_ADMIN", "bpf"),
        ("CAP_BPF", "bpf"),
        ("CAP_SYS_CHROOT", "chroot"),
        ("CAP_SYS_TIME", "clock_settime"),
        ("CAP_SYSLOG", "syslog"),
        ("CAP_SYS_PTRACE", "process_vm_readv"),
        ("CAP_SYS_MODULE", "init_module"),
    ],
)
def test_capability_opens_its_calls(capability: str, call: str) -> None:
    assert call not in names(default(frozenset()), seccomp.ALLOW)
    assert call in names(default(frozenset({capability})), seccomp.ALLOW)


def test_gates_are_named_after_capabilities() -> None:
    assert set(table.GATED) <= set(NAMES)


def test_clone_makes_no_namespaces_without_sys_admin() -> None:
    rules = [rule for rule in default()["syscalls"] if rule["names"] == ["clone"]]
    allowed = [rule["args"][0] for rule in rules if rule["action"] == seccomp.ALLOW]
    assert [(a["op"], a["value"], a["valueTwo"]) for a in allowed] == [("SCMP_CMP_MASKED_EQ", 0x7E020000, 0)]
    assert len(rules) == 1 + len(table.NAMESPACE_FLAGS)
    assert not [r for r in default(frozenset({"CAP_SYS_ADMIN"}))["syscalls"] if r["names"] == ["clone"]]


def test_calls_in_no_table_answer_enosys_and_new_ones_fall_under_it() -> None:
    made = default()
    assert (made["defaultAction"], made["defaultErrnoRet"]) == (seccomp.ERRNO, seccomp.ENOSYS)
    assert "clone3" not in names(made, seccomp.ERRNO)
    assert "io_uring_setup" not in names(made, seccomp.ALLOW) | names(made, seccomp.ERRNO)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_call_of_a_c_library_is_in_the_table_of_the_machine(machine: str) -> None:
    known = set(table.ALLOWED) | {"clone", "socket", "personality"}
    basic = (
        "read write openat close mmap brk execve exit_group rt_sigaction futex wait4 rseq getrandom prlimit64"
    )
    assert set(basic.split()) <= known
    assert set(basic.split()) <= set(syscalls.numbers(machine))
    assert f"SCMP_ARCH_{machine.upper()}" == table.ARCHITECTURES[machine][0]


def test_every_call_of_our_table_of_numbers_was_thought_of() -> None:
    gated = {name for group in table.GATED.values() for name in group}
    decided = {*table.ALLOWED, *gated, *table.DENIED, "personality", "socket"}
    assert syscalls.names() - decided == OBSOLETE_OR_REFUSED


#: Calls that get ENOSYS: gone from today's kernels, never implemented, or (io_uring) a second door to
#: everything that the filter guards.
OBSOLETE_OR_REFUSED = {
    "_sysctl",
    "afs_syscall",
    "create_module",
    "get_kernel_syms",
    "getpmsg",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "putpmsg",
    "query_module",
    "security",
    "sysfs",
    "tuxcall",
    "uselib",
    "ustat",
    "vserver",
}


def test_profile_file_is_resolved_for_the_container() -> None:
    content = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": None},
        ],
        "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW", "comment": "always"},
            {"name": "write", "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["chown"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_CHOWN"]}},
            {"names": ["umount"], "action": "SCMP_ACT_LOG", "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["arm"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
            {"names": ["amd"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64"]}},
            {"names": ["old"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
            {"names": ["new"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.1"}},
            {
                "names": ["personality"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}],
            },
        ],
    }
    made = profile(
        request("Localhost", "/p.json"), rootfs=make.rootfs(seccomp_profile=msgspec.json.encode(content))
    )
    assert made is not None
    assert [rule["names"][0] for rule in made["syscalls"]] == [
        "read",
        "write",
        "chown",
        "umount",
        "amd",
        "old",
        "personality",
    ]
    assert made["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert made["syscalls"][1] == {"names": ["write"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5}
    assert made["syscalls"][-1]["args"] == [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", Code.INVALID_ARGUMENT),
        (b"{", Code.INVALID_ARGUMENT),
        (b"{}", Code.INVALID_ARGUMENT),
        (b"\xff", Code.INVALID_ARGUMENT),
        (b'{"defaultAction":"SCMP_ACT_MAGIC"}', Code.INVALID_ARGUMENT),
        (b'{"defaultAction":"SCMP_ACT_NOTIFY"}', Code.UNIMPLEMENTED),
        (b'{"defaultAction":"SCMP_ACT_LOG","listenerPath":"/x"}', Code.INVALID_ARGUMENT),
        (b'{"defaultAction":"SCMP_ACT_LOG","syscalls":[{"action":"SCMP_ACT_LOG"}]}', Code.INVALID_ARGUMENT),
        (
            (
                b'{"defaultAction":"SCMP_ACT_LOG","syscalls":[{"name":"a","action":"SCMP_ACT_LOG",'
                b'"args":[{"index":6,"op":"SCMP_CMP_EQ"}]}]}'
            ),
            Code.INVALID_ARGUMENT,
        ),
    ],
)
def test_profile_file_with_parts_that_cannot_be_honoured_is_refused(content: bytes, code: Code) -> None:
    with pytest.raises(RemoteError, match="seccomp") as refused:
        profile(request("Localhost", "/p.json"), rootfs=make.rootfs(seccomp_profile=content))
    assert refused.value.code is code


def test_profile_cannot_be_used_on_a_node_without_filters() -> None:
    with pytest.raises(RemoteError, match="no seccomp filters") as refused:
        profile(request("Localhost", "/p.json"), host=make.host(seccomp=False))
    assert refused.value.code is Code.FAILED_PRECONDITION


def test_path_of_the_profile_is_absolute_and_clean() -> None:
    assert seccomp.localhost_path(request("Localhost", "localhost//p//a.json")) == "/p/a.json"
    assert seccomp.localhost_path(Security(seccomp_profile_path="localhost//p.json")) == "/p.json"
    assert seccomp.localhost_path(Security()) == ""
    for reference in ("", "a.json", "/a/../b"):
        with pytest.raises(RemoteError, match="localhost_ref"):
            seccomp.localhost_path(request("Localhost", reference))
    with pytest.raises(RemoteError, match="seccomp_profile_path"):
        seccomp.localhost_path(Security(seccomp_profile_path="whatever"))
