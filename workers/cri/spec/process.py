"""Runs in: cri. The `process` object of the OCI runtime-spec: what runs, as whom, with which environment.

Owns the precedence rules between node defaults, image and CRI request, and the process object of an exec.
Refuses what execve(2) or the JSON of a runtime spec cannot carry.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from ipc.cri import api_pb2
from ipc.errors import invalid, precondition
from ipc.messages.supervisor import HostInfo

from . import capabilities, image, security, validate
from .inputs import SpecInputs
from .notes import Notes
from .words import words

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: What execve(2) takes (MAX_ARG_STRLEN): bytes of one argument, or of a variable with its name, and a NUL.
MAX_STRING = 32 * resource.getpagesize()
#: And all together, with a pointer for each: a quarter of the stack's limit, within these bounds.
MIN_STRINGS, MAX_STRINGS = MAX_STRING, 6 << 20
OOM_SCORE_MIN, OOM_SCORE_MAX = -1000, 1000

_RLIMITS = frozenset(
    words(
        "as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack"
    )
)


def process(inputs: SpecInputs, execution: image.Execution, notes: Notes) -> dict[str, Any]:
    """The whole object."""
    context = inputs.config.linux.security_context
    parts: dict[str, Any] = {
        "terminal": inputs.config.tty,
        "user": user(inputs),
        "args": arguments(inputs.config, execution),
        "env": environment(inputs, execution),
        "cwd": working_directory(inputs.config, execution),
        "capabilities": capabilities.sets(inputs, notes),
        "noNewPrivileges": context.no_new_privs,
        "oomScoreAdj": oom_score(inputs, notes),
    }
    if limits := rlimits(inputs.settings.default_ulimits):
        parts["rlimits"] = limits
    if profile := security.apparmor(inputs, notes):
        parts["apparmorProfile"] = profile
    if label := security.process_label(inputs, notes):
        parts["selinuxLabel"] = label
    return parts


def exec_process(spec: bytes, command: Iterable[str], *, tty: bool = False) -> bytes:
    """The process object of a command in a running container: the container's own but for args and terminal.

    `spec` is what `build` made. INVALID_ARGUMENT for an empty command.
    """
    own: dict[str, Any] = msgspec.json.decode(spec)["process"]
    args = list(command)
    if not args:
        raise invalid("the command to execute is empty")
    validate.texts("cmd", args)
    changes: dict[str, Any] = {"args": args, "terminal": tty}
    if tty:
        changes["env"] = _with_terminal(own["env"])
    made = own | changes
    check_size(made)
    return msgspec.json.encode(made)


def check_size(process: dict[str, Any]) -> None:
    """INVALID_ARGUMENT for more than execve(2) takes, which a runtime tells by some code only."""
    total = 0
    for what, strings in (("argument", process["args"]), ("environment variable", process["env"])):
        for text in strings:
            size = len(text.encode()) + 1
            total += size + 8
            if size > MAX_STRING:
                begin = text.partition("=")[0][:32]
                raise invalid(
                    f"the {what} {begin!r} has {size - 1} bytes: the kernel takes at most {MAX_STRING - 1}"
                )
    limit = min(max(_stack(process) // 4, MIN_STRINGS), MAX_STRINGS)
    if total > limit:
        raise invalid(
            f"arguments and environment have {total} bytes together: the kernel takes at most {limit}"
        )


def _stack(process: dict[str, Any]) -> int:
    """The soft limit of the process's stack: its own, else ours, which the runtime inherits too."""
    own = [limit["soft"] for limit in process.get("rlimits", ()) if limit["type"] == "RLIMIT_STACK"]
    soft = int(own[0]) if own else resource.getrlimit(resource.RLIMIT_STACK)[0]
    return MAX_STRINGS * 4 if soft == resource.RLIM_INFINITY else soft


def _with_terminal(env: list[str]) -> list[str]:
    return env if any(entry.startswith("TERM=") for entry in env) else [*env, "TERM=xterm"]


def arguments(config: api_pb2.ContainerConfig, execution: image.Execution) -> list[str]:
    """command replaces Entrypoint and Cmd; args replaces Cmd (the same rule as in a pod's manifest)."""
    if config.command:
        args = [*config.command, *config.args]
    else:
        args = [*(execution.entrypoint or []), *(config.args or execution.cmd or [])]
    if not args or not args[0]:
        raise invalid("no command: neither the request nor the image names a program to run")
    validate.texts("the image's Entrypoint and Cmd", args)
    return args


