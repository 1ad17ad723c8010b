"""What holds for every test: nothing is skipped silently, fuzzing has two lengths."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from tests.support import machine

settings.register_profile("default", deadline=None)
settings.register_profile("fuzz", max_examples=20_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
machine.enter()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test is a failure: this kind of machine can do all that is tested."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
