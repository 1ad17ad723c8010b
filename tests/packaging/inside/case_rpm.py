"""The life of the RPM package, in the order of the file: install, upgrade, downgrade, erase.

The machine is a Debian: what an RPM distribution's names and policies would say is not seen here, so the
requirements are taken as given (--nodeps).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.inside.node import LIBRARY, InstalledNode, Survivor, attempt, run, upgraded
from tests.support import packages
from tests.support.images import served

FIRST, SECOND = str(packages.package("rpm1")), str(packages.package("rpm2"))
CONFIGURATION = Path("/etc/bulkhead/bulkhead.toml")
RPM = ("rpm", "--dbpath", "/var/lib/rpm", "--force-debian", "--nodeps")


@pytest.fixture(scope="session")
def node() -> Iterator[InstalledNode]:
    with served(larger_files=1) as images:
        found = InstalledNode("systemd", images)
        found.configure()
        run(*RPM, "--install", FIRST)
        run("systemctl", "enable", "--now", "bulkhead")
        found.pull()
        yield found


@pytest.fixture(scope="session")
def survivor(node: InstalledNode) -> Survivor:
    return Survivor(node)


def case_an_rpm_installs_a_service_that_is_ready(node: InstalledNode, survivor: Survivor) -> None:
    assert node.active()
    assert node.tree().endswith("-1")
    survivor.check()


def case_an_upgrade_of_the_rpm_leaves_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    CONFIGURATION.write_text(CONFIGURATION.read_text() + '\nlog_level = "debug"\n')
    upgraded(node, survivor, (*RPM, "--upgrade", SECOND))
    assert node.tree().endswith("-2")
    assert (LIBRARY / "current").readlink() == Path(node.tree())
    assert len(list(LIBRARY.iterdir())) == 2, "the old tree is still there"
    assert 'log_level = "debug"' in CONFIGURATION.read_text()
    survivor.check()
    changed = attempt(*RPM[:3], "--verify", "--nodeps", "bulkhead").stdout.splitlines()
    assert [line.split()[-1] for line in changed] == [str(CONFIGURATION)]


def case_a_downgrade_of_the_rpm_leaves_containers_running(node: InstalledNode, survivor: Survivor) -> None:
    upgraded(node, survivor, (*RPM, "--upgrade", "--oldpackage", FIRST))
    assert node.tree().endswith("-1")
    survivor.check()


def case_an_erased_rpm_leaves_containers_and_changed_configuration(
    node: InstalledNode, survivor: Survivor
) -> None:
    done = attempt(*RPM, "--erase", "bulkhead")
    assert done.returncode == 0, done.stderr
    assert "containers run on" in done.stderr
    assert not LIBRARY.exists()
    assert CONFIGURATION.with_suffix(".toml.rpmsave").exists()
    survivor.check_process()
