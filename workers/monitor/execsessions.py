"""Runs in: the monitor, in a hand.

A streaming exec: a process in the container whose pipes, or whose terminal's master, belong to the caller
from the start. What is kept here is the process, to say how it ended, and the other end of a status pipe:
when nobody reads that any more the client is gone, and the process and its family with him.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import msgspec

from ipc.errors import RemoteError
from ipc.fds import close_all
from ipc.loop import Loop
from ipc.messages.monitor import ExecOpen, SessionEnd, SessionOpened
from workers.monitor.console import ConsoleSocket
from workers.monitor.process import KILLED, Process, Surroundings, pipe_name
from workers.monitor.runtime import Streams
from workers.monitor.stdio import make_pipe

#: Answers a request with descriptors, which it owns; called once.
Opened = Callable[[SessionOpened, list[int]], object]
_CONSOLES = 10_000  # names; the path must be no longer than that of ctl.sock


class Status:
    """The writing end of a session's status pipe. `gone` is called when nobody reads it any more."""

    def __init__(self, loop: Loop, gone: Callable[[], object]) -> None:
        self._loop = loop
        self.reader, self._fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        loop.add_reader(self._fd, gone)  # an error is all that can be read here

    def tell(self, end: SessionEnd) -> None:
        """Say how it ended, and close. Nothing if that was done."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # nobody wants to know
                os.write(self._fd, msgspec.msgpack.encode(end))
            self.close()

    def close(self) -> None:
        """Close without a word. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.remove_reader(fd)
            os.close(fd)


class ExecSession:
    """One streaming exec. `over` is called once, when nothing of it is left here."""

    def __init__(
        self,
        loop: Loop,
        container: Surroundings,
        number: int,
        request: ExecOpen,
        *,
        opened: Opened,
        over: Callable[[], object],
    ) -> None:
        self._container = container
        self._opened = opened
        self._over = over
        self._theirs: dict[str, int] = {}  # what the caller gets
        self._console: ConsoleSocket | None = None
        self._process = Process(container, number, ended=self._ended, failed=self._failed)
        self._status = Status(loop, self._client_gone)
        self._theirs["status"] = self._status.reader
        try:
            if request.tty:
                path = os.path.join(container.directory, f"x{number % _CONSOLES}.s")
                self._console = ConsoleSocket(loop, path, self._terminal)
                self._process.start(request.process, Streams(), path)
            else:
                self._with_pipes(request)
        except BaseException:
            self._drop()
            raise

    def _with_pipes(self, request: ExecOpen) -> None:
        wanted = {"stdin": request.stdin, "stdout": request.stdout, "stderr": request.stderr}
        null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        mine = {name: self._pipe(name) if asked else null_fd for name, asked in wanted.items()}
        try:
            self._process.start(request.process, Streams(mine["stdin"], mine["stdout"], mine["stderr"]))
        finally:
            close_all({null_fd, *mine.values()})
        self._answer()

    def _pipe(self, name: str) -> int:
        """Make a pipe; return the process's end of it."""
        owner = self._container.stdio_owner
        if name == "stdin":
            end, self._theirs[name] = os.pipe2(os.O_CLOEXEC)
            os.fchown(end, *owner)
        else:
            self._theirs[name], end = make_pipe(owner=owner)
        self._process.pipes.add(pipe_name(end))
        return end

    def _terminal(self, fd: int) -> None:
        self._console = None
        self._theirs["terminal"] = fd
        self._answer()

    def _answer(self) -> None:
        theirs, self._theirs = self._theirs, {}
        if theirs:
            self._opened(SessionOpened(fds=list(theirs)), list(theirs.values()))

    def _client_gone(self) -> None:
        self._status.close()
        self.kill()

    def kill(self) -> None:
        """End the process and its family."""
        self._process.kill()

    def _ended(self, code: int) -> None:
        self._finish(SessionEnd(exit_code=code))

    def _failed(self, error: RemoteError) -> None:
        self._finish(SessionEnd(error=error.text))

    def container_ended(self) -> None:
        """The container is gone and the process with it."""
        self._finish(SessionEnd(exit_code=KILLED))

    def _finish(self, end: SessionEnd) -> None:
        self._status.tell(end)
        if self._console is not None:
            self._console.receive_now()  # it may have ended before the loop's turn
        if self._console is not None:
            self._console.close()
            self._console = None
        self._answer()  # a terminal that never came: the status says why
        over, self._over = self._over, _nothing
        over()

    def _drop(self) -> None:
        self._status.close()
        if self._console is not None:
            self._console.close()
        close_all(self._theirs.values())


def _nothing() -> None:
    """Told already."""
