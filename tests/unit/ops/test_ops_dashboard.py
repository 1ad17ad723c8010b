"""Runs in: the tests. The dashboard loads without edits, and asks for what /metrics has."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ipc.messages.cri import ContainerCount, CriInfo, RpcCount
from ipc.messages.supervisor import WorkerState
from tests.support import dashboard
from workers.ops import metrics
from workers.ops.processes import Process
from workers.ops.snapshot import Snapshot

DASHBOARD = dashboard.load()
QUERIES = list(dashboard.queries(DASHBOARD))
WIDTH = 24  # of Grafana's grid
OF_SCRAPES = {"instance"}
SNAPSHOT = Snapshot(
    workers=[WorkerState(kind="cri", name="cri", state="ready", pid=1, last_ping_ms=1)],
    processes={1: Process(resident=2, shared=1, virtual=3, cpu=1.0, threads=1, descriptors=4)},
    cri=CriInfo(
        pods={"ready": 1},
        containers={"running": 1},
        pulls=[],
        rpcs=[RpcCount(name="Version", total=1, errors=0, seconds=0.1)],
        pull_failures={"NOT_FOUND": 1},
        layers={"fetched": 1},
        counts=[ContainerCount(namespace="n", pod="p", container="c", oom_kills=1)],
    ),
)


def exported() -> dict[str, set[str]]:
    """The labels of every series by its name."""
    families = text_string_to_metric_families(metrics.render(SNAPSHOT, "1").decode())
    samples = [sample for family in families for sample in family.samples]
    return {sample.name: {*sample.labels} for sample in samples if not sample.name.endswith("_created")}


EXPORTED = exported()


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bbulkhead_\w+", expression))


@pytest.mark.parametrize(("title", "expression", "legend"), QUERIES)
def test_a_query_asks_for_series_and_labels_that_are_there(title: str, expression: str, legend: str) -> None:
    names = names_in(expression)
    assert names, title
    assert names <= EXPORTED.keys()
    known = set.intersection(*(EXPORTED[name] for name in names)) | OF_SCRAPES
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    by = {label.strip() for labels in grouped for label in labels.split(",")}
    matched = set(re.findall(r"[{,]\s*(\w+)\s*=~?", expression))
    shown = set(re.findall(r"{{(\w+)}}", legend))
    assert by | matched | shown <= known
    assert not by or shown <= by  # others are gone with the sum


def test_every_series_is_in_a_panel() -> None:
    asked = {name for _, expression, _ in QUERIES for name in names_in(expression)}
    assert EXPORTED.keys() - asked == set()


def test_it_is_a_dashboard_for_whatever_data_source_there_is() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert names_in(variables["instance"]["query"]["query"]) <= EXPORTED.keys()
    assert list(sources(DASHBOARD)) == [{"type": "prometheus", "uid": "${datasource}"}] * sum(
        1 + len(panel.get("targets", [])) for panel in [*dashboard.panels(DASHBOARD), {}]
    )
    used = set(re.findall(r"\$\{?(\w+)", dashboard.PATH.read_text()))
    assert used - {"__rate_interval", "__all"} == variables.keys()
    assert DASHBOARD["id"] is None  # Grafana gives it one
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 36  # data sources are objects since then


def sources(part: Any) -> list[Any]:
    """Every data source that a part of the dashboard names."""
    if isinstance(part, list):
        return [found for item in part for found in sources(item)]
    if not isinstance(part, dict):
        return []
    own = [part["datasource"]] if "datasource" in part else []
    return own + [found for item in part.values() for found in sources(item)]


def test_panels_have_places_and_numbers_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    places = [place for panel in panels for place in cells(panel["gridPos"])]
    assert len(set(places)) == len(places)
    assert all(0 <= column < WIDTH for column, _ in places)
    for panel in dashboard.panels(DASHBOARD):
        refs = [target["refId"] for target in panel["targets"]]
        assert panel["type"] in {"stat", "timeseries"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len(set(refs)) == len(refs) > 0


def cells(place: dict[str, int]) -> list[tuple[int, int]]:
    columns = range(place["x"], place["x"] + place["w"])
    return list(itertools.product(columns, range(place["y"], place["y"] + place["h"])))
