"""Monitors and workers of earlier releases are understood, and what this one says they understand: golden
frames.

When a field is added to a message or a record it is listed in ADDED, by the release whose frames lack it; the
frames of a release that is not out yet are recorded again instead. A field that is renamed, removed or given
another type makes these tests fail, and that is what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import golden

SAMPLES = golden.samples()
RECORDED = golden.recorded()
AGAIN = "python -m tests.support.golden RELEASE"
#: (release, frame) -> fields, with their places, that came after that release.
ADDED: dict[tuple[str, str], set[str]] = {}


def additions(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Places in `new` that `old` does not have. Raises AssertionError for anything else that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        assert old.keys() <= new.keys(), f"{place}: {old.keys() - new.keys()} is gone"
        for key, value in new.items():
            here = f"{place}.{key}".lstrip(".")
            if key in old:
                yield from additions(old[key], value, here)
            else:
                yield here
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for before, after in zip(old, new, strict=True):
            yield from additions(before, after, place)
    else:
        assert old == new, f"{place}: {old!r} was written, now it is {new!r}"


@pytest.mark.parametrize("release", RECORDED)
def test_everything_that_a_release_has_written_is_read_today_and_nothing_of_it_lost(release: str) -> None:
    frames = RECORDED[release]
    assert frames.keys() <= SAMPLES.keys(), "a message or a record is gone"
    for name, data in frames.items():
        today = SAMPLES[name]
        again = today.write(today.read(data))
        assert again == data, f"{release} {name}"


@pytest.mark.parametrize("release", RECORDED)
def test_what_is_written_today_is_what_a_release_has_written_but_for_listed_additions(release: str) -> None:
    for name, data in RECORDED[release].items():
        found = set(additions(golden.plain(data), golden.plain(SAMPLES[name].data)))
        listed = ADDED.get((release, name), set())
        assert found == listed, (
            f"{release} {name}: list it in ADDED, or, of a release that is not out: {AGAIN}"
        )


def test_there_are_frames_of_a_release_of_every_message_and_record() -> None:
    assert RECORDED
    for owner in golden.OWNERS:
        assert any(name.startswith(owner) for frames in RECORDED.values() for name in frames), owner
    for name in (*golden.RECORDS, *golden.ALONE, "error", "vault taken"):
        assert any(name in frames for frames in RECORDED.values()), name


def test_a_reader_passes_over_fields_that_it_does_not_know() -> None:
    for name, kind in golden.RECORDS.items():
        data = golden.json_of(golden.sample(kind))
        later = data[:-1] + b',"novelty":[1,{"deep":2}]}'
        assert SAMPLES[name].read(later) == SAMPLES[name].read(data)


def test_a_changed_field_does_not_pass() -> None:
    with pytest.raises(AssertionError, match="pid"):
        list(additions({"pid": 1}, {"process": 1}))
    with pytest.raises(AssertionError, match="pid"):
        list(additions({"a": [{"pid": 1}]}, {"a": [{"pid": "1"}]}))
    assert list(additions({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}})) == ["a.c"]
