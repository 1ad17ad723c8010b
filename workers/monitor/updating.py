"""Runs in: the monitor.

Changes of a container's limits while it lives: the OCI runtime's `update`, what runtimes leave out (huge
pages, the OOM score), and the files that say what holds now. One after another, in the order they came.
A memory limit below what the container cannot give back is refused before anything is changed: the kernel
would kill for it.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from ipc.errors import RemoteError, invalid, precondition
from ipc.fds import sealed_memfd
from ipc.messages import Body, Empty
from ipc.messages.monitor import Update
from workers.monitor import records
from workers.monitor.cgroups import Cgroups
from workers.monitor.containerlog import ContainerLog
from workers.monitor.runtime import FIRST_EXTRA_FD, Launcher, Outcome, Runtime, Streams

Answer = Callable[[Body | RemoteError], object]

BUSCTL = "/usr/bin/busctl"
SYSTEMD = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
SYSTEMD_TIMEOUT = 20.0


class _Memory(msgspec.Struct):
    limit: int = 0


class _Cpu(msgspec.Struct):
    quota: int = 0


class _Hugepages(msgspec.Struct, rename="camel"):
    page_size: str
    limit: int


class _Resources(msgspec.Struct, rename="camel"):
    """What is looked at of the runtime-spec's linux.resources."""

    cpu: _Cpu = msgspec.field(default_factory=_Cpu)
    memory: _Memory = msgspec.field(default_factory=_Memory)
    hugepage_limits: list[_Hugepages] = []


_DECODER = msgspec.json.Decoder(_Resources)


class Updated(Protocol):
    """What an update needs of its container."""

    container_id: str
    directory: str
    runtime: Runtime
    launcher: Launcher

    @property
    def groups(self) -> Cgroups:
        """The container's control groups."""

    @property
    def unit(self) -> str:
        """Its systemd unit, "" if it has none."""

    @property
    def init_pid(self) -> int:
        """Its first process."""


class Updates:
    """The updates of one container."""

    def __init__(self, container: Updated, log: ContainerLog) -> None:
        self._container = container
        self._log = log
        self._queue: deque[tuple[Update, Answer]] = deque()

    @property
    def busy(self) -> bool:
        """True while an update is under way."""
        return bool(self._queue)

    def submit(self, request: Update, answer: Answer) -> None:
        """Do it when its turn has come; `answer` is called once."""
        self._queue.append((request, answer))
        if len(self._queue) == 1:
            self._begin(request)

    def _begin(self, request: Update) -> None:
        try:
            self._check(request)
            self._launch(request)
        except RemoteError as error:
            self._end(error)
        except OSError as error:
            self._end(precondition(f"update: {error.strerror}"))

    def _check(self, request: Update) -> None:
        limit = _resources(request).memory.limit
        used = self._container.groups.memory_in_use()
        if 0 < limit < used:
            raise precondition(f"update: a memory limit of {limit} is below the {used} bytes that are in use")

    def _launch(self, request: Update) -> None:
        container = self._container
        fd = sealed_memfd("resources", self._for_runtime(request))
        try:
            container.launcher.call(
                container.runtime.argv(
                    "update", "--resources", f"/proc/self/fd/{FIRST_EXTRA_FD}", container.container_id
                ),
                self._ended,
                timeout=request.timeout_ms / 1000,
                streams=Streams(extra=(fd,)),
            )
        finally:
            os.close(fd)

    def _for_runtime(self, request: Update) -> bytes:
        """The resources, but for "no CPU quota" on v1: crun 1.8 cannot write it, so we do, afterwards."""
        if not self._takes_quota_away(request):
            return request.resources
        resources = msgspec.json.decode(request.resources)
        del resources["cpu"]["quota"]
        return msgspec.json.encode(resources)

    def _takes_quota_away(self, request: Update) -> bool:
        return _resources(request).cpu.quota < 0 and self._container.groups.has_cpu_quota()

    def _ended(self, outcome: Outcome) -> None:
        request, _answer = self._queue[0]
        if not outcome.ok:
            self._end(outcome.error("update"))
            return
        if self._takes_quota_away(request):
            self._container.groups.unlimit_cpu()
        self._set_hugepages(request)
        if request.oom_score_adj is not None:
            self._set_oom_score(request.oom_score_adj)
        if request.unit_properties and self._container.unit:
            self._tell_systemd(request)
        else:
            self._record(request)

    def _tell_systemd(self, request: Update) -> None:
        def told(outcome: Outcome) -> None:
            if not outcome.ok:
                self._log.warning("systemd does not know the new limits", error=outcome.error("busctl").text)
            self._record(request)

        argv = set_properties(self._container.unit, request.unit_properties)
        try:
            self._container.launcher.call(argv, told, timeout=SYSTEMD_TIMEOUT)
        except RemoteError as error:
            self._log.warning("systemd does not know the new limits", error=error.text)
            self._record(request)

    def _record(self, request: Update) -> None:
        try:
            records.write_updated(self._container.directory, request.spec, request.keep)
        except OSError as error:
            self._end(precondition(f"update: it holds, but cannot be recorded: {error}"))
        else:
            self._end(Empty())

    def _set_hugepages(self, request: Update) -> None:
        for each in _resources(request).hugepage_limits:
            if not self._container.groups.limit_hugepages(each.page_size, each.limit):
                self._log.warning("huge page limit not set", page_size=each.page_size, limit=each.limit)

    def _set_oom_score(self, score: int) -> None:
        for pid in {self._container.init_pid, *self._container.groups.pids()}:
            try:
                with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
                    file.write(str(score))
            except PermissionError:
                self._log.warning("OOM score not lowered: it needs CAP_SYS_RESOURCE", score=score, pid_of=pid)
            except OSError:
                continue  # it has ended

    def _end(self, result: Body | RemoteError) -> None:
        _request, answer = self._queue.popleft()
        with contextlib.ExitStack() as stack:
            if self._queue:
                stack.callback(self._begin, self._queue[0][0])
            answer(result)


def _resources(request: Update) -> _Resources:
    try:
        return _DECODER.decode(request.resources)
    except msgspec.DecodeError as error:
        raise invalid(f"update: the resources are not valid: {error}") from None


def set_properties(unit: str, properties: Mapping[str, int]) -> list[str]:
    """Return the command that calls SetUnitProperties (org.freedesktop.systemd1(5)), until the next boot."""
    words = [word for name, value in properties.items() for word in (name, "t", str(value))]
    return [
        BUSCTL,
        "call",
        *SYSTEMD,
        "SetUnitProperties",
        "sba(sv)",
        unit,
        "true",
        str(len(properties)),
        *words,
    ]
