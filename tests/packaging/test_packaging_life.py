"""Both packages through their lives, each in one boot of a container with a systemd of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import nspawn, packages, vm_cases

INSIDE = Path(__file__).with_name("inside")


@pytest.fixture(scope="module")
def results() -> vm_cases.Results:
    packages.built()
    return vm_cases.run(inside=INSIDE, boot=nspawn.run, seconds=300)


@pytest.mark.parametrize("case", vm_cases.names(inside=INSIDE))
def test_in_a_container_with_systemd(results: vm_cases.Results, case: str) -> None:
    results.check(case)


def test_the_container_ended_in_order(results: vm_cases.Results) -> None:
    assert results.outcome.exit_code == 0, results.tail()
