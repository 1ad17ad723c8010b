"""All cases of tests/vm/inside/, in one boot (`make test-vm`; `make test` runs test_vm_short.py instead)."""

from __future__ import annotations

import pytest

from tests.support import vm_cases


@pytest.fixture(scope="module")
def results() -> vm_cases.Results:
    return vm_cases.run(short=False, seconds=1800)


@pytest.mark.parametrize("case", vm_cases.names(short=False))
def test_in_the_virtual_machine(results: vm_cases.Results, case: str) -> None:
    results.check(case)


def test_the_machine_ended_in_order(results: vm_cases.Results) -> None:
    assert results.outcome.exit_code == 0, results.tail()
