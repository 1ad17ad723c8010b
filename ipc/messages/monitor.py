"""Runs in: every process (types only). Owner: the monitor of one container, at monitors/<id>/ctl.sock.

ADDITIVE ONLY: a monitor of the last release must understand the `cri` of the next.
"""

from __future__ import annotations

from . import Body, Empty, Request, request


class ExitRecord(Body):
    """How a container ended; also the content (JSON) of `monitors/<id>/exit.json`. Times: wall clock, ns."""

    container_id: str
    exit_code: int  # 128+n for signal n, -1 unknown
    signal: int = 0
    oom_killed: bool = False
    started_at_ns: int = 0  # 0: never started
    finished_at_ns: int = 0
    reason: str = ""  # "OOMKilled", "Completed", "Error", or "" to be derived
    message: str = ""
    log_bytes_unsure: int = 0  # output that may be missing in the log, at most: a monitor died meanwhile


class Created(Body):
    pid: int


@request("monitor.container.create", reply=Created, idempotent=True)
class Create(Request[Created]):
    """Write the bundle, make the log directory and file, run the OCI runtime's `create`.

    `spec` is the OCI config.json as bytes; the monitor writes it to `monitors/<id>/bundle/config.json`.
    Sent again after success it returns the same pid. INVALID_ARGUMENT / FAILED_PRECONDITION carry the
    runtime's own sentence; after a failure the monitor cleans up and exits. `keep` is written to
    `monitors/<id>/cri.json` before the runtime is asked: of it `cri` can make its state again.
    """

    spec: bytes
    runtime_name: str
    runtime_path: str
    runtime_root: str  # --root of the OCI runtime
    log_path: str = ""  # "" = no log file
    terminal: bool = False
    stdin: bool = False
    stdin_once: bool = False
    systemd_cgroup: bool = False
    cgroup_path: str = ""  # of the container, relative to each hierarchy; for OOM and cleanup
    cgroup_version: int = 2
    timeout_ms: int = 240_000
    runtime_args: list[str] = []
    stdio_uid: int = 0  # owner of the pipes of its stdio and of its execs', in the host's ids: the process
    stdio_gid: int = 0  # must be able to open /dev/stdout
    keep: bytes = b""  # the caller's own words, kept unread; empty: no file


class Started(Body):
    started_at_ns: int


@request("monitor.container.start", reply=Started, idempotent=True)
class Start(Request[Started]):
    """Run the OCI runtime's `start`. FAILED_PRECONDITION if the container is not CREATED (or running: then
    the first start's answer is returned)."""

    timeout_ms: int = 60_000


class Stopped(Body):
    exit: ExitRecord


@request("monitor.container.stop", reply=Stopped, idempotent=True)
class Stop(Request[Stopped]):
    """Send `signal`, after `grace_ms` SIGKILL until it is gone; answers when the exit record is on disk.

    The monitor goes on with it when the caller is gone. A later call with a shorter grace shortens the
    wait; a longer one does not lengthen it. A container that was created and never started is deleted.
    """

    signal: str = "SIGTERM"
    grace_ms: int = 10_000


@request("monitor.container.wait", reply=Stopped, idempotent=True)
class Wait(Request[Stopped]):
    """Answers when the container has ended and its exit record is on disk; no deadline of its own."""


@request("monitor.container.delete", idempotent=True)
class Delete(Request[Empty]):
    """Kill what runs, delete the runtime's state, write the record; the monitor exits after the answer."""


@request("monitor.container.update", idempotent=True)
class Update(Request[Empty]):
    """Change the limits of a created or running container: the OCI runtime's `update`, and its OOM score.

    `resources` is the whole of the OCI linux.resources but for devices; `spec` and `keep` replace what
    `create` brought. FAILED_PRECONDITION in another state, for a memory limit below what is in use, and with
    the runtime's own sentence; then nothing is recorded.
    """

    resources: bytes
    spec: bytes
    keep: bytes = b""
    oom_score_adj: int | None = None  # None: as it is
    timeout_ms: int = 60_000
    unit_properties: dict[str, int] = {}  # of the container's systemd unit, lest that one undoes the change


class State(Body):
    container_id: str
    status: str  # "new", "created", "running", "stopped"
    pid: int = 0
    monitor_pid: int = 0
    created_at_ns: int = 0
    started_at_ns: int = 0
    exit: ExitRecord | None = None
    log_bytes: int = 0
    log_bytes_dropped: int = 0
    log_bytes_unsure: int = 0  # as ExitRecord has it
    execs: int = 0
    starting: bool = False  # the runtime's `start` is on its way; `status` is still "created"


@request("monitor.container.state", reply=State, idempotent=True)
class StateGet(Request[State]):
    """What the monitor knows."""


@request("monitor.log.reopen", idempotent=True)
class LogReopen(Request[Empty]):
    """Close and reopen (create if gone) the log file at its path, between two records."""


class ExecDone(Body):
    exit_code: int
    stdout: bytes = b""
    stderr: bytes = b""
    timed_out: bool = False
    stdout_dropped: int = 0  # bytes over the limit
    stderr_dropped: int = 0


@request("monitor.exec.sync", reply=ExecDone, idempotent=False)
class ExecSync(Request[ExecDone]):
    """Run a process in the container and collect its output.

    `process` is the OCI process object (JSON). `timeout_ms` 0 = none; when it ends the whole exec is
    killed and `timed_out` is set. If the caller cancels or goes away, the exec is killed too.
    """

    process: bytes
    timeout_ms: int = 0
    limit: int = 16 * 1024 * 1024  # bytes kept of each stream


class SessionOpened(Body):
    """The reply's descriptors, named in their order. The receiver owns them and may make them non-blocking.

    `stdin` takes what the client sends, `stdout` and `stderr` give what goes to it: pipes or sockets.
    `terminal` is the master of a pty, or stands for one: its size is set there, and for what has no
    descriptor of its own it is also stdin and stdout. `status` is the read end of a pipe into which the other
    end's holder writes one SessionEnd (msgpack) when the session is over; when the receiver closes it, the
    client is gone and an exec is to end.
    """

    fds: list[str]


class SessionEnd(Body):
    """What comes through the status pipe; end of file without it means that the monitor is gone."""

    exit_code: int = 0  # of an exec; 128+n for signal n
    error: str = ""  # it could not be started, or was ended: a sentence
    lagged: bool = False  # ended because the client did not keep up with the output


@request("monitor.exec.open", reply=SessionOpened, idempotent=False)
class ExecOpen(Request[SessionOpened]):
    """Run a process in the container with these streams, for as long as the reader of `status` stays.

    With `tty` it has a pty (`terminal`), else a pipe for each stream that is asked for. A command that cannot
    be started is told through `status`. FAILED_PRECONDITION if the container does not run.
    """

    process: bytes  # the OCI process object (JSON)
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False


@request("monitor.attach.open", reply=SessionOpened, idempotent=False)
class AttachOpen(Request[SessionOpened]):
    """Join the container's own streams. Any number may; each gets what comes from now on.

    A reader that does not keep up is let go with an error; nobody waits for it. A container with a terminal
    answers `terminal`, others the streams that are asked for and exist. `stdin` closed by a client whose
    container has stdin_once is closed for good. FAILED_PRECONDITION before `create` and after the end.
    """

    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
