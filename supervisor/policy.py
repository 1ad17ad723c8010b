"""Runs in: the supervisor. Sans-IO: a clock and a source of chance are passed in.

When a worker that died is started again. The first death costs nothing: the next worker starts at once.
Then come 1, 2, 4 ... seconds with jitter, up to a maximum, until a worker has been ready for long enough
to forget the past. Too many deaths in a short time mean FAILED: slow tries, which go on for ever, because
a node whose registry client crashes must still run pods.

What a worker is not to blame for (SIGKILL from outside, after it had been ready for a while) is no sign that
the next one will die: it costs nothing and is not held against its kind.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """The numbers, in seconds ([restart] of the configuration)."""

    first_delay: float = 1.0
    max_delay: float = 30.0
    reset_after: float = 300.0
    failed_deaths: int = 5
    failed_window: float = 60.0
    slow_retry: float = 60.0
    jitter: float = 0.2  # a delay is lengthened by up to this part of itself, never shortened


class State(enum.StrEnum):
    """What the policy thinks of a kind."""

    GOOD = "good"
    BACKOFF = "backoff"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """What to do after a death: wait `delay` seconds, then start (or wait for a connection)."""

    state: State
    delay: float


class Policy:
    """The past of one kind of worker. `clock` is monotonic seconds, `chance` returns [0, 1)."""

    def __init__(self, rules: Rules, clock: Callable[[], float], chance: Callable[[], float]) -> None:
        self._rules = rules
        self._clock = clock
        self._chance = chance
        self._deaths: deque[float] = deque(maxlen=rules.failed_deaths)
        self._streak = 0
        self._ready_since: float | None = None
        self.state = State.GOOD

    @property
    def streak(self) -> int:
        """Deaths that are not forgotten."""
        return self._streak

    def reform(self, rules: Rules) -> None:
        """Take other numbers; the past stays, judged by them from the next death on."""
        self._deaths = deque(self._deaths, maxlen=rules.failed_deaths)
        self._rules = rules

    def ready(self) -> None:
        """A worker said hello and its report is right."""
        self._ready_since = self._clock()
        self.state = State.GOOD

    def died(self, *, blameless: bool = False) -> Verdict:
        """A worker died unasked. Returns what to do. `blameless`: somebody else ended it.

        One that is killed before it was ready for `first_delay` counts like any other, so that whoever
        kills without end gets no more than one worker in that time.
        """
        now = self._clock()
        if blameless and self._ready_since is not None and now - self._ready_since >= self._rules.first_delay:
            self._ready_since = None
            return Verdict(self.state, 0.0)
        self._forget_if_long_ready(now)
        self._ready_since = None
        self._streak += 1
        self._deaths.append(now)
        self.state = self._judge(now)
        return Verdict(self.state, self._delay())

    def condemn(self) -> Verdict:
        """A worker did what no retry makes good (its sandbox does not hold): FAILED at once."""
        self._ready_since = None
        self._streak += 1
        self._deaths.append(self._clock())
        self.state = State.FAILED
        return Verdict(self.state, self._delay())

    def pardon(self) -> None:
        """An operator asked for a restart: begin anew."""
        self._streak = 0
        self._deaths.clear()
        self._ready_since = None
        self.state = State.GOOD

    def _forget_if_long_ready(self, now: float) -> None:
        if self._ready_since is not None and now - self._ready_since >= self._rules.reset_after:
            self._streak = 0
            self._deaths.clear()

    def _judge(self, now: float) -> State:
        many = len(self._deaths) == self._rules.failed_deaths
        if many and now - self._deaths[0] <= self._rules.failed_window:
            return State.FAILED
        return State.GOOD if self._streak == 1 else State.BACKOFF

    def _delay(self) -> float:
        if self.state is State.GOOD:
            return 0.0
        if self.state is State.FAILED:
            base = self._rules.slow_retry
        else:
            doubled = self._rules.first_delay * 2.0 ** min(self._streak - 2, 32)
            base = min(doubled, self._rules.max_delay)
        return base * (1.0 + self._rules.jitter * self._chance())
