"""Who forks monitors and inits hangs or dies in the middle of it, or the supervisor does: no request fails
that need not, nothing stays behind, and no monitor is where somebody ends it together with the service."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipc.blocking import Client
from ipc.errors import RemoteError
from ipc.messages import monitor
from ipc.messages import supervisor as messages
from supervisor.cgroup import instance_name
from supervisor.nursery import ANSWER_TIMEOUT
from tests.support.faults import Strace
from tests.support.supervisor_process import Instance, eventually, running

POD, FIRST, SECOND = "p" * 12, "c" * 12, "d" * 12


@pytest.fixture
def instance() -> Iterator[Instance]:
    with running() as made:
        start_monitor(made, FIRST)
        yield made
        with made.client() as client:
            for container in (FIRST, SECOND):
                end_monitor(made, client, container)
        assert outside(made) <= {nursery(made)}


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


def nursery(instance: Instance) -> int:
    """Its pid, 0 while there is none."""
    return next((row.pid for row in instance.workers("nursery")), 0)


def start_monitor(instance: Instance, container: str) -> int:
    with instance.client() as client:
        return client.call(messages.MonitorStart(container_id=container, pod_id=POD)).pid


def start_init(instance: Instance, _: str) -> int:
    with instance.client() as client:
        return client.call(messages.InitStart(pod_id=POD)).pid


def end_monitor(instance: Instance, client: Client, container: str) -> None:
    with Client(f"{instance.run_root}/monitors/{container}/ctl.sock", timeout=5) as own:
        own.call(monitor.Delete())
    request = messages.MonitorList(container_id=container)
    eventually(lambda: not client.call(request).monitors[0].alive)
    client.call(messages.MonitorRemove(container_id=container))


def outside(instance: Instance) -> set[int]:
    """Every process that lives in the monitors' group, known to the supervisor or not."""
    name = f"/{instance_name(str(instance.run_root))}.monitors"
    texts = [Path(group, "cgroup.procs").read_text() for group in instance.groups() if group.endswith(name)]
    return {pid for text in texts for pid in map(int, text.split()) if alive(pid)}


def end_the_service(instance: Instance) -> None:
    """As `systemctl kill --kill-whom=all` does: everybody in the service's own groups, whatever he does."""
    with contextlib.suppress(ProcessLookupError):
        instance.signal(signal.SIGKILL)
    for group in instance.groups():
        if ".monitors" not in group:
            for word in Path(group, "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(word), signal.SIGKILL)
    instance.wait()


def test_one_that_hangs_is_replaced_within_the_request(instance: Instance) -> None:
    asks: list[Callable[[Instance, str], int]] = [start_monitor, start_init]
    for ask in asks:
        before = nursery(instance)
        os.kill(before, signal.SIGSTOP)
        began = time.monotonic()
        assert alive(ask(instance, SECOND))
        assert ANSWER_TIMEOUT <= time.monotonic() - began < ANSWER_TIMEOUT + 3
        assert not alive(before)
    with instance.client() as client:
        client.call(messages.InitStop(pod_id=POD))
    monitors = {start_monitor(instance, FIRST), start_monitor(instance, SECOND)}
    assert outside(instance) == {*monitors, nursery(instance)}


@pytest.mark.parametrize("call", ["clone", "wait4", "pwrite64"])
def test_one_that_dies_while_it_forks_fails_no_request(instance: Instance, call: str) -> None:
    child = call == "pwrite64"  # what is between its two forks writes down who holds the lock
    before = nursery(instance)
    with Strace(before, "signal=KILL", nth=1, calls=call, follow=child) as strace:
        second = start_monitor(instance, SECOND)
        eventually(lambda: not alive(before))
    assert strace.happened
    first = start_monitor(instance, FIRST)
    eventually(lambda: first != second and outside(instance) - {nursery(instance)} == {first, second})
    start_monitor(instance, "e" * 12)  # by another nursery, if this one has died with its answer
    with instance.client() as client:
        end_monitor(instance, client, "e" * 12)


def test_a_monitor_whose_supervisor_dies_before_it_knows_of_it_is_the_next_ones(instance: Instance) -> None:
    first = start_monitor(instance, FIRST)
    with Strace(instance.pid, "signal=KILL", nth=1, calls="recvfrom", follow=False) as strace:
        with pytest.raises(RemoteError):
            start_monitor(instance, SECOND)
        end_the_service(instance)
    assert strace.happened
    eventually(lambda: len(outside(instance)) == 2)
    (second,) = outside(instance) - {first}
    instance.start()
    assert start_monitor(instance, SECOND) == second
    start_monitor(instance, "e" * 12)
    with instance.client() as client:
        end_monitor(instance, client, "e" * 12)


def test_a_monitor_that_is_being_forked_when_the_supervisor_dies_is_none(instance: Instance) -> None:
    first = start_monitor(instance, FIRST)
    failures: list[RemoteError] = []

    def ask() -> None:
        with pytest.raises(RemoteError) as caught:
            start_monitor(instance, SECOND)
        failures.append(caught.value)

    with Strace(nursery(instance), "delay_enter=700000", nth=1, calls="pwrite64"):
        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: len(outside(instance)) == 4)  # with the nursery, and with who is between the forks
        end_the_service(instance)
        asking.join(10)
        eventually(lambda: outside(instance) == {first})
    assert len(failures) == 1
    instance.start()
    second = start_monitor(instance, SECOND)
    eventually(lambda: outside(instance) == {first, second, nursery(instance)})
