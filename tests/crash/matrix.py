"""Runs in: the tests, and as a program (`make test-crash`). Every process, every operation, every blow.

`python -m tests.crash.matrix` strikes more than a thousand times, prints the table and ends with the line
`N kills, M lost`; with `--write` the table also goes into docs/recovery.md. Lost is what a client or a
container noticed: a wrong answer, a gap in the witness's log, something left behind.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.recovery import medians
from tests.crash.blows import Blow, Step, Tally
from tests.crash.operations import OPERATIONS
from tests.crash.victims import VICTIMS
from tests.crash.worlds import Cell, Outcome, run
from tests.support.daemon import compile_sources

SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "recovery.md"
BEGIN, END = "<!-- the matrix begins -->", "<!-- the matrix ends -->"
Rows = dict[tuple[str, str], Tally]


def spread(steps: list[Step], count: int, shift: float = 0.5) -> list[Step]:
    """`count` of the steps, evenly."""
    if len(steps) <= count:
        return steps
    return [steps[int((index + shift) * len(steps) / count)] for index in range(count)]


def choose(cell: Cell, steps: list[Step]) -> list[Blow]:
    """The blows of a cell: so many of each deadly signal, at different steps, or so many that stop it."""
    shifts = {signal.SIGSTOP: 0.3} if cell.stops else {signal.SIGKILL: 0.25, signal.SIGSEGV: 0.75}
    return [
        Blow(cell.victim, number, step)
        for number, shift in shifts.items()
        for step in spread(steps, cell.count, shift)
    ]


def cells(kills: int, stops: int, only: Sequence[str]) -> list[Cell]:
    """Everything to do; those that take longest first. `only`: victims and operations by name."""
    found = [
        Cell(victim, operation.name, stopping, stops if stopping else kills)
        for stopping in (True, False)
        for victim in VICTIMS
        for operation in OPERATIONS
        if (stops if stopping else kills)
    ]
    victims, operations = [one for one in only if one in VICTIMS], [one for one in only if one not in VICTIMS]
    return [
        cell
        for cell in found
        if cell.victim in (victims or VICTIMS) and (not operations or cell.operation in operations)
    ]


def gather(outcomes: Sequence[Outcome]) -> Rows:
    """The outcomes of the cells, by victim and operation."""
    rows: Rows = {}
    for outcome in outcomes:
        tally = rows.setdefault((outcome.cell.victim, outcome.cell.operation), Tally())
        tally.lost += outcome.tally.lost
        for name, count in outcome.tally.blows.items():
            tally.blows[name] = tally.blows.get(name, 0) + count
    return rows


def table(rows: Rows) -> str:
    """The matrix in Markdown: a row per process, a column per operation, KILL/SEGV/STOP in a cell."""
    names = [operation.name for operation in OPERATIONS]
    lines = [f"| | {' | '.join(names)} | lost |", f"|{'---|' * (len(names) + 2)}"]
    for victim in VICTIMS:
        tallies = [rows.get((victim, name), Tally()) for name in names]
        lost = sum(len(tally.lost) for tally in tallies)
        lines.append(f"| {victim} | {' | '.join(map(_cell, tallies))} | {lost} |")
    kills = sum(sum(tally.blows.values()) for tally in rows.values())
    lost = sum(len(tally.lost) for tally in rows.values())
    return "\n".join([*lines, "", f"{kills} kills, {lost} lost"])


def _cell(tally: Tally) -> str:
    counts = [tally.blows.get(number.name, 0) for number in SIGNALS]
    return "/".join(map(str, counts)) if any(counts) else "-"


def write(text: str) -> None:
    """Put the table into its page."""
    page = PAGE.read_text()
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def tell(text: str, *, write_too: bool) -> None:
    """Print it, and put it into its page."""
    print(text, flush=True)
    if write_too:
        write(text)


def show(outcome: Outcome) -> Outcome:
    """A line for a cell that is done."""
    cell, tally = outcome.cell, outcome.tally
    what = "stands still" if cell.stops else "dies"
    said = f"{tally.blows} lost {len(tally.lost)}" if outcome.takes_part else "takes no part"
    print(f"{cell.victim} {what} in {cell.operation}: {said} ({tally.seconds:.1f} s)", flush=True)
    return outcome


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Strike every process in every phase of every operation.")
    parser.add_argument("--kills", type=int, default=6, help="of each deadly signal, in every cell")
    parser.add_argument("--stops", type=int, default=1, help="ten-second stops in every cell")
    parser.add_argument("--only", nargs="*", default=[], help="these victims and operations alone")
    parser.add_argument("--worlds", type=int, default=6, help="nodes side by side")
    parser.add_argument("--minutes", type=float, default=30.0, help="no new cell after that")
    parser.add_argument(
        "--keep", type=Path, help="a directory for the logs of nodes in which something was lost"
    )
    parser.add_argument("--write", action="store_true", help="also into docs/recovery.md")
    options = parser.parse_args()
    compile_sources()
    todo = cells(options.kills, options.stops, options.only)
    deadline = time.monotonic() + options.minutes * 60
    rows = gather([show(one) for one in run(todo, options.worlds, choose, deadline, options.keep)])
    text = table(rows)
    tell(text, write_too=options.write)
    if not options.only:  # on its own, when the others have ended
        tell(f"{medians()}\n\n{text}", write_too=options.write)
    return 1 if any(tally.lost for tally in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
