"""Runs in: `bulkhead info`. Shows what supervisor/cli/hostcheck.py found, for people or for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict

from supervisor.cli.hostcheck import Finding

COLOURS = {"ok": "32", "limited": "33", "missing": "31"}


def show(found: Iterable[Finding], output: str) -> None:
    """Print the findings; colours only on a terminal, and not where NO_COLOR is set."""
    if output == "json":
        print(json.dumps([asdict(finding) for finding in found], indent=2))
        return
    for line in lines(list(found), colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")):
        print(line)


def lines(found: list[Finding], *, colour: bool) -> Iterable[str]:
    """A line each, and the advice below it."""
    width = max((len(finding.subject) for finding in found), default=0)
    for finding in found:
        state = f"{finding.state:8}"
        if colour:
            state = f"\033[{COLOURS[finding.state]}m{state}\033[0m"
        yield f"{state} {finding.subject:{width}}  {finding.what}"
        if finding.advice:
            yield f"{'':8} {'':{width}}  - {finding.advice}"
