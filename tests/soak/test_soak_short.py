"""Two minutes of the soak: memory and descriptors of every process stay where they are, no request fails."""

from __future__ import annotations

from pathlib import Path

from tests.soak.curves import Curves, Sample, growth
from tests.soak.load import Load
from tests.soak.picture import draw
from tests.support.daemon import Node
from tests.support.images import served

SECONDS, AT_ONCE, LEAST_PODS = 120, 8, 60


def test_two_minutes_of_pods_probes_stats_lists_and_pulls_leave_every_process_as_it_was(
    tmp_path: Path,
) -> None:
    with (
        served(larger_files=50) as images,
        Node(registries=images.registries_conf, bridge="bhsoak1", log_level="warning") as node,
    ):
        with Curves(node) as curves:
            done = Load(node, images).run(at_once=AT_ONCE, seconds=SECONDS)
        assert done.errors == []
        assert done.counts["pods"] >= LEAST_PODS
        assert {"probes", "stats", "lists", "pulls"} <= set(done.counts)
        assert {"supervisor", "cri", "storage", "network"} <= set(curves.samples)
        assert growth(curves.samples) == []
    draw(curves.samples, tmp_path / "soak.png", "two minutes")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_a_leak_is_seen_and_work_under_way_is_none(tmp_path: Path) -> None:
    samples = {
        "leaks": [Sample(at, 1, 10_000 + 100 * at, 10) for at in range(60)],
        "opens": [Sample(at, 2, 10_000, 10 + at // 5) for at in range(60)],
        "works": [Sample(at, 3, 10_000 + 5000 * (at % 2), 10 + at % 7) for at in range(60)],
    }
    assert [line.split(":")[0] for line in growth(samples)] == ["leaks", "opens"]
    draw(samples, tmp_path / "three.png", "three")
