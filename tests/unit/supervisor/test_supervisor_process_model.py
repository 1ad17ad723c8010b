"""docs/process-model.md says what supervisor/table.py says, and the table says what the workers do."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from ipc.table import ROOT
from supervisor import drawing, requests
from supervisor.settings import FIXED_UIDS
from supervisor.table import ROOT_USER, SUPERVISOR_CALLERS, TABLE, Entry, Restart

ROOT_DIRECTORY = Path(__file__).resolve().parents[3]
PAGE = (ROOT_DIRECTORY / "docs/process-model.md").read_text()
WORKERS = [entry for entry in TABLE.values() if entry.is_worker]


@pytest.mark.parametrize("part", [drawing.tree, drawing.matrix, drawing.properties])
def test_the_page_shows_the_table(part: object) -> None:
    assert callable(part)
    assert part() in PAGE, "print the parts anew with python -m supervisor.drawing"


def test_every_title_in_the_ps_listing_is_one_that_is_set() -> None:
    listing = PAGE.split("$ ps", 1)[1].split("```", 1)[0]
    titles = set(re.findall(r"bulkhead: (\w+)", listing))
    assert titles <= {"supervisor", *TABLE}
    assert {entry.kind for entry in WORKERS if entry.minimum} <= titles


def test_every_module_of_the_table_is_there() -> None:
    for entry in TABLE.values():
        if entry.module:
            assert importlib.util.find_spec(entry.module), entry.module


def test_callers_are_kinds_of_the_table_and_there_is_no_cycle() -> None:
    calls = {
        entry.kind: {e.kind for e in TABLE.values() if entry.kind in e.callers} for entry in TABLE.values()
    }
    assert all(entry.callers <= set(TABLE) for entry in TABLE.values())
    for kind in TABLE:
        reached: set[str] = set()
        edge = {kind}
        while edge:
            edge = set().union(*(calls[one] for one in edge)) - reached
            reached |= edge
        assert kind not in reached, f"{kind} can be made to wait for itself"


@pytest.mark.parametrize("entry", WORKERS, ids=lambda entry: entry.kind)
def test_every_worker_has_a_sandbox_limits_and_a_user_it_needs(entry: Entry) -> None:
    assert entry.sandbox is not None
    assert entry.limits is not None
    assert entry.sandbox.no_new_privs
    assert entry.sandbox.seccomp
    assert (entry.user == ROOT_USER) == bool(entry.sandbox.capabilities)
    assert entry.user in {ROOT_USER, *FIXED_UIDS}
    assert entry.on_demand == (entry.minimum == 0)


def test_only_monitors_inits_and_sessions_outlive_the_supervisor() -> None:
    assert {entry.kind for entry in TABLE.values() if entry.restart is Restart.NEVER} == {
        "nursery", "monitor", "init",
    }  # fmt: skip
    assert [entry.kind for entry in WORKERS if entry.drains] == ["stream"]
    assert all(entry.sandbox and entry.sandbox.parent_death_signal != entry.drains for entry in WORKERS)


def test_whoever_may_ask_the_supervisor_may_connect_to_it() -> None:
    rows = requests.Requests(object()).table().values()  # type: ignore[arg-type]  # nothing is called
    assert frozenset().union(*(row.callers for row in rows)) == SUPERVISOR_CALLERS
    (restart,) = [row for row in rows if row.request.NAME == "supervisor.worker.restart"]
    assert restart.callers == {ROOT}
