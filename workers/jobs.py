"""Runs in: storage, network (and forks from them).

Children for what can take long or touches a path that a user or an image named: the worker's loop never
blocks, and a hung mount costs one child. A child dies with its worker, leads a process group of its own that
is killed whole, keeps only the descriptors it was given, and leaves through os._exit.

A fork costs 2 ms of a request, as much again when the child ends, and 4 MB while it lives. So a child whose
job ended well may stay: it is told the next one, and ends when there is none for a while. What cannot be
told (descriptors, functions inside functions) gets a child of its own, and so does whoever comes while all
are busy. A child that refused a job, or stands elsewhere after it than before (namespaces, directory), does
not stay.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from ipc import kernel, log
from ipc.errors import Code, RemoteError
from ipc.loop import Loop, Timer
from ipc.messages import Body
from ipc.messages.supervisor import JobState
from ipc.serve import Call
from ipc.whereabouts import whereabouts
from workers import jobs_told

Outcome = Any  # what the function returned (msgpack types), or RemoteError
RESULT_LIMIT = 64 * 1024 * 1024
STAY_SECONDS = 5.0  # that a child without a job stays
MOST_IDLE = 2  # children that stay at once
LET_GO_SECONDS = 2.0  # after SIGKILL; who waits in the kernel for a dead server does not end of it
MOST_JOBS = 200  # of one child: what it might lose each time is bounded
SPARE = "spare"  # comm of a child that waits for a job
_STEP_LIMIT, _TEXT_LIMIT = 16384, 2048  # bytes of a step's answer, characters of its error
#: Before a result: its length, and whether the child stays.
_HEAD = struct.Struct("<I?")
_KINDS = ("mnt", "net", "ipc", "uts", "user", "pid_for_children")  # of namespaces


class Job:
    """One piece of work in a child. `on_done(outcome)` is called once: when the child told it and stays, or
    else when it has ended and was reaped; or when it was killed and does not end, for nobody waits for the
    kernel. `describe` tells what it is at, and since when, if there is more to tell than its name."""

    def __init__(self, loop: Loop, child: _Child, name: str, on_done: Callable[[Outcome], object]) -> None:
        self.pid = child.pid
        self.name = self.doing = name
        self.since = loop.time()  # that it is at what it is doing
        self.finished = self.killed = False
        self.describe: Callable[[], tuple[str, float]] | None = None
        self._loop = loop
        self._child = child
        self._on_done = on_done
        self._why: RemoteError | None = None
        child.job = self

    def kill(self, why: RemoteError | None = None) -> None:
        """SIGKILL the child and its process group; `why` becomes the outcome."""
        if self.finished:
            return
        self._why = self._why or why
        self._child.kill()
        if not self.killed:
            self.killed = True
            self._loop.call_later(LET_GO_SECONDS, self._let_go)

    def _let_go(self) -> None:
        """Not even SIGKILL has ended it. It will never come back to our code, so what it held is free."""
        if not self.finished:
            at, where = self.state().doing, whereabouts(self.pid)
            log.get().error("a child hangs in the kernel", job=self.name, at=at, child=self.pid, where=where)
            self._child.job = None
            self.end(RemoteError(Code.UNAVAILABLE, f"{self.name}: its process hangs in the kernel"))

    def end(self, outcome: Outcome) -> None:
        """It has this outcome (the child's word)."""
        self.finished = True
        self._on_done(self._why or outcome)

    def settle(self) -> None:
        """What it was at is what it will always have been at."""
        if self.describe is not None:
            self.doing, self.since = self.describe()
            self.describe = None

    def state(self) -> JobState:
        """What it is at, and for how long."""
        if self.describe is not None:
            self.doing, self.since = self.describe()
        age = int((self._loop.time() - self.since) * 1000)
        return JobState(name=self.name, pid=self.pid, doing=self.doing, age_ms=age, killed=self.killed)


class _Child:
    """A forked process, seen from the worker. With `sock` it can be told jobs, and closing that ends it; it
    has `shared` since its fork. `back` is called when it stays, `gone` when it has ended."""

    def __init__(
        self, loop: Loop, pid: int, result_fd: int, sock: socket.socket | None, shared: object
    ) -> None:
        self.pid = pid
        self.shared = shared
        self.job: Job | None = None
        self.timer: Timer | None = None
        self.back: Callable[[_Child], object] = _Child.dismiss
        self.gone: Callable[[_Child], object] = _Child.dismiss
        self._loop = loop
        self._fd = result_fd
        self._sock = sock
        self._data = bytearray()
        self._killed = self.ended = False
        os.set_blocking(result_fd, False)
        loop.add_reader(result_fd, self._readable)
        loop.watch_child(pid, self._ended)

    def tell(self, packet: bytes) -> bool:
        """Tell it a job; False if it has ended."""
        assert self._sock is not None
        if self.timer is not None:
            self.timer.cancel()
        try:
            self._sock.send(packet)
        except OSError:
            return False
        return True

    def dismiss(self) -> None:
        """It is to end when it has no job."""
        if self.timer is not None:
            self.timer.cancel()
        if self._sock is not None:
            self._sock.close()

    def kill(self) -> None:
        """SIGKILL it and its process group."""
        self._killed = True
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)

    def _readable(self) -> None:
        self._read()
        told = self._told()
        if told is not None and told[1] and self.job is not None and not self._killed:
            job, self.job = self.job, None
            self._data.clear()
            self.back(self)
            job.end(told[0])

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._fd, 65536):
                self._data += piece
                if len(self._data) > RESULT_LIMIT and self.job is not None:
                    name = self.job.name
                    self.job.kill(RemoteError(Code.RESOURCE_EXHAUSTED, f"{name}: result too large"))
            self._loop.remove_reader(self._fd)

    def _told(self) -> tuple[Outcome, bool] | None:
        """The outcome, and whether the child stays; None if it was not told whole."""
        if len(self._data) < _HEAD.size:
            return None
        length, stays = _HEAD.unpack_from(self._data)
        if len(self._data) < _HEAD.size + length:
            return None
        ok, value = msgspec.msgpack.decode(bytes(self._data[_HEAD.size :]))
        return (value if ok else RemoteError(Code(value[0]), value[1], reason=value[2])), stays

    def _ended(self, code: int) -> None:
        self.ended = True
        self._read()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what the child started and left
        self.dismiss()
        self.gone(self)
        job, self.job = self.job, None
        if job is not None:
            told = self._told()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            lost = RemoteError(Code.UNAVAILABLE, f"{job.name}: its process {how}")
            job.end(lost if told is None else told[0])


