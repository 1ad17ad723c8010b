"""Runs in: the tests, each world in a process of its own. Nodes with a witness, side by side.

Most of a cell of the matrix is waiting: for a process that starts again, for one that stands still for ten
seconds, for a grace period. So several nodes, each in namespaces of its own, take cells from one queue. A
node in which something was lost is thrown away: what it says afterwards would be no news.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING

from tests.crash.blows import Blow, Step, Tally, steps_of, strike
from tests.crash.crash_world import World, witnessed
from tests.crash.operations import OPERATIONS
from tests.support import machine
from tests.support.daemon import Node
from tests.support.images import Served, served

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

#: A past that is forgotten at once: the next worker starts without a delay.
CONFIG = "[restart]\nfailed_deaths = 10000\nmax_delay = 1.0\nreset_after = 0.0\n[timeouts]\nping = 1.0\n"
#: How a cell's blows are chosen from the steps of its victim.
Choose = Callable[["Cell", list[Step]], list[Blow]]


@dataclass(frozen=True)
class Cell:
    """One victim in one operation; `stops`: those that stand still, and nothing else."""

    victim: str
    operation: str
    stops: bool
    count: int  # of each signal


@dataclass(frozen=True)
class Outcome:
    """What came of a cell."""

    cell: Cell
    tally: Tally
    takes_part: bool


@contextlib.contextmanager
def world_of_its_own(
    bridge: str = "bhcrash0", images: Served | None = None, config: str = ""
) -> Iterator[World]:
    """A node with a witness; `config` is added to that of worlds."""
    with contextlib.ExitStack() as stack:
        images = images or stack.enter_context(served())
        config = CONFIG + config
        node = stack.enter_context(Node(config=config, registries=images.registries_conf, bridge=bridge))
        world = World(node, images.busybox, images.larger)
        world.wake("image")
        with witnessed(world):
            yield world


def run(
    cells: Sequence[Cell], worlds: int, choose: Choose, deadline: float, keep: Path | None
) -> Iterator[Outcome]:
    """Do the cells in so many worlds; no cell is begun after `deadline` (monotonic)."""
    context = multiprocessing.get_context("spawn")
    todo: Queue[Cell] = context.Queue()
    done: Queue[Outcome] = context.Queue()
    for cell in cells:
        todo.put(cell)
    lives = [context.Process(target=_live, args=(todo, done, choose, deadline, keep)) for _ in range(worlds)]
    for life in lives:
        life.start()
    left = len(cells)
    while left and any(life.is_alive() for life in lives):
        with contextlib.suppress(Empty):
            yield done.get(timeout=1.0)
            left -= 1
    for life in lives:
        life.join()


def _live(
    todo: Queue[Cell], done: Queue[Outcome], choose: Choose, deadline: float, keep: Path | None
) -> None:
    """The life of a process: worlds, one after the other, until there is nothing to do."""
    os.umask(0o022)
    machine.enter()
    with served() as images:
        while _one_world(images, todo, done, choose, deadline, keep):
            pass


def _one_world(
    images: Served,
    todo: Queue[Cell],
    done: Queue[Outcome],
    choose: Choose,
    deadline: float,
    keep: Path | None,
) -> bool:
    """Do cells until one of them loses something, True, or none is left."""
    cell: Cell | None = None
    with contextlib.suppress(_Lost), world_of_its_own(images=images) as world:
        while time.monotonic() < deadline and (cell := _next(todo)):
            outcome = _do(world, cell, choose)
            done.put(outcome)
            if outcome.tally.lost:
                _keep(world, cell, outcome, keep)
                raise _Lost
        return False
    return True


class _Lost(Exception):
    """This world is over."""


def _next(todo: Queue[Cell]) -> Cell | None:
    with contextlib.suppress(Empty):
        return todo.get(timeout=0.2)
    return None


def _do(world: World, cell: Cell, choose: Choose) -> Outcome:
    operation = next(one for one in OPERATIONS if one.name == cell.operation)
    tally, blow, began = Tally(), None, time.monotonic()
    steps: list[Step] = []
    try:
        steps = steps_of(world, operation, cell.victim)
        for blow in choose(cell, steps):
            if strike(world, operation, blow) or strike(world, operation, blow.at_another_moment()):
                tally.add(blow)
    except Exception:  # noqa: BLE001 - whatever goes wrong is what the table is about
        tally.lost.append(f"{blow or cell.victim} in {cell.operation}: {traceback.format_exc()}")
    tally.seconds = time.monotonic() - began
    return Outcome(cell, tally, bool(steps) or bool(tally.lost))


def _keep(world: World, cell: Cell, outcome: Outcome, keep: Path | None) -> None:
    """Tell what was lost, and put the daemon's log aside."""
    print(f"LOST {outcome.tally.lost[-1]}\n{world.node.log_tail(40)}", file=sys.stderr, flush=True)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        name = f"{cell.victim}-{cell.operation}-{os.getpid()}-{time.time():.0f}.log".replace(" ", "_")
        shutil.copy(world.node.root / "daemon.log", keep / name)
