"""Runs in: `bulkhead check`, `bulkhead wipe`, `bulkheadctl check`.

What stands in directories and groups that the supervisor made for monitors and pod inits, held against who is
known: records of nobody, records that cannot be read, inits and pins of pods that are gone, state of an OCI
runtime, cgroups. Looking is done here, for everybody may; removing what has an owner is a function of the
caller's. Never touches a group in which a process lives, nor a monitor whose container runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator

from ipc.blocking import Client
from ipc.errors import RemoteError
from ipc.messages import monitor
from ipc.messages.checking import Finding, Known, left, repaired
from supervisor import held
from supervisor.cgroup import DEFAULT_RUN_ROOT, detect, instance_name
from supervisor.files import remove_tree
from supervisor.monitors import SHORT_ID
from supervisor.parents import is_empty

OWNER, GROUPS = "supervisor", "groups"
MONITOR, INIT, RECORD, RUNTIME, GROUP = "monitor", "init", "record", "runtime", "group"
RECORDS = ("state.json", "exit.json", "cri.json")
_DEPTH = 4  # levels of a pod's parent below its root: kubepods, class, pod, container
_GROUP = re.compile(r"bulkhead-(?P<init>init-)?(?P<id>[0-9a-f]{12,64})(\.scope)?")
_DELETE_SECONDS = 60.0

Remove = Callable[[str], None]


def by_owner(findings: list[Finding]) -> dict[str, list[Finding]]:
    """Findings sorted by who mends them; groups are apart, they are removed last."""
    found: dict[str, list[Finding]] = {o: [] for o in ("cri", "storage", "network", OWNER, GROUPS, "")}
    for finding in findings:
        found[GROUPS if finding.key.startswith(f"{GROUP}:") else finding.owner].append(finding)
    return found


# -- looking --------------------------------------------------------------------------------------------


def inspect(run_root: str, known: Known) -> list[Finding]:
    """Everything that is wrong."""
    return [
        *_monitors(f"{run_root}/monitors", known),
        *_inits(run_root, known),
        *_runtimes(f"{run_root}/runtimes", known),
        *_groups(run_root, known),
    ]


def _monitors(root: str, known: Known) -> Iterator[Finding]:
    for name in held.names(root):
        directory = f"{root}/{name}"
        alive = held.is_held(directory)
        if name not in known.containers:
            problem = f"nobody knows it; its {'monitor lives' if alive else 'records are left'}"
            yield _finding(f"container {name}", problem, "ended, removed", f"{MONITOR}:{name}", name)
            continue
        if not alive and name in known.running and not os.path.lexists(f"{directory}/exit.json"):
            yield _finding(f"container {name}", "its monitor is gone and has left no exit record")
        yield from _records(directory, name, alive=alive)


def _records(directory: str, name: str, *, alive: bool) -> Iterator[Finding]:
    for record in RECORDS:
        path = f"{directory}/{record}"
        try:
            with open(path, "rb") as file:
                json.load(file)
        except FileNotFoundError:
            continue
        except ValueError as error:
            key = "" if alive else f"{RECORD}:{path}"
            yield _finding(f"container {name}", f"{record}: {error}", "" if alive else "set aside", key)


def _inits(run_root: str, known: Known) -> Iterator[Finding]:
    found = {name for name in held.names(f"{run_root}/inits") if not name.startswith(".")}
    found |= {name for name in held.names(f"{run_root}/ns") if os.path.lexists(f"{run_root}/ns/{name}/pid")}
    for name in sorted(found - set(known.pods)):
        problem = "nobody knows it; its init or its PID namespace is left"
        yield _finding(f"pod {name}", problem, "ended, unpinned", f"{INIT}:{name}", name)


def _runtimes(root: str, known: Known) -> Iterator[Finding]:
    for runtime in held.names(root):
        for name in held.names(f"{root}/{runtime}"):
            if re.fullmatch("[0-9a-f]{64}", name) and name not in known.containers:
                key = f"{RUNTIME}:{root}/{runtime}/{name}"
                yield _finding(f"container {name}", f"state of {runtime} is left", "removed", key, name)


def _groups(run_root: str, known: Known) -> Iterator[Finding]:
    short = {name[:SHORT_ID] for name in known.pods}
    for directory in _group_directories(run_root):
        match = _GROUP.fullmatch(os.path.basename(directory))
        if match is None or (match["id"] in short if match["init"] else match["id"] in known.containers):
            continue
        yield _finding(f"cgroup {directory}", "of nobody who is known", "removed", f"{GROUP}:{directory}")


def _group_directories(run_root: str) -> Iterator[str]:
    for mount in detect().everywhere:
        for parent in _parents(run_root):
            top = mount + parent
            for current, names, _ in os.walk(top):
                yield current
                if current[len(top) :].count("/") >= _DEPTH:
                    names.clear()


def _parents(run_root: str) -> list[str]:
    """Where groups of this instance's pods can be: below its own parent, those that pods named, kubelets'."""
    parents = {f"/{instance_name(run_root)}.pods", *noted_parents(run_root)}
    if run_root == DEFAULT_RUN_ROOT:
        parents |= {"/kubepods", "/kubepods.slice", "/bulkhead.slice"}
    return sorted(p for p in parents if not any(p.startswith(f"{other}/") for other in parents))


def noted_parents(run_root: str) -> list[str]:
    """The parents that pods of this instance have named (supervisor/parents.py)."""
    with (
        contextlib.suppress(OSError, ValueError, KeyError, AttributeError),
        open(f"{run_root}/parents.json", encoding="utf-8") as file,
    ):
        return [path for path in json.load(file)["pods"].values() if path]
    return []


def _finding(what: str, problem: str, repair: str = "", key: str = "", subject: str = "") -> Finding:
    return Finding(owner=OWNER, object=what, problem=problem, repair=repair, key=key, subject=subject)


# -- mending --------------------------------------------------------------------------------------------


def mend(run_root: str, findings: list[Finding], remove_monitor: Remove, stop_init: Remove) -> list[Finding]:
    """Mend all but groups, one by one."""
    means: dict[str, Remove] = {
        MONITOR: lambda name: _end_monitor(run_root, name, remove_monitor),
        INIT: stop_init,
        RECORD: lambda path: os.rename(path, f"{path}.damaged"),
        RUNTIME: remove_tree,
    }
    return [_mended(finding, means) for finding in findings]


def _mended(finding: Finding, means: dict[str, Remove]) -> Finding:
    kind, _, name = finding.key.partition(":")
    if kind not in means:
        return left(finding, "nothing can mend it")
    try:
        means[kind](name)
    except (OSError, RemoteError) as error:
        return left(finding, str(error))
    return repaired(finding)


def _end_monitor(run_root: str, container_id: str, remove: Remove) -> None:
    """A container that was made and that nobody knows has a monitor that waits for ever."""
    directory = f"{run_root}/monitors/{container_id}"
    if held.is_held(directory):
        with Client(f"{directory}/ctl.sock", timeout=_DELETE_SECONDS) as client:
            client.call(monitor.Delete())
        end = time.monotonic() + _DELETE_SECONDS
        while held.is_held(directory) and time.monotonic() < end:
            time.sleep(0.01)
    remove(container_id)


def mend_groups(findings: list[Finding]) -> list[Finding]:
    """Remove groups that are empty."""
    return [_remove_group(finding, finding.key.partition(":")[2]) for finding in findings]


def _remove_group(finding: Finding, directory: str) -> Finding:
    if not is_empty(directory, set()):
        return left(finding, "processes live in it")
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return repaired(finding)
    except OSError as error:
        return left(finding, str(error))
    return repaired(finding)
