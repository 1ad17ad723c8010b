"""Runs in: network.

Whether a pod could be given a network now: a usable configuration, its programs, and what STATUS says. Asked
of plugins at most every few seconds, by a child; whoever asks meanwhile shares the answer.
"""

from __future__ import annotations

from collections.abc import Callable

from ipc.errors import RemoteError
from ipc.loop import Loop
from ipc.messages.network import NetworkState, StatusGet
from ipc.serve import Call
from workers.network import probe
from workers.network.children import Children
from workers.network.confdir import Selection
from workers.network.conflist import Network
from workers.network.operations import Places

#: How long an answer of the plugins holds, and how long they may take for it, in seconds.
FRESH = 5.0
TIMEOUT = 5.0
REASON = "NetworkPluginNotReady"


class Status:
    """Handler of network.status.get."""

    def __init__(
        self, children: Children, places: Callable[[], Places], network: Callable[[], Selection]
    ) -> None:
        self._children = children
        self._places = places
        self._network = network
        self._known: probe.Known = {}
        self._asked: Network | None = None
        self._message = ""
        self._until = 0.0
        self._waiting: list[Call] = []

    def get(self, call: Call, _body: StatusGet) -> NetworkState | None:
        """network.status.get"""
        selection = self._network()
        if selection.network is None:
            return NetworkState(ready=False, reason=REASON, message=selection.message)
        if selection.network is self._asked and Loop.time() < self._until:
            return self._state(selection.network)
        self._waiting.append(call)
        if len(self._waiting) == 1:
            self._ask(selection.network)
        return None

    def _ask(self, network: Network) -> None:
        def answered(outcome: bytes | RemoteError) -> None:
            self._learn(network, outcome)
            calls, self._waiting = self._waiting, []
            for call in calls:
                call.reply(self._state(network))

        args = self._places(), network, self._known, TIMEOUT
        self._children.start(probe.health, *args, ended=answered, timeout=TIMEOUT, of=network.name)

    def _learn(self, network: Network, outcome: bytes | RemoteError) -> None:
        if isinstance(outcome, RemoteError):
            self._message = outcome.text
        else:
            health = probe.decode(outcome)
            self._message, self._known = health.message, health.known
        self._asked, self._until = network, Loop.time() + FRESH

    def _state(self, network: Network) -> NetworkState:
        return NetworkState(
            ready=not self._message,
            reason=REASON if self._message else "",
            message=self._message,
            network=network.name,
            configuration=network.path,
        )
