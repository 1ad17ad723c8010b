"""Runs in: the supervisor.

What others may ask the supervisor, and who: the one table of handlers of `<run_root>/ipc/supervisor.sock`.
It refuses whatever is not in the table. A failure of the host (a full disk, no more processes) is an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from ipc.errors import RemoteError, internal, not_found
from ipc.messages import Body, Empty
from ipc.messages import supervisor as messages
from ipc.serve import Call
from ipc.table import ROOT, Handler, Handlers, table
from supervisor.hostinfo import HostProbe
from supervisor.inits import Inits
from supervisor.kinds import Kind
from supervisor.monitors import Monitors
from supervisor.parents import Parents
from supervisor.upgrade import Upgrade

FRESH_TIMEOUT = 0.5  # seconds that the list of workers waits for fresh health

_CRI = frozenset({"cri", ROOT})
_READERS = frozenset({"cri", "ops", ROOT})
_OPERATOR = frozenset({ROOT})

Function = Callable[..., Body | None]


class House(Protocol):
    """What the handlers need of the supervisor."""

    monitors: Monitors
    inits: Inits
    parents: Parents
    probe: HostProbe
    kinds: dict[str, Kind]
    upgrade: Upgrade

    def states(self) -> list[messages.WorkerState]: ...
    def config_text(self) -> str: ...
    def reload(self) -> messages.ConfigReloaded: ...


def answers_trouble(function: Function) -> Function:
    """A refusal of the operating system is the caller's answer, not our bug."""

    @functools.wraps(function)
    def wrapper(self: Any, call: Call, body: Any) -> Body | None:
        try:
            return function(self, call, body)
        except OSError as error:
            raise internal(f"{call.type}: {error}") from error

    return wrapper


class Requests:
    """The handlers."""

    def __init__(self, house: House) -> None:
        self._house = house

    def table(self) -> Handlers:
        """Every row: message, handler, callers."""
        return table(
            Handler(messages.MonitorStart, self.monitor_start, _CRI),
            Handler(messages.MonitorRemove, self.monitor_remove, _CRI),
            Handler(messages.MonitorList, self.monitor_list, _READERS),
            Handler(messages.InitStart, self.init_start, _CRI),
            Handler(messages.InitStop, self.init_stop, _CRI),
            Handler(messages.InitList, self.init_list, _READERS),
            Handler(messages.ParentNote, self.parent_note, _CRI),
            Handler(messages.ParentRelease, self.parent_release, _CRI),
            Handler(messages.ParentList, self.parent_list, _READERS),
            Handler(messages.HostInfoGet, self.host_info, _READERS),
            Handler(messages.WorkerList, self.worker_list, _READERS),
            Handler(messages.WorkerRestart, self.worker_restart, _OPERATOR),
            Handler(messages.WorkerDump, self.worker_dump, _OPERATOR),
            Handler(messages.ConfigGet, self.config_get, _READERS),
            Handler(messages.ConfigReload, self.config_reload, _OPERATOR),
            Handler(messages.UpgradeBegin, self.upgrade_begin, _OPERATOR),
            Handler(messages.UpgradeGet, self.upgrade_get, _OPERATOR),
        )

    @answers_trouble
    def monitor_start(self, _call: Call, body: messages.MonitorStart) -> Body:
        return messages.MonitorStarted(pid=self._house.monitors.start(body.container_id, body.pod_id))

    @answers_trouble
    def monitor_remove(self, _call: Call, body: messages.MonitorRemove) -> Body:
        self._house.monitors.remove(body.container_id)
        return Empty()

    @answers_trouble
    def monitor_list(self, _call: Call, body: messages.MonitorList) -> Body:
        return messages.MonitorsListed(monitors=self._house.monitors.states(body.container_id))

    @answers_trouble
    def init_start(self, call: Call, body: messages.InitStart) -> None:
        def done(answer: messages.InitStarted | RemoteError) -> None:
            if isinstance(answer, RemoteError):
                call.fail(answer)
            else:
                call.reply(answer)

        self._house.inits.start(body.pod_id, body.cgroup_parent, done, user_namespace=body.user_namespace)

    @answers_trouble
    def init_stop(self, call: Call, body: messages.InitStop) -> None:
        self._house.inits.stop(body.pod_id, lambda: call.reply(Empty()))

    @answers_trouble
    def init_list(self, _call: Call, _body: messages.InitList) -> Body:
        return messages.InitsListed(inits=self._house.inits.states())

    @answers_trouble
    def parent_note(self, _call: Call, body: messages.ParentNote) -> Body:
        self._house.parents.note(body.pod_id, body.cgroup_parent)
        return Empty()

    @answers_trouble
    def parent_release(self, _call: Call, body: messages.ParentRelease) -> Body:
        self._house.parents.release(body.pod_id)
        return Empty()

    @answers_trouble
    def parent_list(self, _call: Call, _body: messages.ParentList) -> Body:
        return messages.ParentsListed(pods=self._house.parents.pods())

    def host_info(self, call: Call, _body: messages.HostInfoGet) -> None:
        self._house.probe.when_done(call.reply)

    def worker_list(self, call: Call, _body: messages.WorkerList) -> None:
        kinds = self._house.kinds.values()
        outstanding = sum(len(kind.workers) for kind in kinds)

        def one_answered() -> None:
            nonlocal outstanding
            outstanding -= 1
            if outstanding <= 0:
                call.reply(messages.WorkersListed(workers=self._house.states()))

        if not outstanding:
            one_answered()
        for kind in kinds:
            kind.ask_all(one_answered, FRESH_TIMEOUT)

    def worker_restart(self, call: Call, body: messages.WorkerRestart) -> None:
        self._kind(body.kind).restart(lambda: call.reply(Empty()))

    def worker_dump(self, call: Call, body: messages.WorkerDump) -> None:
        self._kind(body.kind).dump(lambda lines: call.reply(messages.WorkerStacks(lines=lines)))

    def _kind(self, name: str) -> Kind:
        kind = self._house.kinds.get(name)
        if kind is None:
            known = ", ".join(self._house.kinds)
            raise not_found(f"there is no worker kind {name!r}; there are {known}")
        return kind

    def config_get(self, _call: Call, _body: messages.ConfigGet) -> Body:
        return messages.ConfigText(text=self._house.config_text())

    def config_reload(self, _call: Call, _body: messages.ConfigReload) -> Body:
        return self._house.reload()

    def upgrade_begin(self, call: Call, _body: messages.UpgradeBegin) -> None:
        self._house.upgrade.begin(call)

    def upgrade_get(self, _call: Call, _body: messages.UpgradeGet) -> Body:
        return self._house.upgrade.state
