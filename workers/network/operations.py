"""Runs in: children of network, one for each of these functions.

What is done to a pod, blocking: `setup` makes one, `teardown` ends one, whole or half made, `check` asks its
plugins. Each holds the pod's lock and leaves either a whole pod, nothing, or
a record that says what is to be undone. A failure that left things in order is returned; anything that is
raised, or kills the child, makes the worker tear down what was begun.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from ipc import log
from ipc.errors import Code, RemoteError, internal, not_found, precondition
from ipc.messages import Body, IdMapping
from ipc.messages.network import PodNetwork
from workers.network import namespaces
from workers.network.chain import Chain
from workers.network.conflist import Network
from workers.network.records import ADDING, READY, REMOVING, Record, Records
from workers.network.results import PluginError, PluginTimeout, addresses

T = TypeVar("T")


class Places(Body):
    """Where things are and how long they may take: what a child needs of the settings."""

    records: str
    pins: str
    bin_dirs: list[str]
    setup_timeout: float
    teardown_timeout: float
    boot_id: str

    def pin_directory(self, pod_id: str) -> str:
        """Where a pod's namespaces are pinned."""
        return os.path.join(self.pins, pod_id)


class Plan(Body):
    """A pod that is to be made; everything in it has been checked."""

    pod_id: str
    namespaces: list[str]
    hostname: str = ""
    sysctls: dict[str, str] = {}
    network: Network | None = None
    no_network: str = ""  # why there is none
    args: str = ""
    runtime_config: dict[str, object] = {}
    uid_mappings: list[IdMapping] = []
    gid_mappings: list[IdMapping] = []


class Failure(Body):
    """A RemoteError on its way from a child."""

    code: str
    text: str
    reason: str = ""

    def error(self) -> RemoteError:
        """The error itself."""
        return RemoteError(Code(self.code), self.text, reason=self.reason)


class Outcome(Body):
    """What a child tells. `network` is set when the pod stands; `failure` when things are in order again."""

    network: PodNetwork | None = None
    failure: Failure | None = None


def _told(step: Callable[[], PodNetwork | None]) -> bytes:
    """Run a step and encode its outcome; a RemoteError of it is a failure that left things in order."""
    try:
        outcome = Outcome(network=step())
    except RemoteError as error:
        outcome = Outcome(failure=Failure(code=error.code.value, text=error.text, reason=error.reason))
    return msgspec.msgpack.encode(outcome)


def setup(places: Places, plan: Plan, deadline: float) -> bytes:
    """Answer from the record, or undo what an earlier attempt left, then make the namespaces and ADD.

    On failure DEL has run and the namespaces are gone. `deadline` is ADD's.
    """
    return _told(lambda: _begin(places, plan) or _attach(places, plan.pod_id, deadline))


def _begin(places: Places, plan: Plan) -> PodNetwork | None:
    """Record, make and pin. Returns the pod if nothing is left to be done."""
    records = Records(places.records)
    with records.lock(plan.pod_id) as lock:
        record = records.load(plan.pod_id)
        if record is not None and _stands(record, places):
            return pod_network(record)
        _clear(places, plan.pod_id, record, lock.fd)
        record = _new_record(places, plan, lock.fd)
        records.save(record)
        try:
            mappings = (plan.uid_mappings, plan.gid_mappings)
            namespaces.make(
                record.namespaces, hostname=plan.hostname, sysctls=plan.sysctls, mappings=mappings
            )
        except (RemoteError, OSError) as error:
            _forget(places, plan.pod_id)
            raise _as_remote(error, "the pod's namespaces cannot be made") from None
        if record.network is None:
            record = msgspec.structs.replace(record, state=READY)
            records.save(record)
            return pod_network(record)
    return None


def _stands(record: Record, places: Places) -> bool:
    pins = record.namespaces.values()
    return (
        record.state == READY
        and record.boot_id == places.boot_id
        and all(namespaces.pinned(path) for path in pins)
    )


def _new_record(places: Places, plan: Plan, lock_fd: int) -> Record:
    network = None
    if "net" in plan.namespaces:
        if plan.network is None:
            raise RemoteError(Code.UNAVAILABLE, plan.no_network, reason="NetworkPluginNotReady")
        network = _negotiated(places, plan.network, lock_fd)
    return Record(
        pod_id=plan.pod_id,
        state=ADDING,
        namespaces=namespaces.paths(places.pin_directory(plan.pod_id), plan.namespaces),
        network=network,
        args=plan.args,
        runtime_config=plan.runtime_config,
        boot_id=places.boot_id,
    )


def _negotiated(places: Places, network: Network, lock_fd: int) -> Network:
    chain = Chain(
        network, places.bin_dirs, deadline=time.monotonic() + places.teardown_timeout, lock_fd=lock_fd
    )
    try:
        return chain.negotiated()
    except PluginError as error:
        raise error.remote() from None


