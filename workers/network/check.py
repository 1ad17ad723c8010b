"""Runs in: children of network, and of `bulkhead check` while the service is stopped.

What is wrong with what network owns: records and pins of pods that nobody knows, ready pods without their
namespaces, files that an operation left, and addresses which the host-local IPAM plugin holds for nobody.
Also how each is mended: by DEL, for only plugins know what they hold. Nothing is held in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from ipc.errors import RemoteError
from ipc.messages.checking import Finding, Known, left, repaired
from workers.network import namespaces, operations
from workers.network.chain import Chain
from workers.network.conflist import Network
from workers.network.operations import Places
from workers.network.records import READY, Record, Records, check_pod_id
from workers.network.results import PluginError

OWNER = "network"
POD, FILE, ADDRESS = "pod", "file", "address"
HOST_LOCAL = "/var/lib/cni/networks"
#: What an operation that goes on may hold; those that hold longer were left.
_YOUNG = 60.0
_LEFT_BY_OPERATIONS = (".new", ".damaged", ".lock")


def inspect(places: Places, network: Network | None, known: Known) -> list[Finding]:
    """Everything that is wrong. `network`: the one that new pods get."""
    return [
        *_strays(places, known),
        *_ready_pods(places, known),
        *_files(places),
        *_addresses(places, network, known),
    ]


def _strays(places: Places, known: Known) -> Iterator[Finding]:
    found = {*Records(places.records).pods(), *namespaces.pods(places.pins)}
    for pod_id in sorted(found - set(known.pods)):
        finding = _finding(f"pod {pod_id}", "nobody knows it; its network is left", "DEL, unpinned")
        finding.key, finding.subject = f"{POD}:{pod_id}", pod_id
        yield finding


def _ready_pods(places: Places, known: Known) -> Iterator[Finding]:
    records = Records(places.records)
    for pod_id in known.ready:
        trouble = _trouble(records, pod_id)
        if trouble:
            yield _finding(f"pod {pod_id}", trouble)


def _trouble(records: Records, pod_id: str) -> str:
    try:
        with open(records.path(pod_id), "rb") as file:
            record = msgspec.json.decode(file.read(), type=Record)
    except FileNotFoundError:
        return "it is ready, and network has no record of it"
    except (OSError, msgspec.DecodeError) as error:
        return f"its network record: {error}"
    if record.state != READY:
        return f"it is ready, and its network is {record.state}"
    gone = [name for name, path in record.namespaces.items() if not namespaces.pinned(path)]
    return f"its {gone[0]} namespace is not pinned any more" if gone else ""


def _files(places: Places) -> Iterator[Finding]:
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(places.records)):
            path = os.path.join(places.records, name)
            if name.endswith(_LEFT_BY_OPERATIONS) and _is_old(path) and not _is_held(path):
                yield _finding(f"file {path}", "left of an operation", "removed", f"{FILE}:{name}")


def _is_held(path: str) -> bool:
    """Whether an operation that goes on holds it."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
    return False


def _is_old(path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - os.stat(path).st_mtime > _YOUNG
    return False


# -- addresses ------------------------------------------------------------------------------------------


def _addresses(places: Places, network: Network | None, known: Known) -> Iterator[Finding]:
    """What host-local holds, in the networks of ours."""
    for ours in _networks(places, network).values():
        for directory in _directories(ours):
            for address, pod_id in held(directory):
                if pod_id not in known.pods:
                    yield _address(ours, directory, address, pod_id)


def _address(network: Network, directory: str, address: str, pod_id: str) -> Finding:
    holder = pod_id or "nobody"
    finding = _finding(
        f"address {address} of {network.name}", f"held for {holder}, which nobody knows", "DEL; given back"
    )
    finding.key, finding.subject = f"{ADDRESS}:{network.name}:{directory}/{address}", pod_id
    return finding


def _networks(places: Places, network: Network | None) -> dict[str, Network]:
    """By name: those of records, and the one in use."""
    records = Records(places.records)
    found = {}
    for pod_id in records.pods():
        with contextlib.suppress(OSError, msgspec.DecodeError), open(records.path(pod_id), "rb") as file:
            record = msgspec.json.decode(file.read(), type=Record)
            if record.network is not None:
                found[record.network.name] = record.network
    return found | ({network.name: network} if network is not None else {})


def _directories(network: Network) -> Iterator[str]:
    for entry in network.plugins:
        ipam: Any = entry.get("ipam")
        if isinstance(ipam, dict) and ipam.get("type") == "host-local":
            yield os.path.join(str(ipam.get("dataDir") or HOST_LOCAL), network.name)


def held(directory: str) -> Iterator[tuple[str, str]]:
    """Addresses of a network and the container each is held for (host-local's store: a file per address)."""
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(directory)):
            path = os.path.join(directory, name)
            if name[0].isalnum() and (":" in name or name[0].isdigit()) and _is_old(path):
                with open(path, encoding="utf-8", errors="replace") as file:
                    yield name, file.read(512).partition("\n")[0].strip()


# -- mending --------------------------------------------------------------------------------------------


def mend(places: Places, network: Network | None, known: Known, findings: list[Finding]) -> list[Finding]:
    """Mend them one by one; each says what has become of it."""
    for finding in findings:
        kind, _, name = finding.key.partition(":")
        if finding.subject and finding.subject in known.pods:
            left(finding, "it is known by now")
        elif kind == POD:
            _mend_pod(places, name, finding)
        elif kind == FILE:
            _mend_file(places, name, finding)
        elif kind == ADDRESS:
            _mend_address(places, _networks(places, network), name, finding)
        else:
            left(finding, "the pod must be made anew")
    return findings


def _mend_pod(places: Places, pod_id: str, finding: Finding) -> None:
    try:
        outcome = operations.decode(operations.teardown(places, check_pod_id(pod_id)))
    except (RemoteError, OSError) as error:
        left(finding, str(error))
        return
    left(finding, outcome.failure.text) if outcome.failure else repaired(finding)


def _mend_file(places: Places, name: str, finding: Finding) -> None:
    path = os.path.join(places.records, os.path.basename(name))
    if _is_held(path):
        left(finding, "an operation is going on")
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    repaired(finding)


def _mend_address(places: Places, networks: dict[str, Network], name: str, finding: Finding) -> None:
    network_name, _, path = name.partition(":")
    network = networks.get(network_name)
    if network is None or os.path.dirname(path) not in _directories(network):
        left(finding, f"network {network_name} is not configured any more")
        return
    if finding.subject:
        _delete(places, network, finding)
    if os.path.lexists(path):  # DEL of plugins that look for more than the container's id
        os.unlink(path)
    repaired(finding)


def _delete(places: Places, network: Network, finding: Finding) -> None:
    """DEL of a container of which only the id is known; plugins must cope with that (section 4, DEL)."""
    record = Record(pod_id=finding.subject, network=network, namespaces={"net": ""})
    chain = Chain(network, places.bin_dirs, deadline=time.monotonic() + places.teardown_timeout)
    with contextlib.suppress(PluginError):
        chain.delete(record, netns_gone=True)


def _finding(what: str, problem: str, repair: str = "", key: str = "") -> Finding:
    return Finding(owner=OWNER, object=what, problem=problem, repair=repair, key=key)
