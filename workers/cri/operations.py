"""Runs in: cri. Operations that change state, joined by key.

An operation runs in a task of its own: when the client that asked for it gives up, it goes on, and whoever
asks for the same again meanwhile gets its result. One key has at most one operation at a time. Owns the
tasks and nothing else; refuses to start anything once it is closing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

from ipc import log
from ipc.errors import RemoteError, precondition, unavailable

T = TypeVar("T")
#: The kind of the operations that take back what containers have.
CLEAN = "container.clean"
Key = tuple[Hashable, ...]


class Operations:
    """The running operations of this worker."""

    def __init__(self) -> None:
        #: Told of a bug in a background task: nobody else would notice that it stands still.
        self.on_bug: Callable[[BaseException], object] = lambda _error: None
        self._running: dict[Key, asyncio.Task[Any]] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._closing = False

    def __len__(self) -> int:
        return len(self._running)

    def find(self, key: Key) -> asyncio.Task[Any] | None:
        """The running operation of that key."""
        return self._running.get(key)

    async def run(self, key: Key, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Start the operation, or join the one that runs under this key; return its result.

        Cancelling the caller does not cancel the operation. Raises what the operation raised;
        RemoteError(UNAVAILABLE) while closing.
        """
        task = self._running.get(key)
        if task is None:
            task = self._start(key, function)
        return await self._result(task)

    async def _result(self, task: asyncio.Task[T]) -> T:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # the operation was ended, not our caller
                raise precondition("the operation was ended by a stop or removal of its pod") from None
            raise

    def _start(self, key: Key, function: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        if self._closing:
            raise unavailable("this worker is stopping; try again")
        task = asyncio.create_task(function(), name=" ".join(map(str, key)))
        self._running[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    def _ended(self, key: Key, task: asyncio.Task[Any]) -> None:
        self._running.pop(key, None)
        self._settle(task)

    def _settle(self, task: asyncio.Task[Any]) -> None:
        """Look at the result, so that no failure stays unseen when nobody waits for it any more."""
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, RemoteError):
            log.get().info("operation failed", operation=task.get_name(), code=error.code, text=error.text)
        elif error is not None:
            log.get().bug("operation crashed", error, operation=task.get_name())
            if task in self._background:
                self.on_bug(error)

    async def end(self, select: Callable[[Key], bool]) -> None:
        """Cancel the operations whose key is selected, and wait until they have undone themselves."""
        tasks = [task for key, task in self._running.items() if select(key)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def over(self, kind: Hashable, timeout: float) -> None:
        """Wait until the operations of a kind (the first word of their keys) that run now have ended."""
        tasks = [task for key, task in self._running.items() if key[0] == kind]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)

    def background(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something that nobody waits for; it is cancelled when the worker stops."""
        task = asyncio.create_task(coroutine, name=name)
        self._background.add(task)
        task.add_done_callback(self._settle)
        task.add_done_callback(self._background.discard)
        return task

    def let_go(self) -> None:
        """Accept no more; what runs is left as it is, and what nobody waits for is cancelled."""
        self._closing = True
        for task in self._background:
            task.cancel()
        self._background.clear()
        self._running.clear()

    async def close(self, grace: float) -> None:
        """Accept no more; give what runs `grace` seconds, then leave it to the next worker's recovery.

        What is cut short here keeps its intent: it is not cancelled (that would undo it), the process
        simply ends.
        """
        self._closing = True
        for task in self._background:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running.values(), timeout=grace)


async def uncancelled(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to the end even if the awaiting task is cancelled meanwhile (clean-ups)."""
    task = asyncio.ensure_future(coroutine)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return task.result()
