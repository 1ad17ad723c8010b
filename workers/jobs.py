"""Runs in: storage, network (and forks from them).

Short-lived children for what can take long or touches a path that a user or an image named: the worker's
loop never blocks, and a hung mount costs one child. A child dies with its worker, leads a process group of
its own that is killed whole, keeps only the descriptors it was given, and leaves through os._exit.

A worker that is at work may keep a spare child: forked after an answer, while nobody waits, and told the next
job when there is one. A fork costs 2 ms of a request, most of them in pages that both sides then copy; and it
costs 4 MB while it lives, so a worker that has nothing to do has no spare child.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ipc import kernel, log
from ipc.errors import Code, RemoteError
from ipc.loop import Loop, Timer
from ipc.messages import Body
from ipc.serve import Call
from workers import jobs_spare

Outcome = Any  # what the function returned (msgpack types), or RemoteError
RESULT_LIMIT = 64 * 1024 * 1024
SPARE_SECONDS = 30.0
SPARE = "spare"  # comm of a child that waits for a job
_STEP_LIMIT, _TEXT_LIMIT = 16384, 2048  # bytes of a step's answer, characters of its error


class Job:
    """One child at work. `on_done(outcome)` is called once, when it has ended and was reaped."""

    def __init__(
        self, loop: Loop, pid: int, result_fd: int, name: str, on_done: Callable[[Outcome], object]
    ) -> None:
        self.pid = pid
        self._loop = loop
        self._fd = result_fd
        self._data = bytearray()
        self._code: int | None = None
        self._why: RemoteError | None = None
        self.begin(name, on_done)
        os.set_blocking(result_fd, False)
        loop.add_reader(result_fd, self._readable)
        loop.watch_child(pid, self._ended)

    def begin(self, name: str, on_done: Callable[[Outcome], object]) -> None:
        """It is this job from now on."""
        self.name = self.doing = name
        self._on_done = on_done

    @property
    def finished(self) -> bool:
        return self._code is not None

    def kill(self, why: RemoteError | None = None) -> None:
        """SIGKILL the child and its process group; `why` becomes the outcome."""
        if not self.finished:
            self._why = self._why or why
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._fd, 65536):
                self._data += piece
                if len(self._data) > RESULT_LIMIT:
                    self.kill(RemoteError(Code.RESOURCE_EXHAUSTED, f"{self.name}: result too large"))
            self._loop.remove_reader(self._fd)

    def _ended(self, code: int) -> None:
        self._readable()
        self._code = code
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what the child started and left
        self._on_done(self._outcome(code))

    def _outcome(self, code: int) -> Outcome:
        if self._why is not None:
            return self._why
        try:
            ok, value = msgspec.msgpack.decode(bytes(self._data))
        except msgspec.DecodeError:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            return RemoteError(Code.UNAVAILABLE, f"{self.name}: its process {how}")
        if ok:
            return value
        return RemoteError(Code(value[0]), value[1], reason=value[2])


@dataclass
class _Spare:
    """A child without a job yet. It has `shared` since its fork; closing `sock` ends it."""

    job: Job
    sock: socket.socket
    shared: object
    timer: Timer


class Jobs:
    """All children of one worker."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.running: set[Job] = set()
        self._spare: _Spare | None = None
        self._make_shared: Callable[[], object] | None = None
        self._spare_seconds = 0.0

    # -- the spare child ------------------------------------------------------------------------------

    def keep_spare(
        self, make_shared: Callable[[], object] = lambda: None, *, seconds: float = SPARE_SECONDS
    ) -> None:
        """Keep a spare child for so long after each job; `make_shared` makes, before its fork, what it is to
        share with us."""
        self._make_shared = make_shared
        self._spare_seconds = seconds

    def renew_spare(self) -> None:
        """What children inherit has changed (settings): end the spare child and fork another."""
        if self._spare is not None:
            self._drop_spare()
            self._loop.call_soon(self._fork_spare)

    def _drop_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.sock.close()
            spare.timer.cancel()

    @property
    def shared(self) -> object:
        """What the spare child shares with us, None without one: pass it on as an argument."""
        return None if self._spare is None else self._spare.shared

    def _fork_spare(self) -> None:
        if self._make_shared is None or self._spare is not None:
            return
        shared = self._make_shared()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                job = self._fork(lambda: _wait_for_job(theirs, shared), [theirs.fileno()], "spare child")
            except OSError as error:  # jobs fork by themselves meanwhile
                ours.close()
                log.get().warning("no spare child", why=error)
                return
        timer = self._loop.call_later(self._spare_seconds, self._drop_spare)
        self._spare = _Spare(job, ours, shared, timer)
        job.begin("spare child", lambda _outcome: self._drop_spare_of(job))

    def _drop_spare_of(self, job: Job) -> None:
        """It died while it was waiting; the next job forks, and then there is another."""
        if self._spare is not None and self._spare.job is job:
            self._drop_spare()

    def _tell_spare(self, function: Callable[..., Any], args: Sequence[Any]) -> Job | None:
        """The spare child, told to run the function; None if there is none, or the job cannot be told."""
        if self._spare is None:
            return None
        shared = self._spare.shared
        packet = jobs_spare.tell(function, args, shared)
        if packet is None:
            if shared is not None and any(arg is shared for arg in args):
                self._drop_spare()  # what it shares is the job's now
            return None
        try:
            self._spare.sock.send(packet)
            return self._spare.job
        except OSError:
            return None
        finally:
            self._drop_spare()

    # -- jobs -----------------------------------------------------------------------------------------

    def start(
        self,
        function: Callable[..., Any],
        *args: Any,
        on_done: Callable[[Outcome], object],
        timeout: float | None = None,
        fds: Iterable[int] = (),
        name: str = "",
    ) -> Job:
        """Let a child run `function(*args)`; its value must be made of msgpack types.

        The child keeps `fds` (they stay open in the parent too) and nothing else; a RemoteError it raises
        is the outcome, any other exception is logged with its stack and becomes INTERNAL. After `timeout`
        seconds it is killed and the outcome is DEADLINE_EXCEEDED. Raises OSError if there can be no child.
        """
        title = name or function.__name__.strip("_").replace("_", " ")
        keep = list(fds)
        job = None if keep else self._tell_spare(function, args)
        if job is None:
            job = self._fork(lambda: _result(function, args), keep, title)
        return self._watch(job, title, on_done, timeout)

    def _fork(self, work: Callable[[], bytes], keep: Sequence[int], name: str) -> Job:
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        worker = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            os.close(read_fd)
            os.close(write_fd)
            raise
        if pid == 0:
            _child(self._loop, worker, work, write_fd, keep)
        os.close(write_fd)
        return Job(self._loop, pid, read_fd, name, lambda _outcome: None)

    def _watch(
        self, job: Job, title: str, on_done: Callable[[Outcome], object], timeout: float | None
    ) -> Job:
        def done(outcome: Outcome) -> None:
            self.running.discard(job)
            if timer is not None:
                timer.cancel()
            on_done(outcome)
            self._loop.call_soon(self._fork_spare)  # after the answer

        job.begin(title, done)
        self.running.add(job)
        late = RemoteError(Code.DEADLINE_EXCEEDED, f"{title}: not done after {timeout} s")
        timer = None if timeout is None else self._loop.call_later(timeout, lambda: job.kill(late))
        return job

    def run(
        self,
        call: Call,
        function: Callable[..., Any],
        *args: Any,
        then: Callable[[Outcome], Body],
        timeout: float | None = None,
        fds: Iterable[int] = (),
        name: str = "",
    ) -> Job:
        """Start a child for a call and answer the call with `then(value)`; `then` may raise RemoteError.

        The child is killed when the call is abandoned.
        """

        def done(outcome: Outcome) -> None:
            if isinstance(outcome, RemoteError):
                call.fail(outcome)
                return
            try:
                call.reply(then(outcome))
            except RemoteError as error:
                call.fail(error)

        job = self.start(function, *args, on_done=done, timeout=timeout, fds=fds, name=name)
        call.doing = job.name
        call.on_abandon(job.kill)
        return job

    def kill_all(self) -> None:
        """SIGKILL every child; there are no more."""
        self._make_shared = None
        self._drop_spare()
        for job in list(self.running):
            job.kill()


