"""Runs in: every process that locks itself in; the assembler is sans-IO.

Seccomp policies as data, and the assembler that makes classic BPF of them for this machine's kernel.
A policy names system calls; conditions look at the low 32 bits of arguments, which is all the kernel
looks at for the arguments in question (families, flags, commands, process ids).

What a filter answers: EPERM for a call that we know and do not allow, ENOSYS for one that is newer than
our table (libraries then fall back), death for a foreign machine's calling convention.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ipc import syscalls

# struct seccomp_data: int nr, u32 arch, u64 instruction_pointer, u64 args[6] (little endian here)
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARGS = 0, 4, 16

# linux/bpf_common.h
_LD_W_ABS, _JEQ_K, _JGE_K, _AND_K, _RET_K = 0x20, 0x15, 0x35, 0x54, 0x06

# linux/seccomp.h
ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000

_INSTRUCTION = struct.Struct("=HBBI")

#: In a condition's value: the process that installs the filter.
SELF = -1


def refuse(number: int) -> int:
    """The filter's answer that makes a call fail with an errno."""
    return _ERRNO | number


@dataclass(frozen=True)
class Check:
    """Holds if `argument & mask == value` (32 bits)."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFF


#: Alternatives, each of tests that must all hold.
Conditions = tuple[tuple[Check, ...], ...]


def one_of(argument: int, values: Iterable[int]) -> Conditions:
    """The argument is one of these values."""
    return tuple((Check(argument, value),) for value in values)


@dataclass(frozen=True)
class Policy:
    """A list of system calls.

    With `open_list` False (the normal case) only `allowed` and `conditional` calls pass. With `open_list`
    True everything passes but `denied`. `missing` calls answer ENOSYS, so that libraries fall back.
    """

    name: str
    allowed: frozenset[str] = frozenset()
    conditional: Mapping[str, Conditions] = field(default_factory=dict)
    denied: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    open_list: bool = False

    def __post_init__(self) -> None:
        used = self.allowed | self.denied | self.missing | set(self.conditional)
        if unknown := used - syscalls.names():
            raise ValueError(f"seccomp list {self.name!r} names unknown calls: {sorted(unknown)}")
        if bool(self.denied) != self.open_list or (self.open_list and self.allowed):
            raise ValueError(f"seccomp list {self.name!r} must either allow or deny")


def assemble(policy: Policy, machine: str, pid: int) -> bytes:
    """The filter program of a policy: an array of struct sock_filter for `machine`, process `pid`."""
    numbers = syscalls.numbers(machine)
    code = _prologue(machine, max(numbers.values()))
    for name, conditions in policy.conditional.items():
        if name in numbers:
            code += _conditional(numbers[name], conditions, pid)
    for answer, names in (
        (refuse(errno.ENOSYS), policy.missing),
        (refuse(errno.EPERM), policy.denied),
        (ALLOW, policy.allowed),
    ):
        for number in sorted(numbers[name] for name in names if name in numbers):
            code += [(_JEQ_K, 0, 1, number), (_RET_K, 0, 0, answer)]
    code.append((_RET_K, 0, 0, ALLOW if policy.open_list else refuse(errno.EPERM)))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


def assemble_here(policy: Policy, pid: int) -> bytes:
    """`assemble` for this machine. Raises LookupError where we have no table of its numbers."""
    return assemble(policy, platform.machine(), pid)


_Code = list[tuple[int, int, int, int]]


def _prologue(machine: str, last: int) -> _Code:
    """Refuse other calling conventions, and in closed lists calls that are newer than the table."""
    newer = (_JGE_K, 0, 1, last + 1)
    return [
        (_LD_W_ABS, 0, 0, _OFFSET_ARCH),
        (_JEQ_K, 1, 0, syscalls.MACHINES[machine][1]),
        (_RET_K, 0, 0, KILL_PROCESS),
        (_LD_W_ABS, 0, 0, _OFFSET_NR),
        newer,  # x32 calls have _X32_BIT set and end here too
        (_RET_K, 0, 0, refuse(errno.ENOSYS)),
    ]


def _conditional(number: int, conditions: Conditions, pid: int) -> _Code:
    """The block of one call: the first alternative that holds allows it, none means EPERM."""
    block: _Code = []
    for tests in conditions:
        block += _alternative(tests, pid)
    block.append((_RET_K, 0, 0, refuse(errno.EPERM)))
    return [(_JEQ_K, 0, len(block), number), *block]


def _alternative(tests: tuple[Check, ...], pid: int) -> _Code:
    """Tests that must all hold, then ALLOW; a failing one jumps behind it."""
    code: _Code = [(_RET_K, 0, 0, ALLOW)]
    for test in reversed(tests):
        value = pid if test.value == SELF else test.value
        code = [
            (_LD_W_ABS, 0, 0, _OFFSET_ARGS + 8 * test.argument),
            (_AND_K, 0, 0, test.mask),
            (_JEQ_K, 0, len(code), value & 0xFFFFFFFF),
            *code,
        ]
    return code
