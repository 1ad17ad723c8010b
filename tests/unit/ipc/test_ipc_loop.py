"""The selector loop: timers that are far away."""

from __future__ import annotations

import os

import pytest

from ipc.loop import SIFT, Loop

YEARS = 10 * 365 * 24 * 3600.0


@pytest.mark.parametrize("seconds", [30 * 24 * 3600.0, YEARS, 2.0**62, float("inf")])
def test_a_timer_may_be_further_away_than_epoll_can_wait(seconds: float) -> None:
    loop = Loop()
    loop.call_later(seconds, lambda: pytest.fail("called at once"))
    reader, writer = os.pipe()
    loop.add_reader(reader, loop.stop)
    os.write(writer, b"x")
    loop.run()  # nothing but the pipe can end its wait
    loop.close()
    os.close(reader)
    os.close(writer)


def test_timers_that_were_cancelled_are_forgotten_before_their_time() -> None:
    loop = Loop()
    fired: list[int] = []
    loop.call_later(0.01, lambda: fired.append(1))
    for _ in range(10_000):
        loop.call_later(1000.0, lambda: fired.append(2)).cancel()
    assert len(loop._timers) <= 2 * SIFT
    loop.turn(1)
    assert fired == [1]
    loop.close()