def _wait_for_job(sock: socket.socket, shared: object) -> bytes:
    """In a spare child: run what it is told to; nothing if it is not wanted any more."""
    _show(SPARE)
    packet = sock.recv(jobs_spare.LIMIT)
    if not packet:
        return b""
    function, args = jobs_spare.told(packet, shared)
    _show(function.__name__)
    return _result(function, args)


def _show(name: str) -> None:
    """Show in `ps -o comm` what this child is."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)


def _child(
    loop: Loop,
    worker: int,
    work: Callable[[], bytes],
    result_fd: int,
    keep: Iterable[int],
) -> None:
    status = 1
    try:
        gc.freeze()
        _become_child(loop, worker, [*keep, result_fd])
        data = work()
        while data:
            data = data[os.write(result_fd, data) :]
        status = 0
    except BaseException as error:  # noqa: BLE001 - a child never runs its parent's clean-up
        log.get().bug("job failed", error)
    finally:
        os._exit(status)


class Beside:
    """A process beside this one (a child, mostly) that takes prepared steps, each when it is told to.

    For what only another process can do: a user namespace that is made is entered for good. It inherits
    everything, executes nothing, and ends with `close` or with its parent.
    """

    def __init__(self, *steps: Callable[[], object]) -> None:
        """Fork. Raises OSError."""
        self._mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _beside(steps, theirs, self._mine, parent)
        except OSError:
            self._mine.close()
            raise
        finally:
            theirs.close()

    def step(self) -> None:
        """Let it take its next step and wait for that. Raises the step's RemoteError or OSError."""
        self._mine.send(b"\n")
        answer = self._mine.recv(_STEP_LIMIT)
        if not answer:
            raise RemoteError(Code.UNAVAILABLE, "the process beside this one has ended")
        number, value = msgspec.msgpack.decode(answer)
        if number:
            raise OSError(number, value)
        if value is not None:
            raise RemoteError(Code(value[0]), value[1])

    def close(self) -> None:
        """End it."""
        self._mine.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _beside(
    steps: Sequence[Callable[[], object]], sock: socket.socket, other: socket.socket, parent: int
) -> None:
    """Take the steps: each is asked for by a packet and answered by [errno, error]."""
    status = 1
    try:
        kernel.die_with_parent(signal.SIGKILL, parent)
        other.close()
        for step in steps:
            if not sock.recv(1):
                break
            sock.send(msgspec.msgpack.encode(_taken(step)))
        sock.recv(1)  # to the end of whoever waits for it
        status = 0
    except BaseException as error:  # noqa: BLE001 - a child never runs its parent's clean-up
        log.get().bug("process beside a job failed", error)
    finally:
        os._exit(status)


