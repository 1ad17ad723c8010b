"""The heap after a burst: what is free goes back, and a worker that needs its memory is left in peace."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ipc import kernel
from ipc.heap import SLACK, Heap

BURST = """
from ipc.heap import Heap
found = Heap()
found.settle()
least = found.resident()
pieces = [bytes(2000) for _ in range(40_000)]
kept = pieces[::200]  # so that the heap does not shrink from its end
del pieces
held = found.resident() - least
assert held > 40 << 20, held
assert found.settle()
assert found.resident() - least < 8 << 20, found.resident() - least
"""


def test_what_a_burst_left_goes_back_to_the_kernel() -> None:
    subprocess.run([sys.executable, "-c", BURST], check=True, timeout=60)


def test_it_is_looked_at_after_growth_at_once_and_without_any_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [10 << 20]
    monkeypatch.setattr(Heap, "resident", lambda _heap: sizes[0])
    monkeypatch.setattr(kernel, "trim_heap", lambda: None)
    found = Heap()
    assert not any(found.settle() for _ in range(20))
    sizes[0] += SLACK + 1
    looks = [found.settle() for _ in range(60)]
    assert looks[0]
    assert 5 < sum(looks) < 12
    sizes[0] += SLACK + 1
    assert found.settle()
    sizes[0] = 5 << 20
    assert not any(found.settle() for _ in range(20))


def test_without_proc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    found = Heap()
    assert (found.resident(), found.settle()) == (0, False)
