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
#: Of what pools do not take, code above all.
HEAP_SIZES = (8192, 4096, 2048, 1536, 1280, 1024, 896, 768, 640, 576, 520)
HEAP_LIMIT = 1 << 20  # bytes of each


def fill() -> list[object]:
    """Return objects that fill all holes, to be kept."""
    kept: list[object] = []
    end = id(bytes(64 * 1024))  # larger than most holes, smaller than what malloc maps: at the heap's end
    for size in HEAP_SIZES:
        _fill_heap(size, end, kept)
    for size in range(2 * STEP, LARGEST + 1, STEP):
        _fill_pools(size, kept)
    return kept


def _fill_heap(size: int, end: int, kept: list[object]) -> None:
    for _ in range(HEAP_LIMIT // size):
        filler = bytes(size)
        kept.append(filler)
        if id(filler) >= end:
            return


def _fill_pools(size: int, kept: list[object]) -> None:
    empty = bytes(0).__sizeof__()
    for number in range(LIMIT):
        # An int of two digits is the one thing of 32 bytes that no free list hands out.
        filler: object = bytes(size - empty) if size > empty else (1 << 40) + number
        kept.append(filler)
        if id(filler) % POOL == HEADER:
            return
