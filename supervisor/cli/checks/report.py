"""Runs in: `bulkhead check`, `bulkheadctl check`.

One check of a node: who is known is asked first and again at the end, so that what was made or removed
meanwhile is not taken for a stray; then each owner mends what it has found. Shows it for people or programs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import msgspec

from ipc.messages.checking import REPAIRED, Finding, Known

#: Exit codes: all is well (by now); something is wrong. The programs have codes of their own for failures.
CLEAN, FOUND = 0, 4
HEADERS = ("OBJECT", "PROBLEM", "REPAIR", "STATE")


class Owners(Protocol):
    """Who is asked: workers that run, or their code while nobody has the instance."""

    def known(self) -> tuple[Known, list[Finding]]:
        """Who is supposed to be there, and what is wrong with the state that tells it."""

    def inspect(self, known: Known, *, deep: bool) -> list[Finding]:
        """What is wrong with everything else."""

    def mend(self, known: Known, findings: list[Finding]) -> list[Finding]:
        """Mend them; each says what has become of it."""


def check(owners: Owners, *, deep: bool, repair: bool) -> list[Finding]:
    """Look at everything, and mend it if asked to."""
    known, _ = owners.known()
    found = owners.inspect(known, deep=deep)
    known, of_state = owners.known()
    everybody = {*known.pods, *known.containers}
    found = [*of_state, *(finding for finding in found if finding.subject not in everybody)]
    return owners.mend(known, found) if repair and found else found


def flags(parser: argparse.ArgumentParser) -> None:
    """The flags of both programs' `check`."""
    parser.add_argument("--deep", action="store_true", help="read every file of every layer and compare it")
    parser.add_argument("--repair", action="store_true", help="mend what can be mended, one by one")
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="for people, or programs"
    )


def show(found: list[Finding], output: str) -> int:
    """Print the findings; return the exit code."""
    if output == "json":
        print(json.dumps([msgspec.structs.asdict(finding) for finding in found], indent=2))
    elif found:
        from supervisor.cli.ctl.output import print_table  # not in what becomes the supervisor: it is large

        print_table(HEADERS, (_row(finding) for finding in found))
        print(summary(found))
    else:
        print("nothing is wrong")
    return FOUND if any(finding.state != REPAIRED for finding in found) else CLEAN


def _row(finding: Finding) -> tuple[str, ...]:
    state = f"{finding.state}: {finding.why}" if finding.why else finding.state or "-"
    return finding.object, finding.problem, finding.repair or "-", state


def summary(found: Iterable[Finding]) -> str:
    """How many there are, in a line."""
    counts = Counter(finding.state or "not repaired" for finding in found)
    return f"{counts.total()} found: " + ", ".join(f"{count} {state}" for state, count in counts.items())
