"""Runs in: the supervisor.

cgroup parents that a pod names and nobody has made. The OCI runtime makes them with the pod's first
container, and nobody would remove them: so what of a parent is missing when its pod begins is noted here, and
removed when the last pod below it has gone, if it is empty then. What was there before (a kubelet's groups)
is never touched. Owns `<run_root>/parents.json`, which outlives the supervisor. Under systemd a missing slice
is made by systemd, which is therefore told to stop it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator

from ipc.errors import invalid
from supervisor import held
from supervisor.cgroup import parent_path
from supervisor.files import find_program
from supervisor.hostinfo import Program
from supervisor.worker import Ground

SLICE = ".slice"
#: Controllers of cgroup v1 that systemd makes groups for (systemd.resource-control(5)).
MANAGED = frozenset({"cpu", "cpuacct", "memory", "pids", "blkio", "devices"})


class Parents:
    """The notes of all pods. `systemd`: slices are systemd's. Raises OSError where the disk refuses."""

    def __init__(self, ground: Ground, run_root: str, *, systemd: bool) -> None:
        self._ground = ground
        self._path = f"{run_root}/parents.json"
        self._systemctl = find_program("systemctl") if systemd else ""
        self._pods: dict[str, str] = {}  # pod -> its parent, a path below every hierarchy
        self._missing: set[str] = set()  # directories that were not there when a pod named them
        self._load()

    def note(self, pod_id: str, cgroup_parent: str) -> None:
        """A pod begins: what of its parent is missing? Raises RemoteError(INVALID_ARGUMENT)."""
        held.check_id(pod_id, "pod")
        try:
            path = parent_path(cgroup_parent).rstrip("/")
        except ValueError as error:
            raise invalid(str(error)) from error
        self._pods[pod_id] = path
        self._missing.update(each for each in self._directories(path) if not os.path.isdir(each))
        self._save()

    def release(self, pod_id: str) -> None:
        """A pod has gone: remove what was missing before it, if no other pod needs it. Unknown is success."""
        path = self._pods.pop(pod_id, "")
        if not path:
            return
        ours = self._missing.intersection(self._directories(path))
        if ours:
            needed = {each for other in self._pods.values() for each in self._directories(other)}
            self._remove(sorted(ours - needed, key=len, reverse=True))
            self._missing -= {each for each in ours - needed if not os.path.isdir(each)}
        self._save()

    def pods(self) -> list[str]:
        """Every pod that was noted and not released."""
        return sorted(self._pods)

    def _directories(self, path: str) -> Iterator[str]:
        """A parent and the groups above it, in every hierarchy: runtimes make groups in all of them."""
        levels = path.strip("/").split("/")
        for mount in self._ground.groups.hierarchies.everywhere:
            for depth in range(len(levels)):
                yield f"{mount}/{'/'.join(levels[: depth + 1])}"

    def _remove(self, directories: list[str]) -> None:
        slices = [each for each in directories if self._is_systemds(each)]
        for directory in directories:
            if directory not in slices:
                with contextlib.suppress(OSError):  # it is not empty, or was never made
                    os.rmdir(directory)
        # not the directory alone: systemd would go on to think that the slice has its controllers
        names = dict.fromkeys(os.path.basename(each) for each in slices if os.path.isdir(each))
        used = {os.path.basename(each) for each in slices if not is_empty(each, set(slices))}
        if unused := [name for name in names if name not in used]:
            self._stop(unused)

    def _is_systemds(self, directory: str) -> bool:
        """Whether systemd removes it with the slice: not in hierarchies that only runtimes make groups in."""
        hierarchies = self._ground.groups.hierarchies
        others = {} if hierarchies.version == 2 else hierarchies.mounts
        managed = {mount for controller, mount in others.items() if controller in MANAGED}
        unmanaged = tuple(f"{mount}/" for mount in others.values() if mount not in managed)
        return bool(self._systemctl) and directory.endswith(SLICE) and not directory.startswith(unmanaged)

    def _stop(self, slices: list[str]) -> None:
        def ended(code: int, output: bytes) -> None:
            if code:
                why = output.decode("utf-8", "replace").strip()[:200]
                self._ground.log.warning("systemd did not stop slices", slices=",".join(slices), why=why)

        try:
            Program(self._ground.loop, self._ground.reaper, [self._systemctl, "stop", *slices], ended)
        except OSError as error:
            self._ground.log.warning("program cannot be run", path=self._systemctl, why=error.strerror)

    # -- the file -------------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            with open(self._path, encoding="utf-8") as file:
                data = json.load(file)
            self._pods, self._missing = dict(data["pods"]), set(data["missing"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:  # it is renamed into place: only a broken disk
            self._ground.log.error("notes of cgroup parents are damaged", path=self._path, why=error)

    def _save(self) -> None:
        with open(f"{self._path}.new", "w", encoding="utf-8") as file:
            json.dump({"pods": self._pods, "missing": sorted(self._missing)}, file)
        os.rename(f"{self._path}.new", self._path)


def is_empty(directory: str, apart_from: set[str]) -> bool:
    """Whether a group has no process and no group in it, apart from some that are empty themselves."""
    try:
        with open(f"{directory}/cgroup.procs", encoding="ascii") as file, os.scandir(directory) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            return not file.read(1) and all(
                each in apart_from and is_empty(each, apart_from) for each in below
            )
    except OSError as error:
        return error.errno in {errno.ENOENT, errno.ENODEV}
