"""Runs in: the monitor.

Calls of the OCI runtime: its command line, a process per call, and the sentence with which it failed.
The runtime's own log goes into an anonymous file, so that its words never mix with the container's output.
No descriptor of a directory is ever handed down: a runtime that leaks one opens the host to the container.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from ipc.errors import Code, RemoteError
from ipc.loop import Loop
from ipc.messages.monitor import Create
from workers.monitor.reaper import Reaper
from workers.monitor.records import StateRecord
from workers.monitor.sealed import Sealed

LOG_FD = 3  # the runtime's log, in the runtime
FIRST_EXTRA_FD = 4
SENTENCE_LIMIT = 4096  # bytes
_FREE_FD = 10  # sources of dup2 lie above its targets
_KEPT = ("PATH", "LANG", "TMPDIR", "XDG_RUNTIME_DIR", "DBUS_SYSTEM_BUS_ADDRESS")
_DEFAULTED = [
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
]
_FAULTS_OF_THE_REQUEST = (
    "executable file",
    "open executable",
    "exec: ",
    "exec format error",
    "no such file or directory",
    "permission denied",
    "unable to find user",
    "not a directory",
)


@dataclass(frozen=True)
class Runtime:
    """One OCI runtime as the request names it."""

    path: str
    root: str
    args: Sequence[str] = ()
    systemd_cgroup: bool = False

    def argv(self, *command: str) -> list[str]:
        """Return the command line of a call."""
        return [
            self.path,
            "--root",
            self.root,
            "--log",
            f"/proc/self/fd/{LOG_FD}",
            "--log-format",
            "json",
            *self.args,
            *(("--systemd-cgroup",) if self.systemd_cgroup else ()),
            *command,
        ]


def runtime_of(named: StateRecord | Create) -> Runtime:
    """Return the OCI runtime of a container, as its request or its record names it."""
    return Runtime(named.runtime_path, named.runtime_root, tuple(named.runtime_args), named.systemd_cgroup)


@dataclass(frozen=True)
class Outcome:
    """How a call ended. `sentence` is the runtime's own last error, "" if it has none."""

    code: int
    sentence: str = ""
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        return self.code == 0 and not self.timed_out

    def error(self, what: str) -> RemoteError:
        """Return the failure for whoever asked for `what`."""
        if self.timed_out:
            return RemoteError(Code.DEADLINE_EXCEEDED, f"{what}: the OCI runtime did not end in time")
        if not self.sentence:
            return RemoteError(Code.FAILED_PRECONDITION, f"{what}: the OCI runtime ended with {self.code}")
        return RemoteError(classify(self.sentence), f"{what}: {self.sentence}")


def classify(sentence: str) -> Code:
    """Tell a fault of the request (no such command, no such user) from one of the node or the moment."""
    lowered = sentence.lower()
    if any(fault in lowered for fault in _FAULTS_OF_THE_REQUEST):
        return Code.INVALID_ARGUMENT
    return Code.FAILED_PRECONDITION


def start_exit_code(sentence: str) -> int:
    """Return what a shell would: 127 for a command that is not there, 126 for one that will not run."""
    lowered = sentence.lower()
    if "not found" in lowered or "no such file" in lowered:
        return 127
    return 126 if "permission denied" in lowered or "not permitted" in lowered else 128


def last_error(log: bytes) -> str:
    """Return the last error in a runtime's log: JSON lines (crun, runc), else its last words."""
    plain = ""
    for line in reversed(log.splitlines()):
        try:
            entry = msgspec.json.decode(line)
        except msgspec.DecodeError:
            plain = plain or line.decode("utf-8", "replace").strip()
            continue
        if isinstance(entry, dict) and entry.get("level") in ("error", "fatal", "panic"):
            return str(entry.get("msg", ""))
    return plain


class OomScore:
    """Keeps this process from the OOM killer where the kernel allows it; its children are not kept.

    Lowering needs CAP_SYS_RESOURCE. A child inherits the score at its fork, so it is raised around that.
    """

    LOW = b"-999"

    def __init__(self, path: str = "/proc/self/oom_score_adj", normal: int | None = None) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        if normal is None:
            with open(path, "rb") as file:
                normal = max(0, int(file.read()))
        self.normal = normal  # what children get; a monitor that was forked low is told it
        self._normal = b"%d" % normal
        self.lowered = self._set(self.LOW)

    def close(self) -> None:
        """Leave the score as it is."""
        os.close(self._fd)

    def _set(self, value: bytes) -> bool:
        try:
            os.pwrite(self._fd, value, 0)
        except PermissionError:
            return False
        return True

    def __enter__(self) -> None:
        if self.lowered:
            self._set(self._normal)

    def __exit__(self, *_exception: object) -> None:
        if self.lowered:
            self._set(self.LOW)


