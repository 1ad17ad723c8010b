"""Runs in: the tests.

Cases that run inside of a machine, all in one boot: their names (read, not imported, for they import what
only the machine has), and the result of each. Those of tests/vm/inside/ run in a virtual machine
(tests/support/vm.py), those of tests/packaging/inside/ in a container with systemd
(tests/support/nspawn.py).
"""

from __future__ import annotations

import ast
import shlex
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import vm, vm_image

INSIDE = vm_image.REPO / "tests/vm/inside"
Boot = Callable[[str, Path, float], vm.Outcome]

#: The marked cases, each driver with one runtime, what does not depend on the driver with one driver.
LEFT_OUT = (
    *("cgroupfs-crun", "systemd-runc", "(host_ports and systemd)"),
    *("(a_restart and systemd)", "(a_kill and cgroupfs)"),
)
SHORT = f"-m short -k 'not ({' or '.join(LEFT_OUT)})'"

PAYLOAD = """
export PYTHONDONTWRITEBYTECODE=1 HOME=/root
{python} -m pytest -c {inside}/pytest.ini --rootdir={repo} {options} --junit-xml=/share/results.xml {inside}
code=$?
journalctl -u bulkhead -o cat --no-pager >/share/journal
exit $code
"""


@dataclass
class Results:
    """`failures` has the texts of each case's failures; one that did not run is in neither."""

    outcome: vm.Outcome
    passed: dict[str, int] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    journal: str = ""

    def check(self, case: str) -> None:
        """Raises AssertionError unless the case ran, in all its variants, and none failed."""
        assert case not in self.failures, "\n\n".join([*self.failures[case], self.tail()])
        assert self.passed.get(case), f"{case} has not run\n{self.tail()}"

    def tail(self, lines: int = 60) -> str:
        """The ends of the service's log and of the console."""
        parts = (("bulkhead's log", self.journal), ("console", self.outcome.console))
        return "\n".join(
            f"-- {name}\n" + "\n".join(text.splitlines()[-lines:]) for name, text in parts if text
        )


def names(*, short: bool = False, inside: Path = INSIDE) -> list[str]:
    """Return the names of all cases, or of those that `make test` runs too."""
    found = []
    for path in sorted(inside.glob("case_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("case_"):
                marks = [ast.unparse(decorator) for decorator in node.decorator_list]
                if not short or "pytest.mark.short" in marks:
                    found.append(node.name)
    return found


def run(*, short: bool = False, seconds: float, inside: Path = INSIDE, boot: Boot = vm.run) -> Results:
    """Boot, run the cases, return their results. Raises AssertionError if there are none."""
    options = SHORT if short else ""
    payload = PAYLOAD.format(
        python=shlex.quote(sys.executable),
        inside=shlex.quote(str(inside)),
        repo=shlex.quote(str(vm_image.REPO)),
        options=options,
    )
    with tempfile.TemporaryDirectory(prefix="bh-vm-share-") as directory:
        share = Path(directory)
        results = Results(boot(payload, share, seconds))
        if (share / "journal").exists():
            results.journal = (share / "journal").read_text(errors="replace")
        assert (share / "results.xml").exists(), f"the machine brought no results\n{results.tail()}"
        _parse(share / "results.xml", results)
    return results


def _parse(path: Path, results: Results) -> None:
    for case in ET.parse(path).getroot().iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        for child in bad:
            text = f"{case.get('name')}: {child.get('message')}\n{child.text}"
            results.failures.setdefault(name, []).append(text)
        if not bad:
            results.passed[name] = results.passed.get(name, 0) + 1
