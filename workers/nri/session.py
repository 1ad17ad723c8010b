"""Runs in: nri. What is asked of cri, over the standing call that cri holds here (nri calls nobody).

Owns the session, of which there is one at most, and the questions that wait for cri's answers. When cri
goes, its questions fail; a new cri opens a new session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from ipc.aio import Call
from ipc.errors import not_found
from ipc.messages import Empty
from ipc.messages.nri import Ask, ContainerFacts, PodFacts, Wishes, WishesDone
from ipc.nri import nri_pb2 as pb

from . import oci


class NoSession(Exception):
    """cri is not there, or went before it answered."""


@dataclass(eq=False)
class Session:
    """One cri that listens."""

    tell: Callable[[Ask], object]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class State:
    """What exists, as it comes in for one synchronization; `done` when the plugin has it, or is gone."""

    session: Session
    pods: list[pb.PodSandbox] = field(default_factory=list)
    containers: list[pb.Container] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, pods: Iterable[PodFacts], containers: Iterable[ContainerFacts]) -> None:
        """Take a piece in."""
        self.pods += map(oci.pod, pods)
        self.containers += map(oci.container, containers)


class Sessions:
    """The session of now, and the questions to it."""

    def __init__(self) -> None:
        self.current: Session | None = None
        self._changed = asyncio.Event()
        self._numbers = count(1)
        self._wishes: dict[int, asyncio.Future[WishesDone]] = {}

    async def hold(self, call: Call, greet: Callable[[Session], object]) -> Empty:
        """Serve a session until it ends; a newer one ends it."""
        session = Session(call.update)
        if self.current is not None:
            self.current.ended.set()
        self.current = session
        self._notify()
        greet(session)
        try:
            await session.ended.wait()
        finally:
            session.ended.set()
            if self.current is session:
                self.current = None
        return Empty()

    def end(self) -> None:
        """Nobody is left who would ask: let cri go."""
        if self.current is not None:
            self.current.ended.set()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def after(self, seen: Session | None) -> Session:
        """The session of now, or of later, that is not `seen`."""
        while self.current is None or self.current is seen:
            await self._changed.wait()
        return self.current

    def number(self) -> int:
        """A number for a question."""
        return next(self._numbers)

    async def grant(self, plugin: str, wishes: Wishes) -> WishesDone:
        """Ask for what a plugin wants out of turn. Raises NoSession."""
        session, number = self.current, self.number()
        if session is None:
            raise NoSession
        future: asyncio.Future[WishesDone] = asyncio.get_running_loop().create_future()
        self._wishes[number] = future
        session.tell(Ask(kind="update", number=number, plugin=plugin, wishes=wishes))
        try:
            await first(future, session.ended)
            if not future.done():
                raise NoSession
            return future.result()
        finally:
            del self._wishes[number]

    def granted(self, body: WishesDone) -> None:
        """cri's answer. Raises RemoteError(NOT_FOUND) if nobody waits for it."""
        future = self._wishes.get(body.number)
        if future is None or future.done():
            raise not_found(f"nobody asked question {body.number}")
        future.set_result(body)


async def first(*events: asyncio.Event | asyncio.Future[WishesDone]) -> None:
    """Wait until one of them is set or done."""
    waits = [asyncio.ensure_future(one.wait()) if isinstance(one, asyncio.Event) else one for one in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel() if not wait.done() else None
