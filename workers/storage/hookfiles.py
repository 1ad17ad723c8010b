"""Runs in: children of storage.

OCI hooks that the node's administrator has put into directories (oci-hooks(5), schema 1.0.0): which of them a
container gets. The conditions are regular expressions held against texts of a pod, so they are tried here,
in a child that is killed when one of them takes too long.

Files are taken in the order of their names; one of a later directory replaces one of the same name. A file
that cannot be used is skipped with a line in the log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ipc import log
from ipc.messages.storage import Hook, HookFacts

from .mounts import Progress
from .textfiles import read_file

VERSION = "1.0.0"
MAX_FILE = 1024 * 1024
#: Stages of the runtime-spec, in the order in which they come.
STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


class _Hook(msgspec.Struct, forbid_unknown_fields=True):
    path: str
    args: list[str] | None = None
    env: list[str] | None = None
    timeout: int | None = None


class _When(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    always: bool | None = None
    annotations: dict[str, str] | None = None
    commands: list[str] | None = None
    has_bind_mounts: bool | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: str
    hook: _Hook
    when: _When
    stages: list[str]


_DECODER = msgspec.json.Decoder(_File)


def matching(
    facts: HookFacts | None, directories: Iterable[str], progress: Progress
) -> dict[str, list[Hook]]:
    """The hooks of a container by stage."""
    found: dict[str, list[Hook]] = {}
    if facts is None:
        return found
    for path in _paths(directories, progress):
        progress.at(f"hooks of {path}")
        try:
            file = _read(path)
            chosen = selects(file.when, facts)
            hook = checked_hook(file.hook.path, file.hook.args, file.hook.env, file.hook.timeout)
        except (OSError, ValueError, re.error) as error:
            log.get().warning("OCI hook skipped", path=path, why=error)
            continue
        for stage in dict.fromkeys(file.stages if chosen else []):
            found.setdefault(stage, []).append(hook)
    return found


def merged(first: dict[str, list[Hook]], second: dict[str, list[Hook]]) -> dict[str, list[Hook]]:
    """Both, stage by stage, in this order."""
    return {
        stage: [*first.get(stage, []), *second.get(stage, [])]
        for stage in STAGES
        if stage in first or stage in second
    }


def _paths(directories: Iterable[str], progress: Progress) -> list[str]:
    by_name: dict[str, str] = {}
    for directory in directories:
        progress.at(directory)
        try:
            names = os.listdir(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        by_name |= {name: os.path.join(directory, name) for name in names if name.endswith(".json")}
    return [by_name[name] for name in sorted(by_name)]


def _read(path: str) -> _File:
    """One file. Raises OSError, ValueError."""
    file = _DECODER.decode(read_file(path, MAX_FILE))
    if file.version != VERSION:
        raise ValueError(f"its version is {file.version!r}, not {VERSION}")
    if not file.stages or set(file.stages) - set(STAGES):
        raise ValueError(f"its stages are not of {', '.join(STAGES)}")
    # one that runs inside the container is looked up there
    if set(file.stages) != {"startContainer"} and not Path(file.hook.path).exists():
        raise ValueError(f"there is no program {file.hook.path!r}")
    return file


def checked_hook(path: str, args: list[str] | None, env: list[str] | None, timeout: int | None) -> Hook:
    """A hook that a runtime can run. Raises ValueError."""
    if not path.startswith("/"):
        raise ValueError(f"the hook's path {path!r} is not absolute")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"the hook's timeout {timeout} is no time")
    if any("\0" in text for text in (path, *(args or []), *(env or []))):
        raise ValueError("the hook has a NUL byte")
    return Hook(path=path, args=list(args or []), env=list(env or []), timeout=timeout)


def selects(when: _When, facts: HookFacts) -> bool:
    """Whether all conditions that are given hold; none given select nothing. Raises re.error."""
    conditions: list[bool] = []
    if when.always is not None:
        conditions.append(when.always)
    if when.has_bind_mounts is not None:
        conditions.append(when.has_bind_mounts and facts.bind_mounts)
    for key, value in (when.annotations or {}).items():
        conditions.append(_annotated(re.compile(key), re.compile(value), facts.annotations))
    if when.commands:
        conditions.append(any(re.search(pattern, facts.command) for pattern in when.commands))
    return bool(conditions) and all(conditions)


def _annotated(key: re.Pattern[str], value: re.Pattern[str], annotations: dict[str, str]) -> bool:
    return any(key.search(name) and value.search(text) for name, text in annotations.items())
