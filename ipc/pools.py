"""Runs in: a process that forks many others which are to share its memory.

CPython puts small objects of a size into pools, and what is made next goes into the holes of old ones: a
child that makes twenty objects writes to twenty pages and more, each its own from then on. `fill` stops the
holes, so that what is made afterwards, here and in the children, stands together. An interpreter with
another allocator keeps some objects for nothing.
"""

from __future__ import annotations

POOL = 16 * 1024  # bytes, aligned (obmalloc.c, with the radix tree that 64-bit builds have)
HEADER = 48  # bytes of a pool before its first object
LARGEST = 512  # bytes of an object that stands in a pool
STEP = 16
LIMIT = 1 << 15  # objects of one size: more holes than this are left


def fill() -> list[object]:
    """Return objects that fill all holes, to be kept."""
    kept: list[object] = []
    for size in range(2 * STEP, LARGEST + 1, STEP):
        _fill(size, kept)
    return kept


def _fill(size: int, kept: list[object]) -> None:
    empty = bytes(0).__sizeof__()
    for number in range(LIMIT):
        # An int of two digits is the one thing of 32 bytes that no free list hands out.
        filler: object = bytes(size - empty) if size > empty else (1 << 40) + number
        kept.append(filler)
        if id(filler) % POOL == HEADER:
            return
