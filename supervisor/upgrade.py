"""Runs in: the supervisor.

An upgrade in place. First the program that is installed now is tried in a process of its own: does it load,
does it take the configuration, does it read what we would leave to it? Then this process executes it: same
pid, same children, the descriptors stay open (supervisor/heritage.py). It takes the workers over as they are
and exchanges them one at a time (supervisor/exchange.py). If anything speaks against it beforehand, nothing
happens; if a new worker is no good, the old one stays.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from ipc.errors import RemoteError, precondition
from ipc.fds import read_sealed, sealed_memfd
from ipc.log import Log
from ipc.loop import Loop
from ipc.messages import Body
from ipc.messages.supervisor import UpgradeState
from ipc.release import build
from ipc.serve import Call, Server
from supervisor import heritage
from supervisor.config import Config
from supervisor.heritage import Heritage
from supervisor.hostinfo import Program
from supervisor.kinds import Kind
from supervisor.reaper import Reaper
from supervisor.sandbox.spec import Identity

CHECK = "--check"  # of `serve`: the trial
TRIAL_TIMEOUT = 30.0
SETTLE_TIMEOUT = 15.0  # seconds for requests and starts that are under way
LOOK_AGAIN = 0.02
HERITAGE_LIMIT = 64 << 20
OUTPUT_SHOWN = 2000  # characters of what a trial has said
#: The reason of a refusal after which only a restart helps.
UNSUPPORTED = "UpgradeUnsupported"
_IN_DIRECTORY = 'cd "$0" 2>/dev/null; exec "$@" 2>&1'
#: They must not end the program that is executed before it has a handler for them.
HELD_BACK = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


def here() -> str:
    """The working directory, / if it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return "/"


@dataclass(frozen=True)
class Start:
    """How this program was started, and so how it is executed again."""

    argv: list[str] = field(default_factory=lambda: started_as(sys.argv, sys.orig_argv))
    directory: str = field(default_factory=here)
    environment: Mapping[str, str] = field(default_factory=lambda: clean(os.environ))


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment, without descriptors that are no longer where it names them: what the program before
    this one has left, and what systemd has kept for a start."""
    gone = {heritage.VARIABLE, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}
    return {name: value for name, value in environ.items() if name not in gone}


def started_as(argv: Sequence[str], original: Sequence[str]) -> list[str]:
    """The command line: the launcher where there is one, since the next one's interpreter may be another."""
    if os.path.isabs(argv[0]) and os.access(argv[0], os.X_OK):
        return list(argv)
    return [sys.executable, *original[1:]]


class Trial(Body):
    """What a program says of itself when it is tried: its build, the formats of a heritage that it reads, and
    what must not differ from the running instance."""

    release: str
    formats: list[int]
    fixed: dict[str, Any]


def trial(config: Config, who: Mapping[str, Identity]) -> Trial:
    """What this program says."""
    return Trial(release=build(), formats=list(heritage.READABLE), fixed=fixed(config, who))


def fixed(config: Config, who: Mapping[str, Identity]) -> dict[str, Any]:
    """What a running instance stands on."""
    uids = {f"users.{kind}": identity.uid for kind, identity in who.items()}
    keys = {key: getattr(config, key) for key in ("root", "run_root", "listen", "cgroup_manager")}
    return {**keys, **uids}


def obstacle(found: Trial, ours: Mapping[str, Any]) -> str:
    """Why a program that loads cannot be executed in place, "" if it can."""
    if heritage.FORMAT not in found.formats:
        return f"{found.release} does not read what this release leaves to it"
    differing = [key for key, value in ours.items() if found.fixed.get(key, value) != value]
    return f"these keys take a restart: {', '.join(differing)}" if differing else ""


def inherited(environ: MutableMapping[str, str]) -> Heritage | None:
    """What the program before this one has left, None after an ordinary start. Raises ValueError."""
    number = environ.pop(heritage.VARIABLE, "")
    if not number:
        return None
    fd = int(number)
    try:
        found = heritage.decode(read_sealed(fd, HERITAGE_LIMIT))
    finally:
        os.close(fd)
    for each in found.descriptors():
        os.set_inheritable(each, False)
    return found


class House(Protocol):
    """What an upgrade needs of the supervisor."""

    loop: Loop
    log: Log
    reaper: Reaper
    server: Server
    config: Config
    who: dict[str, Identity]
    kinds: dict[str, Kind]

    def heritage(self) -> Heritage: ...
    def settled(self) -> bool: ...
    def upgrading(self) -> None: ...
    def not_upgraded(self) -> None: ...


