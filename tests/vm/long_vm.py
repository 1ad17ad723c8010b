"""All cases of tests/vm/inside/ in one boot, and those of the package (tests/vm/package/) in another (`make
test-vm`; `make test` runs test_vm_short.py instead, and the package's life in tests/packaging/).
"""

from __future__ import annotations

import pytest

from tests.support import packages, vm_cases, vm_image

PACKAGE = vm_image.REPO / "tests/vm/package"


@pytest.fixture(scope="module")
def results() -> vm_cases.Results:
    return vm_cases.run(short=False, seconds=1800)


@pytest.mark.parametrize("case", vm_cases.names(short=False))
def test_in_the_virtual_machine(results: vm_cases.Results, case: str) -> None:
    results.check(case)


@pytest.fixture(scope="module")
def package_results() -> vm_cases.Results:
    packages.built()
    return vm_cases.run(inside=PACKAGE, seconds=900)


@pytest.mark.parametrize("case", vm_cases.names(inside=PACKAGE))
def test_of_the_package(package_results: vm_cases.Results, case: str) -> None:
    package_results.check(case)


def test_the_machine_ended_in_order(results: vm_cases.Results) -> None:
    assert results.outcome.exit_code == 0, results.tail()
