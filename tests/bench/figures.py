"""A figure: ours, the baseline's of the same run, the ratio, and the bound that the project set itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Figure:
    """`bound` is told in words; `holds` says whether this run kept it (None: there is none)."""

    name: str
    ours: str
    baseline: str
    ratio: str
    bound: str
    holds: bool | None = None


def median_seconds(work: Callable[[], object], rounds: int, *, warm: int = 1) -> float:
    """Return the median time of `work` in seconds, after `warm` rounds that do not count."""
    for _ in range(warm):
        work()
    return statistics.median(timed(work) for _ in range(rounds))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def at_most(
    name: str, ours: float, baseline: float, bound: float, unit: str = "ms", scale: float = 1e3
) -> Figure:
    """A figure where less is better and ours/baseline is bounded."""
    ratio = ours / baseline
    return Figure(
        name,
        f"{ours * scale:.1f} {unit}",
        f"{baseline * scale:.1f} {unit}",
        f"{ratio:.2f}",
        f"at most {bound}",
        ratio <= bound,
    )


def show(figures: Sequence[Figure]) -> None:
    """Print the table."""
    header = ("figure", "Bulkhead", "baseline", "ratio", "bound", "kept")
    rows = [header, *((f.name, f.ours, f.baseline, f.ratio, f.bound, _kept(f.holds)) for f in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _kept(holds: bool | None) -> str:
    return "-" if holds is None else "yes" if holds else "NO"