class Upgrade:
    """One instance's upgrades. `state` is what is told of the last one."""

    def __init__(self, house: House, start: Start, before: UpgradeState | None) -> None:
        self._house = house
        self._start = start
        self._waiting: list[Call] = []
        self.state = before or UpgradeState()
        self.state.after = build()

    @property
    def under_way(self) -> bool:
        """True while one goes on."""
        return self.state.phase in {"trial", "exchange"}

    # -- the trial ------------------------------------------------------------------------------------

    def begin(self, call: Call) -> None:
        """Begin, or join the one that goes on. Raises OSError if the trial cannot be started."""
        if self.state.phase == "exchange":
            call.reply(self.state)
            return
        self._waiting.append(call)
        if self.state.phase != "trial":
            self._try()

    def _try(self) -> None:
        self.state = UpgradeState(serial=self.state.serial + 1, phase="trial", before=build(), after=build())
        self._house.log.info("upgrade in place is tried", program=self._start.argv[0])
        argv = ["/bin/sh", "-c", _IN_DIRECTORY, self._start.directory, *self._start.argv, CHECK]
        try:
            Program(self._house.loop, self._house.reaper, argv, self._tried, TRIAL_TIMEOUT)
        except OSError as error:
            self._refuse(f"the trial cannot be started: {error}")

    def _tried(self, code: int, output: bytes) -> None:
        text = output.decode("utf-8", "replace").strip()
        try:
            found = msgspec.json.decode(text.splitlines()[-1], type=Trial) if code == 0 else None
        except (msgspec.DecodeError, IndexError):
            found = None
        if found is None:
            said = text[-OUTPUT_SHOWN:] or f"it ended with {code}"
            reason = UNSUPPORTED if "unrecognized arguments" in text else ""  # a release that knows no trial
            self._refuse(f"the program that is installed now does not start: {said}", reason)
        elif why := obstacle(found, fixed(self._house.config, self._house.who)):
            self._refuse(why, UNSUPPORTED)
        else:
            self._go_on(found)

    def _refuse(self, why: str, reason: str = "") -> None:
        self._fail(why)
        calls, self._waiting = self._waiting, []
        for call in calls:
            error = precondition(f"not upgraded, everything is as before: {why}")
            call.fail(RemoteError(error.code, error.text, reason=reason))

    def _fail(self, why: str) -> None:
        self._house.log.error("not upgraded", why=why)
        self.state.phase = "failed"
        self.state.faults = [why]

    # -- the execution --------------------------------------------------------------------------------

    def _go_on(self, found: Trial) -> None:
        self._house.log.info("upgrade in place begins", before=build(), after=found.release)
        calls, self._waiting = self._waiting, []
        for call in calls:
            call.reply(self.state)
        self._house.upgrading()
        self._house.server.drain()  # who asks now asks the program that comes
        self._settle(self._house.loop.time() + SETTLE_TIMEOUT)

    def _settle(self, until: float) -> None:
        """Execute once nothing is half done that only this program could finish."""
        if self._house.settled():
            self._execute()
        elif self._house.loop.time() > until:
            self._give_up(f"requests or starts of workers are under way for {SETTLE_TIMEOUT:g} s")
        else:
            self._house.loop.call_later(LOOK_AGAIN, lambda: self._settle(until))

    def _give_up(self, why: str) -> None:
        self._fail(why)
        self._house.not_upgraded()

    def _execute(self) -> None:
        self.state.phase = "exchange"
        left = self._house.heritage()
        memfd = sealed_memfd("bulkhead-heritage", heritage.encode(left))
        descriptors = [memfd, *left.descriptors()]
        environment = {**self._start.environment, heritage.VARIABLE: str(memfd)}
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            with contextlib.suppress(OSError):  # where we were started may be gone
                os.chdir(self._start.directory)
            _set_inheritable(descriptors, True)
            os.execve(self._start.argv[0], self._start.argv, environment)  # noqa: S606 - that is the upgrade
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
            _set_inheritable(descriptors, False)
            os.close(memfd)
            os.chdir("/")
            self._give_up(f"{self._start.argv[0]} cannot be executed: {error.strerror}")

    # -- the exchange, in the program that was executed -------------------------------------------------

    def exchange(self) -> None:
        """Exchange the workers that were taken over, those first whom the others ask."""
        kinds = sorted(self._house.kinds.values(), key=lambda kind: -kind.entry.stop_order)
        self._exchange_next(kinds)

    def _exchange_next(self, left: list[Kind]) -> None:
        if not left:
            self._finish()
            return
        kind, *others = left

        def over(fault: str) -> None:
            if fault:
                self.state.faults.append(fault)
            else:
                self.state.exchanged.append(kind.entry.kind)
            self._house.loop.call_soon(lambda: self._exchange_next(others))

        kind.replace_inherited(over)

    def _finish(self) -> None:
        self.state.phase = "failed" if self.state.faults else "done"
        log = self._house.log.error if self.state.faults else self._house.log.info
        log(
            "upgrade is over",
            before=self.state.before,
            after=self.state.after,
            exchanged=",".join(self.state.exchanged),
            faults="; ".join(self.state.faults),
        )


def _set_inheritable(descriptors: Iterable[int], inheritable: bool) -> None:
    for fd in descriptors:
        os.set_inheritable(fd, inheritable)