class Jobs:
    """All children of one worker."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.running: set[Job] = set()
        self.stuck: set[Job] = set()  # killed, let go, and not ended yet
        self._idle: list[_Child] = []  # the last one is told the next job
        self._staying: set[_Child] = set()
        self._make_shared: Callable[[], object] | None = None
        self._stay_seconds = 0.0

    # -- children that stay ---------------------------------------------------------------------------

    def let_stay(
        self, make_shared: Callable[[], object] = lambda: None, *, seconds: float = STAY_SECONDS
    ) -> None:
        """Let children stay for so long after a job; `make_shared` makes, before its fork, what each is to
        share with us."""
        self._make_shared = make_shared
        self._stay_seconds = seconds

    def renew(self) -> None:
        """What children inherit has changed (settings): those that are here end after their jobs."""
        self._idle.clear()
        for child in self._staying:
            child.dismiss()
        self._staying.clear()

    @property
    def shared(self) -> object:
        """What the child that is told the next job shares with us: pass it on as an argument. None if
        children do not stay, or there can be no child."""
        if not self._idle:
            self._fork_staying()
        return self._idle[-1].shared if self._idle else None

    def _fork_staying(self) -> None:
        if self._make_shared is None:
            return
        shared = self._make_shared()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                child = self._fork(lambda fd: _stay(theirs, shared, fd), [theirs.fileno()], ours, shared)
            except OSError as error:  # a job that is not told forks by itself, and tells what that cannot
                ours.close()
                log.get().warning("no child that stays", why=error)
                return
        child.back, child.gone = self._came_back, self._went
        self._staying.add(child)
        self._idle.append(child)

    def _came_back(self, child: _Child) -> None:
        """Its job ended well: it waits for another one, unless enough do, or it is of before a reload."""
        if child not in self._staying:
            return
        if len(self._idle) >= MOST_IDLE:
            self._staying.discard(child)
            child.dismiss()
            return
        self._idle.append(child)
        child.timer = self._loop.call_later(self._stay_seconds, lambda: self._leave(child))

    def _leave(self, child: _Child) -> None:
        self._went(child)
        child.dismiss()

    def _went(self, child: _Child) -> None:
        self._staying.discard(child)
        if child in self._idle:
            self._idle.remove(child)

    def _tell(self, function: Callable[..., Any], args: Sequence[Any]) -> _Child | None:
        """A child that stays, told to run the function; None if there is none, or the job cannot be told."""
        if self._make_shared is None:
            return None
        shared = self._idle[-1].shared if self._idle else None
        packet = jobs_told.tell(function, args, shared)
        if packet is None:
            if shared is not None and any(arg is shared for arg in args):
                self._leave(self._idle[-1])  # what it shares is the job's now
            return None
        if not self._idle:
            self._fork_staying()
        child = self._idle.pop() if self._idle else None
        if child is not None and not child.tell(packet):
            self._leave(child)
            return None
        return child

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
        child = None if keep else self._tell(function, args)
        if child is None:
            child = self._fork(lambda fd: _answer(fd, *_result(function, args), stays=False), keep)
        return self._watch(child, title, on_done, timeout)

    def _fork(
        self,
        work: Callable[[int], object],
        keep: Sequence[int],
        sock: socket.socket | None = None,
        shared: object = None,
    ) -> _Child:
        """Fork a child that runs `work(descriptor of its results)`."""
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
        return _Child(self._loop, pid, read_fd, sock, shared)

    def _watch(
        self, child: _Child, title: str, on_done: Callable[[Outcome], object], timeout: float | None
    ) -> Job:
        def done(outcome: Outcome) -> None:
            self.running.discard(job)
            if timer is not None:
                timer.cancel()
            if child.job is None and job.killed and not child.ended:
                self._await_unblocked(job, child)
            on_done(outcome)

        job = Job(self._loop, child, title, done)
        self.running.add(job)
        late = RemoteError(Code.DEADLINE_EXCEEDED, f"{title}: not done after {timeout} s")
        timer = None if timeout is None else self._loop.call_later(timeout, lambda: job.kill(late))
        return job

    def _await_unblocked(self, job: Job, child: _Child) -> None:
        gone = child.gone

        def unblocked(ended: _Child) -> None:
            self.stuck.discard(job)
            log.get().warning("a child that hung has ended", job=job.name, at=job.doing, child=job.pid)
            gone(ended)

        job.settle()
        child.gone = unblocked
        self.stuck.add(job)

    def states(self) -> list[JobState]:
        """Every job under way, and those that hang though they were killed; the oldest first."""
        return sorted((job.state() for job in self.running | self.stuck), key=lambda state: -state.age_ms)

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
        self.renew()
        for job in list(self.running):
            job.kill()


def _stay(sock: socket.socket, shared: object, result_fd: int) -> None:
    """In a child: run what it is told to, one job after another, while it is wanted."""
    place, mask = _place(), os.umask(0)
    for left in reversed(range(MOST_JOBS)):
        os.umask(mask)
        packet = sock.recv(jobs_told.LIMIT)
        if not packet:
            return
        function, args = jobs_told.told(packet, shared)
        _show(function.__name__)
        ok, value = _result(function, args)
        stays = ok and left > 0 and _place() == place
        if stays:
            _show(SPARE)
        _answer(result_fd, ok, value, stays=stays)
        if not stays:
            return


def _place() -> tuple[object, ...]:
    """Where this process stands: a job that left it elsewhere must not be followed by another one."""
    return (os.getcwd(), *(os.stat(f"/proc/self/ns/{kind}").st_ino for kind in _KINDS))


def _answer(fd: int, ok: bool, value: bytes, *, stays: bool) -> None:
    data = _HEAD.pack(len(value), stays) + value
    while data:
        data = data[os.write(fd, data) :]


def _show(name: str) -> None:
    """Show in `ps -o comm` what this child is."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)


def _child(
    loop: Loop,
    worker: int,
    work: Callable[[int], object],
    result_fd: int,
    keep: Iterable[int],
) -> None:
    status = 1
    try:
        gc.freeze()
        _become_child(loop, worker, [*keep, result_fd])
        work(result_fd)
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


def _result(function: Callable[..., Any], args: Sequence[Any]) -> tuple[bool, bytes]:
    """Run it; return whether it did what it should, and [that, value or error] encoded."""
    try:
        return True, msgspec.msgpack.encode([True, function(*args)])
    except RemoteError as error:
        return False, msgspec.msgpack.encode([False, [error.code.value, error.text, error.reason]])
    except Exception as error:  # noqa: BLE001 - a bug of ours, or a host that fails us: told with its stack
        log.get().bug("job failed", error, job=function.__name__)
        text = f"{function.__name__.strip('_').replace('_', ' ')}: {error}"
        return False, msgspec.msgpack.encode([False, [Code.INTERNAL.value, text, ""]])
    finally:
        sys.stdout.flush()
