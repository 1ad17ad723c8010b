"""Runs in: the tests. The dashboard that the packages carry, and what it asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[2] / "packaging/common/examples/grafana-dashboard.json"


def load() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    found: dict[str, Any] = json.loads(PATH.read_text())
    return found


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel that is no heading."""
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def queries(dashboard: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """A panel's title, one of its expressions and that one's legend; variables stand in both."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]


def filled(expression: str) -> str:
    """The expression as Grafana sends it."""
    return expression.replace("$__rate_interval", "4m").replace("$instance", ".*")
