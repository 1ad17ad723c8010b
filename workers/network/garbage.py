"""Runs in: network.

GC of a network before this boot's first ADD on it: what plugins still hold for pods of an earlier boot
(addresses, firewall rules) is given back. ADDs wait meanwhile, because GC would take what they are given.
It remembers in `<run_root>/net/gc.marks` what has been done, so that a new worker does not repeat it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from ipc import log
from ipc.errors import RemoteError
from workers.network import probe
from workers.network.children import Children
from workers.network.conflist import Network, at_least
from workers.network.operations import Places

_Continue = Callable[[], None]


class Garbage:
    """Lets each ADD pass, after GC where that is due."""

    def __init__(self, children: Children, places: Callable[[], Places]) -> None:
        self._children = children
        self._places = places
        self._done: dict[str, str] | None = None  # boot id by network name
        self._waiting: dict[str, list[_Continue]] = {}

    def before(self, network: Network, proceed: _Continue) -> None:
        """Call `proceed`, at once or when GC of the network is over."""
        if network.name in self._waiting:
            self._waiting[network.name].append(proceed)
        elif not self._due(network):
            proceed()
        else:
            self._waiting[network.name] = [proceed]
            self._collect(network)

    def _due(self, network: Network) -> bool:
        if network.disable_gc or not at_least(network.version, "1.1.0"):
            return False
        return self._marks().get(network.name) != self._places().boot_id

    def _collect(self, network: Network) -> None:
        places = self._places()

        def collected(outcome: bytes | RemoteError) -> None:
            if isinstance(outcome, RemoteError):
                log.get().warning("CNI GC failed", network=network.name, why=outcome)
            self._mark(network.name, places)
            for proceed in self._waiting.pop(network.name):
                proceed()

        timeout = places.teardown_timeout
        self._children.start(
            probe.collect, places, network, ended=collected, timeout=timeout, of=network.name
        )

    def _marks(self) -> dict[str, str]:
        if self._done is None:
            try:
                with open(_path(self._places()), "rb") as file:
                    self._done = msgspec.json.decode(file.read(), type=dict[str, str])
            except (FileNotFoundError, msgspec.DecodeError):
                self._done = {}
        return self._done

    def _mark(self, name: str, places: Places) -> None:
        marks = self._marks()
        marks[name] = places.boot_id
        try:
            _write(_path(places), msgspec.json.encode(marks))
        except OSError as error:  # then the next worker does it again
            log.get().warning("CNI GC not marked as done", network=name, why=error)


def _write(path: str, data: bytes) -> None:
    with open(path + ".new", "wb") as file:
        file.write(data)
    os.replace(path + ".new", path)


def _path(places: Places) -> str:
    return os.path.join(places.records, "gc.marks")
