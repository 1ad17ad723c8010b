"""Runs in: every process (types only). What `bulkhead check` asks every owner of state, and is told.

Each owner looks at what is its own and says what is wrong; asked again with findings, it mends those. A
finding about a pod or container that nobody knows names it as `subject`: it is mended only while nobody does.
"""

from __future__ import annotations

from . import Body

#: So many are told; the next check tells the others.
LIMIT = 250
_TEXT = 300

REPAIRED, LEFT = "repaired", "left"


class Known(Body):
    """What is supposed to be there. Nothing of `running` containers is touched."""

    pods: list[str] = []
    containers: list[str] = []
    running: list[str] = []
    ready: list[str] = []


class Finding(Body):
    """One thing that is wrong. `key` is its owner's word for what repair works on."""

    owner: str
    object: str
    problem: str
    repair: str = ""  # what repair does; "" if it cannot do anything
    key: str = ""
    subject: str = ""  # the pod or container that nobody knows
    state: str = ""  # REPAIRED, LEFT; "" before anybody has tried
    why: str = ""  # why it was left


class Findings(Body):
    findings: list[Finding] = []
    more: int = 0  # so many were not told


def told(findings: list[Finding]) -> Findings:
    """As many as fit into an answer, with texts that are not too long."""
    for finding in findings[:LIMIT]:
        finding.object, finding.problem = finding.object[:_TEXT], finding.problem[:_TEXT]
        finding.why = finding.why[:_TEXT]
    return Findings(findings=findings[:LIMIT], more=max(0, len(findings) - LIMIT))


def repaired(finding: Finding) -> Finding:
    """It is well again."""
    finding.state, finding.why = REPAIRED, ""
    return finding


def left(finding: Finding, why: str) -> Finding:
    """It is as it was."""
    finding.state, finding.why = LEFT, why
    return finding
