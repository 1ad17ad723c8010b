"""Runs in: children of network.

One run of one CNI plugin: the program found in the plugin directories, its environment, configuration on
standard input, everything it says bounded, an end by a deadline. The plugin leads a process group that is
killed whole, and holds the operation's lock: should this process be killed, whoever takes the pod up next
finds and kills it by that (records.PodLock). A death signal would need Python code between fork and exec,
which costs a copy of this process's page tables for each plugin; a spawn shares them until the exec.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workers.network.results import PluginError, PluginTimeout

STDOUT_LIMIT = 4 * 1024 * 1024
STDERR_LIMIT = 16 * 1024  # the tail is kept
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Variables of ours that mean something else to a plugin.
_NOT_INHERITED = ("CNI_", "NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "PYTHON")
_DEFAULTED = [signal.SIGPIPE, signal.SIGXFSZ]  # Python ignores them


@dataclass(frozen=True)
class Output:
    """What a plugin left: exit code (-N for signal N) and its words."""

    code: int
    stdout: bytes
    stderr: bytes


@dataclass
class _Process:
    """A running plugin and the read ends of its pipes; `code` is known when it was reaped."""

    pid: int
    stdout_fd: int
    stderr_fd: int
    code: int | None = None

    def wait(self) -> int:
        """Reap it."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


def find(kind: str, directories: Sequence[str]) -> str:
    """Return the path of the plugin's program. Raises PluginError naming where it was looked for."""
    for directory in directories:
        path = os.path.join(directory, kind)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise PluginError(f"there is no such program in {', '.join(directories)}")


def run(
    path: str, environment: Mapping[str, str], config: bytes, *, deadline: float, lock_fd: int = -1
) -> Output:
    """Run a plugin to its end. `deadline` is on the monotonic clock.

    Raises PluginTimeout when it was killed for that, PluginError when it cannot be started or says too much.
    """
    process = _start(path, environment, config, lock_fd)
    try:
        return _Listener(process).listen(deadline)
    finally:
        _end(process)


def _start(path: str, environment: Mapping[str, str], config: bytes, lock_fd: int) -> _Process:
    """Start it in the directory that this process stands in, the root."""
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        stdin_fd = _memory_file(config)
        theirs.callback(os.close, stdin_fd)
        ends = [stdin_fd]
        outputs = []
        for _ in ("stdout", "stderr"):
            read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
            ours.callback(os.close, read_fd)
            theirs.callback(os.close, write_fd)
            os.set_blocking(read_fd, False)
            ends.append(write_fd)
            outputs.append(read_fd)
        pid = _spawn(path, environment, ends, lock_fd)
        ours.pop_all()
    return _Process(pid, *outputs)


def _spawn(path: str, environment: Mapping[str, str], ends: Sequence[int], lock_fd: int) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(ends)]
    if lock_fd >= 0:
        actions.append((os.POSIX_SPAWN_DUP2, lock_fd, lock_fd))  # onto itself: kept open
    try:
        return os.posix_spawn(
            path,
            [path],
            {**_inherited(), **environment},
            file_actions=actions,
            setpgroup=0,
            setsigmask=[],
            setsigdef=_DEFAULTED,
        )
    except OSError as error:
        raise PluginError(f"{path} cannot be started: {error.strerror}") from None


def _memory_file(data: bytes) -> int:
    # No pipe: a plugin that never reads its configuration then blocks nobody.
    fd = os.memfd_create("cni-config", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _inherited() -> dict[str, str]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_INHERITED)}
    return {"PATH": _PATH, **ours}


def _end(process: _Process) -> None:
    if process.code is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for fd in (process.stdout_fd, process.stderr_fd):
        os.close(fd)


class _Listener:
    """Collects what a plugin says until it ends; does not wait for others that hold its pipes."""

    def __init__(self, process: _Process) -> None:
        self._process = process
        self._stdout, self._stderr = process.stdout_fd, process.stderr_fd
        self._said = {self._stdout: bytearray(), self._stderr: bytearray()}

    def listen(self, deadline: float) -> Output:
        """Return the output. Raises PluginTimeout, PluginError."""
        pidfd = os.pidfd_open(self._process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for fd in (pidfd, *self._said):
                    selector.register(fd, selectors.EVENT_READ)
                self._until_exit(selector, pidfd, deadline)
        finally:
            os.close(pidfd)
        code = self._process.wait()
        for fd in self._said:
            self._read(fd)
        return Output(code, bytes(self._said[self._stdout]), bytes(self._said[self._stderr]))

    def _until_exit(self, selector: selectors.BaseSelector, pidfd: int, deadline: float) -> None:
        while True:
            left = deadline - time.monotonic()
            ready = [key.fd for key, _events in selector.select(max(0.0, left))]
            for fd in set(ready) - {pidfd}:
                if self._read(fd):
                    selector.unregister(fd)
            if pidfd in ready:
                return
            if left <= 0:
                raise PluginTimeout("it did not end in time and was killed" + self._last_words())

    def _read(self, fd: int) -> bool:
        """Take what there is; return whether that was the end."""
        said = self._said[fd]
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(fd, 65536):
                said += piece
                if fd == self._stderr:
                    del said[:-STDERR_LIMIT]
                elif len(said) > STDOUT_LIMIT:
                    raise PluginError(f"it printed more than {STDOUT_LIMIT} bytes")
            return True
        return False

    def _last_words(self) -> str:
        text = " ".join(self._said[self._stderr][-512:].decode("utf-8", "replace").split())
        return f"; its last words: {text}" if text else ""
