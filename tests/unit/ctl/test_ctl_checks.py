"""What is told of a check, and of what hangs."""

from __future__ import annotations

import json

import pytest

from ipc.messages.checking import Finding, Known, left, repaired
from ipc.messages.supervisor import InFlight, JobState, WorkerState
from supervisor.cli.checks.report import CLEAN, FOUND, check, show
from supervisor.cli.ctl.node import hanging


def finding(name: str, subject: str = "") -> Finding:
    return Finding(
        owner="storage", object=name, problem="p", repair="r", key=f"layer:{name}", subject=subject
    )


class Owners:
    """Those who are asked; a pod comes to be while they look."""

    def __init__(self) -> None:
        self.asked = 0
        self.mended: list[str] = []

    def known(self) -> tuple[Known, list[Finding]]:
        self.asked += 1
        return Known(pods=["late"] if self.asked > 1 else []), []

    def inspect(self, known: Known, *, deep: bool) -> list[Finding]:
        assert not known.pods
        return [finding("deep" if deep else "layer"), finding("pod", subject="late")]

    def mend(self, known: Known, findings: list[Finding]) -> list[Finding]:
        assert known.pods == ["late"]
        self.mended += [one.object for one in findings]
        return [repaired(one) for one in findings]


def test_what_has_come_to_be_meanwhile_is_no_stray_and_is_not_mended() -> None:
    owners = Owners()
    assert [one.object for one in check(owners, deep=True, repair=False)] == ["deep"]
    assert owners.mended == []
    assert [one.state for one in check(Owners(), deep=False, repair=False)] == [""]
    owners = Owners()
    assert [one.state for one in check(owners, deep=False, repair=True)] == ["repaired"]
    assert owners.mended == ["layer"]


def test_the_exit_code_says_whether_something_is_wrong_still(capsys: pytest.CaptureFixture[str]) -> None:
    assert show([], "table") == CLEAN
    assert show([repaired(finding("a"))], "table") == CLEAN
    assert show([finding("a")], "table") == FOUND
    assert show([repaired(finding("a")), left(finding("b"), "it runs")], "json") == FOUND
    told = capsys.readouterr().out
    assert told.startswith("nothing is wrong\n")
    assert "1 found: 1 repaired" in told
    shown = json.loads(told[told.index("[\n") :])
    assert [(one["object"], one["state"], one["why"]) for one in shown] == [
        ("a", "repaired", ""),
        ("b", "left", "it runs"),
    ]


def test_what_hangs_is_named_by_its_job_else_by_its_request() -> None:
    job = JobState(name="create container", pid=7, doing="/mnt/x", age_ms=40_000, killed=True)
    young = JobState(name="unpack", pid=8, doing="unpack", age_ms=100)
    request = InFlight(type="storage.container.create", age_ms=41_000, doing="making it")
    worker = WorkerState(kind="storage", name="storage", state="ready", jobs=[job, young], requests=[request])
    assert hanging(worker, 5.0) == ["storage: create container: /mnt/x for 40 s, killed, hangs in the kernel"]
    worker.jobs = [young]
    assert hanging(worker, 5.0) == ["storage: making it for 41 s"]
    worker.last_ping_ms = 12_000
    assert hanging(worker, 5.0) == ["storage: answers no pings for 12 s"]
    endless = InFlight(type="GetContainerEvents", age_ms=10**9)
    assert hanging(WorkerState(kind="cri", name="cri", state="ready", requests=[endless]), 5.0) == []
