"""Runs in: the tests. The curves of a soak as a picture (PNG): memory above, descriptors below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from tests.soak.curves import Sample

WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 1000, 320, 70, 120, 30, 40
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
INK, PALE, PAPER = "#222222", "#dddddd", "#ffffff"
Value = Callable[[Sample], float]


def draw(samples: Mapping[str, Sequence[Sample]], path: Path, title: str) -> None:
    """Write the picture."""
    image = Image.new("RGB", (WIDTH, 2 * (HEIGHT + GAP) + TOP), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((LEFT, 8), title, fill=INK)
    _panel(pen, samples, TOP, "anonymous memory, MiB", lambda one: one.memory / 1024)
    _panel(pen, samples, TOP + HEIGHT + GAP, "open descriptors", lambda one: one.descriptors)
    image.save(path, optimize=True)


def _panel(
    pen: ImageDraw.ImageDraw, samples: Mapping[str, Sequence[Sample]], top: int, text: str, value: Value
) -> None:
    every = [one for curve in samples.values() for one in curve]
    longest = max((one.at for one in every), default=1.0)
    highest = _round_up(max((value(one) for one in every), default=1.0))
    right, bottom = WIDTH - RIGHT, top + HEIGHT - 20

    def place(at: float, height: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * at / longest, bottom - (bottom - top - 20) * height / highest

    pen.text((LEFT, top), text, fill=INK)
    for step in range(5):
        height, at = highest * step / 4, longest * step / 4
        pen.line([place(0, height), place(longest, height)], fill=PALE)
        pen.text((8, place(0, height)[1] - 6), f"{height:g}", fill=INK)
        pen.text((place(at, 0)[0] - 10, bottom + 4), f"{at:.0f} s", fill=INK)
    for number, (kind, curve) in enumerate(sorted(samples.items())):
        colour = COLOURS[number % len(COLOURS)]
        for piece in _pieces(curve):
            pen.line([place(one.at, value(one)) for one in piece], fill=colour, width=2)
        pen.text((right + 10, top + 20 + 16 * number), kind, fill=colour)


def _pieces(curve: Sequence[Sample]) -> list[list[Sample]]:
    """A curve per process: where a worker was replaced, a new one begins."""
    pieces: dict[int, list[Sample]] = {}
    for one in curve:
        pieces.setdefault(one.pid, []).append(one)
    return [piece for piece in pieces.values() if len(piece) > 1]


def _round_up(number: float) -> float:
    step = 1.0
    while step * 10 < number:
        step *= 10
    return next(one * step for one in (1, 2, 4, 8, 10, 20) if one * step >= number)
