"""Runs in: children of network.

What is asked of plugins without a pod: whether they are there and know the list's version, STATUS, and GC.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import msgspec

from ipc import log
from ipc.messages import Body
from workers.network.chain import Chain
from workers.network.conflist import Network, at_least
from workers.network.operations import Places
from workers.network.records import Records
from workers.network.results import PluginError

#: Versions that a program knows, by the identity of its file: a program that is replaced is asked again.
Known = dict[str, list[str]]


class Health(Body):
    """What a probe found. `message` is empty when the network can be used."""

    message: str = ""
    known: Known = {}


def decode(data: bytes) -> Health:
    """Read what a child told."""
    return msgspec.msgpack.decode(data, type=Health)


def health(places: Places, network: Network, known: Known, timeout: float) -> bytes:
    """Look for the programs, ask VERSION of those that are new, then STATUS of all."""
    chain = Chain(network, places.bin_dirs, deadline=time.monotonic() + timeout)
    learned: Known = {}
    message = ""
    try:
        chain.network = _common(chain, known, learned)
        chain.status()
    except PluginError as error:
        message = error.text
    return msgspec.msgpack.encode(Health(message=message, known=learned))


def _common(chain: Chain, known: Mapping[str, list[str]], learned: Known) -> Network:
    network = chain.network
    for kind in dict.fromkeys(entry["type"] for entry in network.plugins):
        identity = _identity(chain.path_of(kind))
        learned[identity] = known.get(identity) or chain.versions_of(kind)
        network = network.at(*learned[identity])
        if not network.versions:
            raise PluginError(
                f'CNI plugin "{kind}" knows versions {", ".join(learned[identity])}, '
                f'network "{network.name}" asks for {", ".join(chain.network.versions)}'
            )
    return network


def _identity(path: str) -> str:
    info = os.stat(path)
    return f"{path}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}"


def collect(places: Places, network: Network) -> bytes:
    """GC of a network, where its version has it: what no record of ours knows is given back. Never raises."""
    chain = Chain(network, places.bin_dirs, deadline=time.monotonic() + places.teardown_timeout)
    try:
        chain.network = chain.negotiated()
    except PluginError as error:
        log.get().warning("CNI GC failed", network=network.name, why=error)
        return b""
    if at_least(chain.network.version, "1.1.0"):
        for failure in chain.collect(_attachments(Records(places.records), network.name)):
            log.get().warning("CNI GC failed", network=network.name, why=failure)
    return b""


def _attachments(records: Records, network_name: str) -> list[tuple[str, str]]:
    loaded = [records.load(pod_id) for pod_id in records.pods()]
    return [
        (record.pod_id, record.ifname)
        for record in loaded
        if record is not None and record.network is not None and record.network.name == network_name
    ]