def environment(source: Mapping[str, str]) -> dict[str, str]:
    """Return what a runtime gets of our environment: nothing of systemd's sockets and watchdogs."""
    return {"PATH": os.defpath, **{name: source[name] for name in _KEPT if name in source}}


@dataclass
class Streams:
    """Descriptors that a runtime call gets as 0, 1, 2 and from FIRST_EXTRA_FD on; None is /dev/null, and
    for the outputs the runtime's log."""

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    extra: Sequence[int] = field(default_factory=tuple)


class Launcher:
    """Starts runtime calls. One per process; `normal_score` as OomScore has it; `given` is what
    `environment` returns."""

    def __init__(
        self,
        loop: Loop,
        reaper: Reaper,
        normal_score: int | None = None,
        sealed: Sealed | None = None,
        given: Mapping[str, str] | None = None,
    ) -> None:
        self.loop = loop
        self.reaper = reaper
        self._oom = OomScore(normal=normal_score)
        self._null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._environment = environment(os.environ) if given is None else given
        self._sealed = sealed or Sealed()

    def call(
        self,
        argv: list[str],
        done: Callable[[Outcome], object],
        *,
        timeout: float,
        streams: Streams | None = None,
    ) -> Invocation:
        """Run a runtime call; `done` is called once, later. Raises RemoteError if it cannot be started."""
        log_fd = _log_file()
        try:
            pid = self._spawn(argv, self._descriptors(streams or Streams(), log_fd))
        except OSError as error:
            os.close(log_fd)
            raise RemoteError(Code.FAILED_PRECONDITION, f"cannot run {argv[0]}: {error.strerror}") from error
        return Invocation(self, pid, log_fd, timeout, done)

    def _descriptors(self, streams: Streams, log_fd: int) -> list[int]:
        """Return what becomes 0, 1, 2, ... of the call."""
        return [
            self._null_fd if streams.stdin is None else streams.stdin,
            log_fd if streams.stdout is None else streams.stdout,
            log_fd if streams.stderr is None else streams.stderr,
            log_fd,
            *streams.extra,
        ]

    def _spawn(self, argv: list[str], wanted: Sequence[int]) -> int:
        # Through copies above all targets, so that no dup2 overwrites the source of another.
        copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FREE_FD) for fd in wanted]
        try:
            with self._oom:
                return os.posix_spawn(
                    self._sealed.path(argv[0]),
                    argv,
                    self._environment,
                    file_actions=[(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(copies)],
                    setpgroup=0,
                    setsigmask=[],
                    setsigdef=_DEFAULTED,
                )
        finally:
            for fd in copies:
                os.close(fd)


class Invocation:
    """A runtime call under way. Its whole process group is killed when its time is over."""

    def __init__(
        self, launcher: Launcher, pid: int, log_fd: int, timeout: float, done: Callable[[Outcome], object]
    ) -> None:
        self.pid = pid
        self._log_fd = log_fd
        self._done = done
        self._timed_out = False
        self._timer = launcher.loop.call_later(timeout, self._expired)
        launcher.reaper.claim(pid, self._ended)

    def _expired(self) -> None:
        self._timed_out = True
        self.kill()

    def kill(self) -> None:
        """SIGKILL the call and what it started; `done` is told as of any end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _ended(self, code: int) -> None:
        self._timer.cancel()
        log = os.pread(self._log_fd, os.fstat(self._log_fd).st_size, 0)[-SENTENCE_LIMIT:]
        os.close(self._log_fd)
        # An error that the runtime logged and survived is no failure.
        sentence = last_error(log) if code else ""
        self._done(Outcome(code, sentence, self._timed_out))


def _log_file() -> int:
    fd = os.memfd_create("runtime-log", os.MFD_CLOEXEC)
    # The runtime opens it anew for its log while it also stands as its stderr: both must append.
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    return fd


def read_pid(path: str) -> int:
    """Return the pid in a runtime's pid file. Raises RemoteError if there is none."""
    try:
        with open(path, "rb") as file:
            return int(file.read(32))
    except (OSError, ValueError) as error:
        raise RemoteError(Code.FAILED_PRECONDITION, f"the OCI runtime left no pid: {error}") from error
