"""The restart policy, with a clock and a chance of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor.policy import Policy, Rules, State, Verdict

RULES = Rules(jitter=0.2)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(chance: float = 0.0, rules: Rules = RULES) -> tuple[Policy, Clock]:
    clock = Clock()
    return Policy(rules, clock, lambda: chance), clock


def test_the_first_death_costs_no_time() -> None:
    policy, _ = make()
    policy.ready()
    assert policy.died().delay == 0.0
    assert policy.state is State.GOOD


def test_delays_double_up_to_the_maximum() -> None:
    policy, clock = make()
    delays = []
    for _ in range(9):
        delays.append(policy.died().delay)
        clock.now += 100.0
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_five_deaths_in_a_minute_are_failed_and_tried_slowly() -> None:
    policy, clock = make()
    for _ in range(4):
        assert policy.died().state is not State.FAILED
        clock.now += 14.9
    verdict = policy.died()
    assert (verdict.state, verdict.delay) == (State.FAILED, RULES.slow_retry)


def test_a_failed_kind_that_becomes_ready_is_good_again() -> None:
    policy, clock = make()
    for _ in range(5):
        policy.died()
    clock.now += RULES.slow_retry
    policy.ready()
    assert policy.state is State.GOOD
    clock.now += RULES.reset_after
    assert policy.died().delay == 0.0


def test_the_past_is_forgotten_only_after_being_ready_for_long_enough() -> None:
    policy, clock = make()
    policy.died()
    policy.ready()
    clock.now += RULES.reset_after - 1
    assert policy.died().delay == 1.0
    policy.ready()
    clock.now += RULES.reset_after
    assert policy.died().delay == 0.0


def test_starting_slowly_is_not_being_ready() -> None:
    policy, clock = make()
    policy.died()
    clock.now += RULES.reset_after * 2
    assert policy.died().delay == 1.0


def test_kills_from_outside_after_good_service_are_not_held_against_a_kind() -> None:
    policy, clock = make()
    policy.died()
    for _ in range(20):
        policy.ready()
        clock.now += RULES.first_delay
        verdict = policy.died(blameless=True)
        assert (verdict.state, verdict.delay, policy.streak) == (State.GOOD, 0.0, 1)
    assert policy.died(blameless=True).delay == RULES.first_delay, "it had not become ready"
    policy.ready()
    assert policy.died(blameless=True).delay == 2 * RULES.first_delay, "it had hardly become ready"


def test_what_no_retry_makes_good_is_failed_at_once() -> None:
    policy, _ = make()
    assert policy.condemn().state is State.FAILED


def test_an_operators_restart_begins_anew() -> None:
    policy, _ = make()
    for _ in range(5):
        policy.died()
    policy.pardon()
    assert (policy.state, policy.streak) == (State.GOOD, 0)
    assert policy.died().delay == 0.0


events = st.lists(st.tuples(st.sampled_from(["ready", "died"]), st.floats(0, 400)), max_size=60)


@given(events, st.floats(0, 1, exclude_max=True))
def test_delays_stay_in_bounds_and_never_sink_without_a_reset(
    history: list[tuple[str, float]], chance: float
) -> None:
    policy, clock = make(chance)
    for event, seconds in history:
        clock.now += seconds
        if event == "ready":
            policy.ready()
            continue
        verdict = policy.died()
        longest = max(RULES.slow_retry, RULES.max_delay) * (1 + RULES.jitter)
        assert 0.0 <= verdict.delay <= longest
        assert (verdict.delay == 0.0) == (policy.streak == 1 and verdict.state is State.GOOD)
        if policy.streak > 1:
            assert verdict.delay >= RULES.first_delay


@given(st.lists(st.floats(0, 30), min_size=5, max_size=30))
def test_failed_means_exactly_so_many_deaths_within_the_window(gaps: list[float]) -> None:
    policy, clock = make()
    deaths: list[float] = []
    for gap in gaps:
        clock.now += gap
        deaths.append(clock.now)
        recent = [death for death in deaths if clock.now - death <= RULES.failed_window]
        assert (policy.died().state is State.FAILED) == (len(recent) >= RULES.failed_deaths)


def test_other_numbers_hold_from_the_next_death_on_and_the_past_stays() -> None:
    policy, clock = make(rules=Rules(failed_deaths=5))
    for _ in range(3):
        policy.died()
        clock.now += 1.0
    policy.reform(Rules(failed_deaths=4, slow_retry=7.0))
    assert policy.died() == Verdict(State.FAILED, 7.0)
    policy.pardon()
    policy.reform(Rules(max_delay=1.5))
    assert [policy.died().delay for _ in range(4)] == [0.0, 1.0, 1.5, 1.5]
