"""Runs in: network.

Pods in this worker's hands: checks what is asked, lets children do it (workers.network.operations), answers.
It owns the order: one operation per pod at a time, GC before the first ADD. An operation that began goes
to its end, whether or not anybody still waits for the answer; a child that ends without a word is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ipc import log
from ipc.errors import RemoteError
from ipc.loop import Loop
from ipc.messages import Body, Empty
from ipc.messages.network import PodCheck, PodList, PodSetup, PodsListed, PodTeardown
from ipc.serve import Call
from workers.network import namespaces, operations, sysctl
from workers.network.capabilities import cni_args, runtime_config
from workers.network.children import Children, Ended
from workers.network.confdir import Selection
from workers.network.garbage import Garbage
from workers.network.lanes import Done, Lanes
from workers.network.operations import Outcome, Places, Plan
from workers.network.records import Records, check_pod_id


class Pods:
    """Handlers of the messages about pods."""

    def __init__(
        self, children: Children, places: Callable[[], Places], network: Callable[[], Selection]
    ) -> None:
        self._children = children
        self._places = places
        self._network = network
        self._lanes = Lanes()
        self._garbage = Garbage(children, places)

    def setup(self, call: Call, body: PodSetup) -> None:
        """network.pod.setup"""
        plan = make_plan(body)
        self._lanes.submit(body.pod_id, lambda done: self._setup(call, plan, done))

    def teardown(self, call: Call, body: PodTeardown) -> None:
        """network.pod.teardown"""
        pod_id = check_pod_id(body.pod_id)
        self._lanes.submit(pod_id, lambda done: self._simple(call, operations.teardown, pod_id, done))

    def check(self, call: Call, body: PodCheck) -> None:
        """network.pod.check"""
        pod_id = check_pod_id(body.pod_id)
        self._lanes.submit(pod_id, lambda done: self._simple(call, operations.check, pod_id, done))

    def list(self, _call: Call, _body: PodList) -> PodsListed:
        """network.pod.list"""
        places = self._places()
        found = {*Records(places.records).pods(), *namespaces.pods(places.pins)}
        return PodsListed(pods=sorted(found))

    def doing(self) -> str:
        """What the worker is at, for its health."""
        busy = self._lanes.busy()
        return f"network of {len(busy)} pods" if busy else ""

    def waiting(self) -> int:
        """Operations that wait for others on the same pod."""
        return self._lanes.waiting()

    def _simple(self, call: Call, function: Callable[[Places, str], bytes], pod_id: str, done: Done) -> None:
        places = self._places()

        def ended(outcome: bytes | RemoteError) -> None:
            _answer(call, _read(outcome))
            done()

        if call.done:
            done()
            return
        call.doing = f"{function.__name__} of {pod_id}"
        limit = places.teardown_timeout
        self._children.start(function, places, pod_id, ended=ended, timeout=limit, of=f"pod {pod_id}")

    def _setup(self, call: Call, plan: Plan, done: Done) -> None:
        if call.done:
            done()
            return
        if "net" in plan.namespaces:
            selection = self._network()
            plan = msgspec.structs.replace(plan, network=selection.network, no_network=selection.message)
        _Setup(self._children, self._garbage, call, self._places(), plan, done).begin()


@dataclass
class _Setup:
    """A pod being made: after GC, if that is due, its namespaces and ADD in one child, then the answer."""

    children: Children
    garbage: Garbage
    call: Call
    places: Places
    plan: Plan
    done: Done
    deadline: float = 0.0

    def begin(self) -> None:
        """First GC, which would take what ADD is given."""
        self.deadline = Loop.time() + self._limit()
        self.call.doing = f"CNI GC before {self.plan.pod_id}"
        if self.plan.network is None:
            self._make()
        else:
            self.garbage.before(self.plan.network, self._make)

    def _make(self) -> None:
        self.call.doing = f"namespaces and CNI ADD of {self.plan.pod_id}"
        self._start(operations.setup, self.plan, self.deadline, ended=self._made)

    def _limit(self) -> float:
        left = self.call.remaining
        return self.places.setup_timeout if left is None else min(self.places.setup_timeout, left)

    def _start(self, function: Callable[..., bytes], *args: object, ended: Ended) -> None:
        # The deadline is ADD's; DEL of what failed has its own time after it.
        timeout = self._limit() + 2 * self.places.teardown_timeout
        of = f"pod {self.plan.pod_id}"
        self.children.start(function, self.places, *args, ended=ended, timeout=timeout, of=of)

    def _made(self, outcome: bytes | RemoteError) -> None:
        answer = _read(outcome)
        if isinstance(answer, RemoteError):
            self._undo(answer)
        else:
            self._finish(answer)

    def _undo(self, why: RemoteError) -> None:
        log.get().warning("pod network cut short", pod=self.plan.pod_id, why=why)
        self.call.doing = f"undoing the network of {self.plan.pod_id}"

        def undone(outcome: bytes | RemoteError) -> None:
            answer = _read(outcome)
            failure = answer if isinstance(answer, RemoteError) else answer.failure
            if failure is not None:
                log.get().error("pod network not undone", pod=self.plan.pod_id, why=failure.text)
            self._finish(why)

        self._start(operations.teardown, self.plan.pod_id, ended=undone)

    def _finish(self, answer: Outcome | RemoteError) -> None:
        _answer(self.call, answer)
        self.done()


def make_plan(body: PodSetup) -> Plan:
    """Return what is to be made. Raises INVALID_ARGUMENT naming what is wrong."""
    wanted = list(dict.fromkeys(body.namespaces))
    check_pod_id(body.pod_id)
    namespaces.check(wanted, body.hostname, (body.uid_mappings, body.gid_mappings))
    sysctl.check(body.sysctls, wanted)
    networked = "net" in wanted
    return Plan(
        pod_id=body.pod_id,
        namespaces=wanted,
        hostname=body.hostname,
        sysctls=body.sysctls,
        uid_mappings=body.uid_mappings,
        gid_mappings=body.gid_mappings,
        args=cni_args(body) if networked else "",
        runtime_config=runtime_config(body) if networked else {},
    )


def _read(outcome: bytes | RemoteError) -> Outcome | RemoteError:
    return outcome if isinstance(outcome, RemoteError) else operations.decode(outcome)


def _answer(call: Call, answer: Outcome | RemoteError) -> None:
    if isinstance(answer, RemoteError):
        call.fail(answer)
    elif answer.failure is not None:
        call.fail(answer.failure.error())
    else:
        body: Body = answer.network or Empty()
        call.reply(body)
