"""Runs in: the tests, and as a program (`make test-crash`). Every process, every operation, every blow.

`python -m tests.crash.matrix` strikes at least a thousand times, prints the table and ends with the line
`N kills, M lost`; with `--write` the table also goes into docs/recovery.md. Lost is what a client or a
container noticed: a wrong answer, a gap in the witness's log, something left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.crash.blows import Blow, Tally, steps_of, strike
from tests.crash.crash_world import OPERATIONS, Operation, World, witnessed
from tests.support import machine
from tests.support.daemon import Node
from tests.support.images import served

VICTIMS = ("image", "storage", "network", "ops", "stream", "monitor", "cri", "supervisor")
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
CONFIG = "[restart]\nfailed_deaths = 10000\nmax_delay = 1.0\nreset_after = 1.0\n[timeouts]\nping = 1.0\n"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "recovery.md"
BEGIN, END = "<!-- the matrix begins -->", "<!-- the matrix ends -->"
Rows = dict[tuple[str, str], Tally]


@contextlib.contextmanager
def world_of_its_own(bridge: str = "bhcrash0") -> Iterator[World]:
    """A node with a witness."""
    with (
        served() as images,
        Node(config=CONFIG, registries=images.registries_conf, bridge=bridge) as node,
    ):
        world = World(node, images.busybox, images.larger)
        world.wake("image")
        with witnessed(world):
            yield world


def spread(steps: list[tuple[str, int]], count: int, shift: float = 0.5) -> list[tuple[str, int]]:
    """`count` of the steps, evenly."""
    if len(steps) <= count:
        return steps
    return [steps[int((index + shift) * len(steps) / count)] for index in range(count)]


def blows(victim: str, steps: list[tuple[str, int]], kills: int, stops: int) -> Iterator[Blow]:
    """What one cell of the matrix consists of: `kills` of each deadly signal, `stops` of SIGSTOP."""
    for number in SIGNALS:
        count, shift = (stops, 0.3) if number == signal.SIGSTOP else (kills, 0.5)
        for call, nth in spread(steps, count, shift) if count else ():
            yield Blow(victim, number, call, nth)


def cell(world: World, operation: Operation, todo: Iterable[Blow], tally: Tally) -> None:
    """Strike; what is lost is told and the next one is tried."""
    for blow in todo:
        try:
            if strike(world, operation, blow):
                tally.add(blow)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is what the table is about
            tally.add(blow)
            tally.lost.append(f"{blow} in {operation.name}: {error!r}")
            print(f"LOST {tally.lost[-1]}\n{world.node.log_tail(30)}", file=sys.stderr, flush=True)
            world.recovered()


def run(world: World, kills: int, stops: int, deadline: float) -> Rows:
    """The whole matrix, or what of it can be done before `deadline`."""
    rows: Rows = {}
    for victim in VICTIMS:
        for operation in OPERATIONS:
            tally = rows[victim, operation.name] = Tally()
            steps = steps_of(world, operation, victim) or [("", 0)]  # not asked for anything
            todo = blows(victim, steps, kills, stops)
            cell(world, operation, _until(deadline, todo), tally)
            print(f"{victim} {operation.name}: {tally.blows} lost {len(tally.lost)}", flush=True)
    return rows


def _until(deadline: float, todo: Iterable[Blow]) -> Iterator[Blow]:
    for blow in todo:
        if time.monotonic() > deadline:
            return
        yield blow


def table(rows: Rows) -> str:
    """The matrix in Markdown: a row per process, a column per operation, KILL/SEGV/STOP in a cell."""
    names = [operation.name for operation in OPERATIONS]
    lines = [f"| | {' | '.join(names)} | lost |", f"|{'---|' * (len(names) + 2)}"]
    for victim in VICTIMS:
        cells = [rows[victim, name] for name in names]
        lost = sum(len(tally.lost) for tally in cells)
        lines.append(f"| {victim} | {' | '.join(map(_cell, cells))} | {lost} |")
    kills = sum(sum(tally.blows.values()) for tally in rows.values())
    lost = sum(len(tally.lost) for tally in rows.values())
    return "\n".join([*lines, "", f"{kills} kills, {lost} lost"])


def _cell(tally: Tally) -> str:
    return "/".join(str(tally.blows.get(number.name, 0)) for number in SIGNALS)


def write(text: str) -> None:
    """Put the table into its page."""
    page = PAGE.read_text()
    head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Strike every process in every phase of every operation.")
    parser.add_argument("--kills", type=int, default=9, help="of each deadly signal, in every cell")
    parser.add_argument("--stops", type=int, default=1, help="ten-second stops in every cell")
    parser.add_argument("--minutes", type=float, default=90.0, help="no new blow after that")
    parser.add_argument("--write", action="store_true", help="also into docs/recovery.md")
    options = parser.parse_args()
    os.umask(0o022)
    with world_of_its_own() as world:
        rows = run(world, options.kills, options.stops, time.monotonic() + options.minutes * 60)
    text = table(rows)
    print(text)
    if options.write:
        write(text)
    return 1 if any(tally.lost for tally in rows.values()) else 0


if __name__ == "__main__":
    machine.enter()
    sys.exit(main())