def environment(inputs: SpecInputs, execution: image.Execution) -> list[str]:
    """HOSTNAME, TERM, PATH and HOME where nobody sets them, then node defaults, image, request; last wins."""
    variables = {"PATH": DEFAULT_PATH, "HOSTNAME": inputs.hostname, "HOME": inputs.rootfs.home or "/"}
    if inputs.config.tty:
        variables["TERM"] = "xterm"
    for source in (inputs.settings.default_env, execution.env or []):
        variables.update(_pairs(source))
    variables.update(_request_variables(inputs.config.envs))
    return [f"{key}={value}" for key, value in variables.items()]


def _pairs(entries: Iterable[str]) -> Iterator[tuple[str, str]]:
    """KEY=value; an entry without `=`, or without a key, sets nothing (as in any shell's environment)."""
    for entry in entries:
        validate.texts("environment", [entry])
        key, equals, value = entry.partition("=")
        if key and equals:
            yield key, value


def _request_variables(envs: Iterable[api_pb2.KeyValue]) -> Iterator[tuple[str, str]]:
    for pair in envs:
        if not pair.key or "=" in pair.key:
            raise invalid(f"envs: {pair.key!r} cannot be the name of an environment variable")
        yield pair.key, _text(pair)


def _text(pair: api_pb2.KeyValue) -> str:
    """The value as text. The API carries bytes, but an OCI runtime reads JSON, which has only UTF-8."""
    try:
        value = pair.value.decode()
    except UnicodeDecodeError:
        raise invalid(f"envs: the value of {pair.key} is not UTF-8, an OCI spec cannot carry it") from None
    validate.texts(f"envs: {pair.key}", [pair.key, value])
    return value


def working_directory(config: api_pb2.ContainerConfig, execution: image.Execution) -> str:
    """CRI, else image, else `/`. Images of old tools have relative ones: they start at `/`."""
    if config.working_dir:
        return validate.clean_path("working_dir", config.working_dir)
    return validate.clean_path("the image's WorkingDir", "/" + execution.working_dir.lstrip("/"))


def user(inputs: SpecInputs) -> dict[str, Any]:
    """Ids as storage resolved them. The primary group is a supplementary one too: else a process could lose
    it with a set-gid program and pass by a file mode that is there to shut this group out."""
    resolved = inputs.rootfs
    groups = dict.fromkeys([resolved.gid, *resolved.additional_gids])
    return {"uid": resolved.uid, "gid": resolved.gid, "additionalGids": list(groups)}


def oom_score(inputs: SpecInputs, notes: Notes) -> int:
    """The request's oom_score_adj, as low as this node lets us go."""
    return oom_score_of(inputs.config.linux.resources.oom_score_adj, inputs.host, notes)


def oom_score_of(wanted: int, host: HostInfo, notes: Notes) -> int:
    """A score as low as this node lets us go."""
    if not OOM_SCORE_MIN <= wanted <= OOM_SCORE_MAX:
        raise invalid(f"oom_score_adj: {wanted} is not between {OOM_SCORE_MIN} and {OOM_SCORE_MAX}")
    floor = host.oom_score_floor
    if wanted < floor:
        notes.add(f"oom_score_adj {wanted} became {floor}: a lower one needs CAP_SYS_RESOURCE")
    return max(wanted, floor)


def rlimits(ulimits: Iterable[str]) -> list[dict[str, Any]]:
    """The node's default_ulimits, "nofile=1024:2048", as OCI rlimits. FAILED_PRECONDITION if one is none."""
    return [_rlimit(entry) for entry in ulimits]


def _rlimit(entry: str) -> dict[str, Any]:
    name, _, numbers = entry.partition("=")
    soft, _, hard = numbers.partition(":")
    try:
        values = {"soft": _amount(soft), "hard": _amount(hard or soft)}
    except ValueError:
        raise precondition(f"default_ulimits: {entry!r} is not like nofile=1024:2048") from None
    if name.lower() not in _RLIMITS or values["soft"] > values["hard"]:
        raise precondition(
            f"default_ulimits: {entry!r} names no limit, or its soft limit is over the hard one"
        )
    return {"type": f"RLIMIT_{name.upper()}", **values}


def _amount(text: str) -> int:
    number = 2**64 - 1 if text in {"unlimited", "-1"} else int(text)
    if not 0 <= number < 2**64:
        raise ValueError(text)
    return number
