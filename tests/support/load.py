"""Runs in: the tests.

Clients that ask without end, and notice everything: for whatever claims that nobody notices it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from ipc.cri import api_pb2_grpc, rpc

#: One turn of a client; it gets the number of the turn.
Ask = Callable[[api_pb2_grpc.RuntimeServiceStub, int], object]


@dataclass
class Load:
    """Clients that ask without end, each on a channel of its own, and what they met with."""

    connect: Callable[[], grpc.Channel]
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def running(self, **clients: Callable[[api_pb2_grpc.RuntimeServiceStub, int], object]) -> Iterator[None]:
        """Each client's function gets a stub and the number of the turn."""
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._ask, args=(name, ask, stop)) for name, ask in clients.items()
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _ask(
        self,
        name: str,
        ask: Ask,
        stop: threading.Event,
    ) -> None:
        with self.connect() as channel:
            runtime = rpc.runtime_client(channel)
            while not stop.is_set():
                began = time.monotonic()
                try:
                    ask(runtime, self.counts[name])
                except (grpc.RpcError, AssertionError) as error:
                    self.errors.append(f"{name}: {error}")
                self.counts[name] += 1
                self.slowest[name] = max(self.slowest.get(name, 0.0), time.monotonic() - began)
                time.sleep(0.02)
