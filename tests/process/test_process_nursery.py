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
        assert outside(made) == set()


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


def members(instance: Instance) -> set[int]:
    """Every process that lives in the monitors' group, known to the supervisor or not."""
    name = f"/{instance_name(str(instance.run_root))}.monitors"
    texts = [Path(group, "cgroup.procs").read_text() for group in instance.groups() if group.endswith(name)]
    return {pid for text in texts for pid in map(int, text.split()) if alive(pid)}


def outside(instance: Instance) -> set[int]:
    """The monitors among them."""
    return {pid for pid in members(instance) if "nursery" not in Path(f"/proc/{pid}/cmdline").read_text()}


def waiting(instance: Instance) -> int:
    """The child that waits in the nursery for its request, 0 while there is none."""
    with instance.client() as client:
        monitors = {one.pid for one in client.call(messages.MonitorList()).monitors}
    others = members(instance) - monitors - {nursery(instance)}
    found = [pid for pid in others if parent(pid) == instance.pid]
    return found[0] if len(found) == 1 else 0  # the last nursery's may still be there for a moment


def end_child(pid: int) -> None:
    """Kill it and see it dead: to take a request may be its last act until then."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid))


def open_files(pid: int) -> list[str]:
    return [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if os.path.lexists(path)]


def parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return 0


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
        before, child = nursery(instance), eventually(lambda: waiting(instance))
        os.kill(before, signal.SIGSTOP)
        end_child(child)
        began = time.monotonic()
        assert alive(ask(instance, SECOND))
        assert ANSWER_TIMEOUT <= time.monotonic() - began < ANSWER_TIMEOUT + 3
        assert not alive(before)
    with instance.client() as client:
        client.call(messages.InitStop(pod_id=POD))
    monitors = {start_monitor(instance, FIRST), start_monitor(instance, SECOND)}
    eventually(lambda: outside(instance) == monitors)


@pytest.mark.parametrize("call", ["clone", "wait4"])
def test_one_that_dies_while_it_forks_fails_no_request(instance: Instance, call: str) -> None:
    eventually(lambda: waiting(instance))  # who gets the next request; then another one is forked
    before = nursery(instance)
    with Strace(before, "signal=KILL", nth=1, calls=call, follow=False) as strace:
        second = start_monitor(instance, SECOND)
        eventually(lambda: not alive(before))
    assert strace.happened
    first = start_monitor(instance, FIRST)
    eventually(lambda: outside(instance) == {first, second})
    start_monitor(instance, "e" * 12)
    with instance.client() as client:
        end_monitor(instance, client, "e" * 12)


def test_a_child_that_dies_before_anybody_knows_it_fails_no_request(instance: Instance) -> None:
    child = eventually(lambda: waiting(instance))
    with Strace(child, "signal=KILL", nth=1, calls="write", follow=False) as strace:
        second = start_monitor(instance, SECOND)
    assert strace.happened
    assert second != child
    first = start_monitor(instance, FIRST)
    eventually(lambda: outside(instance) == {first, second})


def test_a_child_that_was_killed_while_it_waited_fails_no_request(instance: Instance) -> None:
    os.kill(eventually(lambda: waiting(instance)), signal.SIGKILL)
    monitors = {start_monitor(instance, FIRST), start_monitor(instance, SECOND)}
    eventually(lambda: outside(instance) == monitors)


def test_a_monitor_whose_supervisor_dies_before_it_knows_of_it_is_the_next_ones(instance: Instance) -> None:
    first = start_monitor(instance, FIRST)
    child = eventually(lambda: waiting(instance))
    with Strace(instance.pid, "delay_enter=300000", nth=1, calls="read", follow=False) as strace:
        asking = threading.Thread(target=fail_to_start, args=(instance, SECOND))
        asking.start()
        eventually(lambda: outside(instance) == {first, child})  # it has answered: it has a name
        end_the_service(instance)
        asking.join(10)
    assert strace.happened
    eventually(lambda: members(instance) == {first, child})
    instance.start()
    assert start_monitor(instance, SECOND) == child
    start_monitor(instance, "e" * 12)
    with instance.client() as client:
        end_monitor(instance, client, "e" * 12)


def fail_to_start(instance: Instance, container: str) -> None:
    with contextlib.suppress(RemoteError):
        start_monitor(instance, container)


def test_a_monitor_that_is_being_forked_when_the_supervisor_dies_is_none(instance: Instance) -> None:
    first = start_monitor(instance, FIRST)
    child = eventually(lambda: waiting(instance))
    with Strace(child, "delay_enter=700000", nth=1, calls="write", follow=False) as strace:
        asking = threading.Thread(target=fail_to_start, args=(instance, SECOND))
        asking.start()
        eventually(lambda: f"{instance.run_root}/monitors/{SECOND}/lock" in open_files(child))
        end_the_service(instance)
        asking.join(10)
        eventually(lambda: members(instance) == {first})
    assert "(DELAYED)" in strace.text
    instance.start()
    second = start_monitor(instance, SECOND)
    eventually(lambda: outside(instance) == {first, second})