def _attach(places: Places, pod_id: str, deadline: float) -> PodNetwork:
    records = Records(places.records)
    with records.lock(pod_id) as lock:
        record = records.load(pod_id)
        if record is None or record.network is None:
            raise internal(f"the record of pod {pod_id} is gone from {places.records}")
        try:
            ready = _added(record, Chain(record.network, places.bin_dirs, deadline=deadline, lock_fd=lock.fd))
            records.save(ready)
        except (PluginError, OSError) as error:
            raise _after_failure(places, record, lock.fd, _as_remote(error, "ADD")) from None
    return pod_network(ready)


def _added(record: Record, chain: Chain) -> Record:
    result = chain.add(record)
    ips = addresses(result)
    if not ips:
        log.get().warning("CNI gave the pod no address", pod=record.pod_id, network=chain.network.name)
    return msgspec.structs.replace(record, state=READY, result=result, ips=ips)


def _after_failure(places: Places, record: Record, lock_fd: int, error: RemoteError) -> RemoteError:
    """Undo; return the error to answer. If DEL fails too the record stays, for it is still due."""
    try:
        _delete(places, record, lock_fd)
    except PluginError as second:
        namespaces.unpin(places.pin_directory(record.pod_id))
        text = f"{error.text}; undoing it failed as well and will be tried again: {second.text}"
        return RemoteError(error.code, text, reason=error.reason)
    _forget(places, record.pod_id)
    return error


def teardown(places: Places, pod_id: str) -> bytes:
    """DEL, unpin, forget. A failed DEL leaves record and namespaces, to be called again."""
    return _told(lambda: _remove(places, pod_id))


def _remove(places: Places, pod_id: str) -> None:
    records = Records(places.records)
    with records.lock(pod_id) as lock:
        record = records.load(pod_id)
        if record is not None and record.state != REMOVING:
            record = msgspec.structs.replace(record, state=REMOVING)
            try:
                records.save(record)
            except OSError as error:  # a full disk: removal is what helps
                log.get().warning("a pod's removal is not written down", pod=pod_id, why=error)
        _clear(places, pod_id, record, lock.fd)


def _clear(places: Places, pod_id: str, record: Record | None, lock_fd: int) -> None:
    """DEL what the record tells of and forget the pod. Raises RemoteError if DEL fails."""
    if record is not None:
        try:
            _delete(places, record, lock_fd)
        except PluginError as error:
            raise error.remote() from None
    _forget(places, pod_id)


def _delete(places: Places, record: Record, lock_fd: int) -> None:
    if record.network is None:
        return
    deadline = time.monotonic() + places.teardown_timeout
    chain = Chain(record.network, places.bin_dirs, deadline=deadline, lock_fd=lock_fd)
    netns_gone = not namespaces.pinned(record.namespaces["net"])
    try:
        chain.delete(record, netns_gone=netns_gone)
    except PluginError as error:
        if record.result is not None or isinstance(error, PluginTimeout):
            raise
        # Of an ADD that was cut short: plugins stumble once over what they had not made yet, when the rest is
        # already gone (bridge over its masquerading chain), and then find nothing left to do.
        log.get().info("DEL of a half-made pod is repeated", pod=record.pod_id, why=error.text)
        chain.delete(record, netns_gone=netns_gone)


def _forget(places: Places, pod_id: str) -> None:
    namespaces.unpin(places.pin_directory(pod_id))
    Records(places.records).remove(pod_id)


def check(places: Places, pod_id: str) -> bytes:
    """CHECK; the failure is FAILED_PRECONDITION with the plugin's sentence."""
    return _told(lambda: _check(places, pod_id))


def _check(places: Places, pod_id: str) -> None:
    records = Records(places.records)
    with records.lock(pod_id) as lock:
        record = records.load(pod_id)
        if record is None:
            raise not_found(f"pod {pod_id} has no network")
        if record.state != READY:
            raise precondition(f"the network of pod {pod_id} is not ready: {record.state}")
        _check_pins(record)
        if record.network is not None:
            deadline = time.monotonic() + places.teardown_timeout
            _run_check(Chain(record.network, places.bin_dirs, deadline=deadline, lock_fd=lock.fd), record)


def _check_pins(record: Record) -> None:
    for name, path in record.namespaces.items():
        if not namespaces.pinned(path):
            raise precondition(f"the {name} namespace of pod {record.pod_id} is gone from {path}")


def _run_check(chain: Chain, record: Record) -> None:
    try:
        chain.check(record)
    except PluginError as error:
        raise precondition(error.text) from None


def pod_network(record: Record) -> PodNetwork:
    """What is answered of a pod that stands."""
    result = b"" if record.result is None else msgspec.json.encode(record.result)
    return PodNetwork(ips=record.ips, namespaces=record.namespaces, cni_result=result)


def _as_remote(error: RemoteError | PluginError | OSError, what: str) -> RemoteError:
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, PluginError):
        return error.remote()
    if error.errno is not None and error.filename is not None:
        return internal(f"{what}: {error.filename}: {error.strerror}")
    return internal(f"{what}: {error.strerror or error}")


def decode(data: bytes) -> Outcome:
    """Read what a child told."""
    return msgspec.msgpack.decode(data, type=Outcome)