def _taken(step: Callable[[], object]) -> list[Any]:
    try:
        step()
    except RemoteError as error:
        return [0, [error.code.value, error.text[:_TEXT_LIMIT]]]
    except OSError as error:
        return [error.errno or errno.EIO, (error.strerror or str(error))[:_TEXT_LIMIT]]
    return [0, None]


def _become_child(loop: Loop, worker: int, keep: Sequence[int]) -> None:
    kernel.die_with_parent(signal.SIGKILL, worker)
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    loop.abandon()
    close_other_fds({0, 1, 2, log.get().fileno(), *keep})


def close_other_fds(keep: Iterable[int]) -> None:
    """Close every descriptor but `keep` (negative numbers are ignored)."""
    low = 0
    for fd in sorted(fd for fd in set(keep) if fd >= 0):
        if low < fd:
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 20) if low < 1 << 20 else None


def _result(function: Callable[..., Any], args: Sequence[Any]) -> bytes:
    try:
        return msgspec.msgpack.encode([True, function(*args)])
    except RemoteError as error:
        return msgspec.msgpack.encode([False, [error.code.value, error.text, error.reason]])
    except Exception as error:  # noqa: BLE001 - a bug of ours, or a host that fails us: told with its stack
        log.get().bug("job failed", error, job=function.__name__)
        text = f"{function.__name__.strip('_').replace('_', ' ')}: {error}"
        return msgspec.msgpack.encode([False, [Code.INTERNAL.value, text, ""]])
    finally:
        sys.stdout.flush()
