"""Everybody dies when an end is told, and before `delete` of the OCI runtime: the next ones delete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ipc.cri import api_pb2 as cri
from tests.crash.crash_world import World
from tests.crash.worlds import world_of_its_own
from tests.support.daemon import wait_for

#: A runtime that deletes nothing as long as a file is there.
HOLDING = """#!/bin/sh
case " $* " in *" delete "*) while [ -e {hold} ]; do sleep 0.02; done;; esac
exec crun "$@"
"""


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """While it is there the runtime waits with every `delete`."""
    return tmp_path / "hold"


@pytest.fixture
def world(tmp_path: Path, hold: Path) -> Iterator[World]:
    runtime = tmp_path / "crun"
    runtime.write_text(HOLDING.format(hold=hold))
    runtime.chmod(0o755)
    with world_of_its_own("bhtidy0", config=f'[runtimes.crun]\npath = "{runtime}"\n') as world:
        yield world


def pid_of(world: World, name: str) -> int:
    return next((one.pid for one in world.node.workers() if one.name == name), 0)


def test_an_end_that_was_told_is_tidied_up_though_everybody_died(world: World, hold: Path) -> None:
    hold.touch()
    name = world.fresh("tidy")
    pod = world.run_pod(name)
    container = world.create(pod, name, ["sh", "-c", "exit 3"])
    world.start(container)
    directory = world.node.run_root / "monitors" / container
    wait_for((directory / "exit.json").exists, "it is told")
    monitor = psutil.Process(int((directory / "lock").read_text().split()[0]))
    family = wait_for(lambda: [*monitor.children(recursive=True)], "who deletes the runtime's state")
    world.node.kill()
    for process in (monitor, *family):
        with contextlib.suppress(psutil.NoSuchProcess):  # the runtime dies with its parent
            process.kill()
    state = f"runtimes/*/{container}"
    assert list(world.node.run_root.glob(state)), "it is still there"
    hold.unlink()
    world.node.start()
    wait_for(lambda: not list(world.node.run_root.glob(state)), "the runtime's state is gone")
    request = cri.ContainerStatusRequest(container_id=container)
    assert world.node.runtime.ContainerStatus(request, timeout=10).status.exit_code == 3
    wait_for(lambda: not pid_of(world, f"monitor {container}"), "who has tidied up ends")
    world.recovered()
    world.check_witness()
    world.stop_pod(pod)
    world.remove_pod(pod)
