"""What the service manager is told: READY once, when pods can run; a line of counts; the watchdog's beat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from ipc.log import Log
from ipc.loop import Loop
from ipc.messages.control import Health
from supervisor.announcer import SILENCE, Announcer
from supervisor.kinds import Kind
from supervisor.notify import Notifier


@dataclass
class FakeWorker:
    health: Health = field(default_factory=Health)
    answered: float | None = None


@dataclass
class FakeEntry:
    kind: str


@dataclass
class FakeKind:
    entry: FakeEntry
    ready: bool = True
    failed: bool = False
    workers: dict[int, FakeWorker] = field(default_factory=dict)


class Ear:
    """In place of the service manager."""

    watchdog = 0.0

    def __init__(self) -> None:
        self.told: list[dict[str, str]] = []

    def send(self, **fields: str) -> None:
        self.told.append(fields)

    def all(self, name: str) -> list[str]:
        return [fields[name] for fields in self.told if name in fields]


class Silent(Log):
    def emit(self, line: str) -> None:
        del line


@dataclass
class World:
    ear: Ear
    loop: Any
    kinds: dict[str, FakeKind]
    announcer: Announcer


class FakeLoop:
    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Any] = []

    def time(self) -> float:
        return self.now

    def call_later(self, _seconds: float, call: Any) -> None:
        self.timers.append(call)


@pytest.fixture
def world() -> World:
    ear, loop = Ear(), FakeLoop()
    kinds = {name: FakeKind(FakeEntry(name), ready=False) for name in ("cri", "storage")}
    announcer = Announcer(
        cast(Notifier, ear), cast(Loop, loop), Silent("test"), cast(dict[str, Kind], kinds), lambda: 20.0
    )
    return World(ear, loop, kinds, announcer)


def test_ready_is_told_once_and_when_nothing_is_missing(world: World) -> None:
    announcer = world.announcer
    announcer.start()
    for kind in world.kinds.values():
        kind.ready = True
    announcer.changed()
    announcer.published = True
    announcer.changed()
    assert world.ear.all("READY") == []  # no OCI runtime has answered yet
    announcer.runtimes = ["crun"]
    announcer.changed()
    announcer.changed()
    assert world.ear.all("READY") == ["1"]


def test_a_node_without_a_runtime_is_never_ready_and_says_so(world: World) -> None:
    for kind in world.kinds.values():
        kind.ready = True
    world.announcer.published, world.announcer.runtimes = True, []
    world.announcer.changed()
    assert world.ear.all("READY") == []
    assert world.ear.all("STATUS") == ["no OCI runtime runs; 2 of 2 kinds of worker ready"]


def test_the_status_is_a_line_of_counts_told_when_it_changes(world: World) -> None:
    world.kinds["cri"].ready = True
    world.kinds["cri"].workers[7] = FakeWorker(Health(counters={"pods": 3, "containers": 5}))
    world.kinds["storage"].failed = True
    world.announcer.changed()
    world.announcer.changed()
    expected = "failed: storage; 1 of 2 kinds of worker ready; 3 pods, 5 containers running"
    assert world.ear.all("STATUS") == [expected]


def test_the_watchdog_is_fed_while_cri_answers(world: World) -> None:
    world.ear.watchdog = 60.0
    worker = world.kinds["cri"].workers[7] = FakeWorker(answered=100.0)
    world.announcer.start()
    assert world.ear.all("WATCHDOG") == ["1"]
    beat = world.loop.timers[0]
    world.loop.now += SILENCE * 20.0 + 1
    beat()
    assert world.ear.all("WATCHDOG") == ["1"]
    worker.answered = world.loop.now
    beat()
    assert world.ear.all("WATCHDOG") == ["1", "1"]


def test_after_the_last_word_nothing_is_told(world: World) -> None:
    world.announcer.stopping()
    told = len(world.ear.told)
    world.announcer.changed()
    assert len(world.ear.told) == told
    assert world.ear.all("STOPPING") == ["1"]
