"""Runs in: cri. The `linux.seccomp` object: RuntimeDefault, Unconfined, Localhost.

Owns the assembly of our default profile for a set of capabilities, and the reading of profile files in the
format that Docker began and everybody writes (names, args, includes, excludes, archMap). Refuses a profile
with parts that would not be honoured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ipc.cri import api_pb2
from ipc.errors import Code, RemoteError, invalid, precondition

from . import capabilities, validate
from . import seccomp_default as table
from .inputs import SpecInputs
from .notes import Notes
from .words import words

Profile = dict[str, Any]

EPERM, ENOSYS = 1, 38
ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
ACTIONS = frozenset(
    f"SCMP_ACT_{name}" for name in words("ALLOW ERRNO KILL KILL_PROCESS KILL_THREAD LOG TRACE TRAP")
)
OPERATORS = frozenset(f"SCMP_CMP_{name}" for name in words("NE LT LE EQ GE GT MASKED_EQ"))

_TYPE = api_pb2.SecurityProfile
_LOCALHOST_PREFIX = "localhost/"
_DEPRECATED = {
    "runtime/default": _TYPE.RuntimeDefault,
    "docker/default": _TYPE.RuntimeDefault,
    "unconfined": _TYPE.Unconfined,
    "": _TYPE.Unconfined,
}


def profile(inputs: SpecInputs, notes: Notes) -> Profile | None:
    """The profile to apply, None for none: CRI's word for no profile is unconfined, as for the empty path.

    A privileged container goes without one, whatever was asked for.
    """
    request = _request(inputs.config.linux.security_context)
    if request.profile_type == _TYPE.Unconfined:
        return None
    if request.profile_type == _TYPE.Localhost:
        return _localhost(request.localhost_ref, inputs)
    if not inputs.host.seccomp:
        notes.add("no seccomp profile: this node's kernel has no seccomp filters")
        return None
    return _default(inputs, notes)


def localhost_path(context: api_pb2.LinuxContainerSecurityContext) -> str:
    """Absolute path of the profile file that the request names, "" if it names none."""
    request = _request(context)
    if request.profile_type != _TYPE.Localhost:
        return ""
    return validate.clean_path("seccomp.localhost_ref", request.localhost_ref.removeprefix(_LOCALHOST_PREFIX))


def _request(context: api_pb2.LinuxContainerSecurityContext) -> api_pb2.SecurityProfile:
    text = context.seccomp_profile_path
    if context.privileged:
        return _TYPE(profile_type=_TYPE.Unconfined)
    if context.HasField("seccomp"):
        return context.seccomp
    if text in _DEPRECATED:
        return _TYPE(profile_type=_DEPRECATED[text])
    if text.startswith(_LOCALHOST_PREFIX):
        return _TYPE(profile_type=_TYPE.Localhost, localhost_ref=text)
    raise invalid(f"seccomp_profile_path: {text!r} is not runtime/default, unconfined or localhost/PATH")


def _default(inputs: SpecInputs, notes: Notes) -> Profile | None:
    architectures = table.ARCHITECTURES.get(inputs.machine)
    if architectures is None:
        notes.add(f"no seccomp profile: there is no default one for {inputs.machine}")
        return None
    return default_profile(capabilities.effective(inputs), architectures)


def default_profile(granted: frozenset[str], architectures: Iterable[str]) -> Profile:
    """Our profile for a container with these capabilities."""
    gated = {name for names in table.GATED.values() for name in names}
    opened = {name for key, names in table.GATED.items() if key in granted for name in names}
    denied = (gated - opened - set(table.QUIET) - {"clone"}) | set(table.DENIED)
    rules = [
        {"names": sorted({*table.ALLOWED, *opened}), "action": ALLOW},
        {"names": sorted(denied), "action": ERRNO, "errnoRet": EPERM},
        *_personality_rules(),
        *_socket_rules(),
        *([] if "clone" in opened else _clone_rules()),
    ]
    return {
        "defaultAction": ERRNO,
        "defaultErrnoRet": ENOSYS,
        "architectures": list(architectures),
        "syscalls": rules,
    }


def _conditional(name: str, action: str, operator: str, value: int, two: int = 0) -> Profile:
    """A rule on the call's first argument."""
    argument = {"index": 0, "value": value, "valueTwo": two, "op": f"SCMP_CMP_{operator}"}
    rule: Profile = {"names": [name], "action": action, "args": [argument]}
    return rule if action == ALLOW else rule | {"errnoRet": EPERM}


def _personality_rules() -> list[Profile]:
    return [_conditional("personality", ALLOW, "EQ", value) for value in table.PERSONALITIES]


def _socket_rules() -> list[Profile]:
    return [
        _conditional("socket", ALLOW, "NE", table.DENIED_FAMILY),
        _conditional("socket", ERRNO, "EQ", table.DENIED_FAMILY),
    ]


