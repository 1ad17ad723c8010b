"""Runs in: storage.

A full disk, a process limit, an I/O error: trouble of the host, not a bug of ours. It becomes an answer where
somebody asked, and a warning where nobody did; the worker goes on.
"""

from __future__ import annotations

import errno
import functools
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ipc import log
from ipc.errors import Code, RemoteError
from ipc.loop import Loop
from workers.jobs import Job, Jobs

HOST_TROUBLE = (OSError, sqlite3.OperationalError)
_EXHAUSTED = {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


def refusal(error: BaseException, doing: str) -> RemoteError:
    """The answer for a failure of the host while `doing`."""
    if isinstance(error, OSError):
        exhausted, text = error.errno in _EXHAUSTED, error.strerror or str(error)
    else:
        exhausted, text = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL, str(error)
    return RemoteError(Code.RESOURCE_EXHAUSTED if exhausted else Code.INTERNAL, f"{doing}: {text}")


def answering(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose host trouble is answered."""

    @functools.wraps(handler)
    def answered(call: Any, body: Any) -> Any:
        try:
            return handler(call, body)
        except HOST_TROUBLE as error:
            log.get().error("host trouble", request=type(body).__name__, why=error)
            raise refusal(error, f"storage cannot serve {body.NAME}") from error

    return answered


@contextmanager
def told(doing: str) -> Iterator[None]:
    """In a child: host trouble is its outcome. Raises RemoteError."""
    try:
        yield
    except OSError as error:
        raise refusal(error, doing) from error


@contextmanager
def contained(doing: str) -> Iterator[None]:
    """Nobody waits for this: host trouble is logged, and the next start or sweep tries again."""
    try:
        yield
    except HOST_TROUBLE as error:
        log.get().error("host trouble", doing=doing, why=error)


class _NoJob(Job):
    """A child that could not be made."""

    def __init__(self, loop: Loop, name: str) -> None:
        self.pid = 0
        self.name = self.doing = name
        self.since = loop.time()
        self.finished = self.killed = True
        self.describe = None

    def kill(self, why: RemoteError | None = None) -> None:
        """There is nothing to kill."""


class Children(Jobs):
    """Jobs of which one that cannot be started has failed, like one that did and died."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self._own_loop = loop

    def start(
        self,
        function: Callable[..., Any],
        *args: Any,
        on_done: Callable[[Any], object],
        timeout: float | None = None,
        fds: Iterable[int] = (),
        name: str = "",
    ) -> Job:
        """As Jobs.start, but never raises: the outcome says what is wrong."""
        try:
            return super().start(function, *args, on_done=on_done, timeout=timeout, fds=fds, name=name)
        except OSError as error:
            failure = refusal(error, "no child process")
            self._own_loop.call_soon(lambda: on_done(failure))
            return _NoJob(self._own_loop, name)