def _clone_rules() -> list[Profile]:
    """Threads and processes yes, namespaces no."""
    allowed = _conditional("clone", ALLOW, "MASKED_EQ", sum(table.NAMESPACE_FLAGS))
    refused = [_conditional("clone", ERRNO, "MASKED_EQ", flag, flag) for flag in table.NAMESPACE_FLAGS]
    return [allowed, *refused]


# --- profile files


class _Argument(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    index: int
    op: str
    value: int = 0
    value_two: int = 0


class _Filter(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    caps: list[str] = []
    arches: list[str] = []
    min_kernel: str = ""


class _Rule(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    action: str
    names: list[str] = []
    name: str = ""
    args: list[_Argument] | None = None
    errno_ret: int | None = None
    errno: str = ""
    comment: str = ""
    includes: _Filter | None = None
    excludes: _Filter | None = None


class _ArchMap(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    architecture: str
    sub_architectures: list[str] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    default_action: str
    default_errno_ret: int | None = None
    default_errno: str = ""
    architectures: list[str] | None = None
    arch_map: list[_ArchMap] | None = None
    flags: list[str] | None = None
    syscalls: list[_Rule] | None = None


_DECODER = msgspec.json.Decoder(_File)

#: uname's name of a machine -> the word in `includes.arches`
_FILTER_ARCHES: Mapping[str, tuple[str, ...]] = {
    "x86_64": ("amd64", "x86_64"),
    "aarch64": ("arm64", "aarch64"),
}


def _localhost(reference: str, inputs: SpecInputs) -> Profile:
    if not inputs.host.seccomp:
        raise precondition(
            f"seccomp: {reference!r} cannot be used, this node's kernel has no seccomp filters"
        )
    content = inputs.rootfs.seccomp_profile
    if not content:
        raise invalid(f"seccomp: the profile {reference!r} is empty or was not found")
    try:
        file = _DECODER.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"seccomp: the profile {reference!r} is not valid: {error}") from None
    return resolve(file, inputs)


def resolve(file: _File, inputs: SpecInputs) -> Profile:
    """The profile of a file for one container: rules that its capabilities, machine and kernel select."""
    facts = _Facts(inputs)
    resolved: Profile = {"defaultAction": _action(file.default_action)}
    if file.default_errno_ret is not None:
        resolved["defaultErrnoRet"] = file.default_errno_ret
    if architectures := _architectures(file, inputs.machine):
        resolved["architectures"] = architectures
    if file.flags:
        resolved["flags"] = file.flags
    rules = [_rule(rule) for rule in file.syscalls or [] if facts.selects(rule)]
    return resolved | {"syscalls": rules}


def _architectures(file: _File, machine: str) -> list[str]:
    if file.architectures:
        return file.architectures
    native = table.ARCHITECTURES.get(machine, ("",))[0]
    chosen = [entry for entry in file.arch_map or [] if entry.architecture == native]
    return [name for entry in chosen for name in (entry.architecture, *(entry.sub_architectures or []))]


class _Facts:
    """What rules may depend on."""

    def __init__(self, inputs: SpecInputs) -> None:
        self._granted = capabilities.effective(inputs)
        self._arches = frozenset(_FILTER_ARCHES.get(inputs.machine, (inputs.machine,)))
        self._kernel = _version(inputs.host.kernel)

    def selects(self, rule: _Rule) -> bool:
        """All conditions of `includes` hold and none of `excludes`."""
        return all(self._conditions(rule.includes)) and not any(self._conditions(rule.excludes))

    def _conditions(self, given: _Filter | None) -> Iterable[bool]:
        if given is None:
            return
        if given.caps:
            yield self._granted.issuperset(given.caps)
        if given.arches:
            yield not self._arches.isdisjoint(given.arches)
        if given.min_kernel:
            yield self._kernel >= _version(given.min_kernel)


def _version(text: str) -> tuple[int, int]:
    digits = [part for part in text.replace("-", ".").split(".")[:2] if part.isdigit()]
    major, minor = [int(part) for part in [*digits, "0", "0"][:2]]
    return major, minor


def _rule(rule: _Rule) -> Profile:
    names = rule.names or ([rule.name] if rule.name else [])
    if not names:
        raise invalid("seccomp: a rule of the profile names no system call")
    resolved: Profile = {"names": names, "action": _action(rule.action)}
    if rule.errno_ret is not None:
        resolved["errnoRet"] = rule.errno_ret
    if rule.args:
        resolved["args"] = [_argument(argument) for argument in rule.args]
    return resolved


def _argument(argument: _Argument) -> Profile:
    if argument.op not in OPERATORS or not 0 <= argument.index <= 5:
        raise invalid(f"seccomp: the profile compares argument {argument.index} by {argument.op!r}")
    return {
        "index": argument.index,
        "value": argument.value,
        "valueTwo": argument.value_two,
        "op": argument.op,
    }


def _action(text: str) -> str:
    if text == "SCMP_ACT_NOTIFY":
        raise RemoteError(Code.UNIMPLEMENTED, "seccomp: the action SCMP_ACT_NOTIFY is not supported")
    if text not in ACTIONS:
        raise invalid(f"seccomp: {text!r} is not an action of a profile")
    return text
