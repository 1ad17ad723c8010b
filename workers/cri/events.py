"""Runs in: cri. GetContainerEvents: every change of a pod or container, to everybody who listens.

An event is made in the moment in which the state changes and carries the state of that moment, so a list
that is taken after it shows the same or something newer, never something older. Nobody waits for a client
that does not read: each has a bounded queue that loses its oldest events (the newest ones tell how things
are), and losses are counted. A pod's own events bear its id as container id, as with other runtimes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from ipc import log
from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError
from workers.cri import views
from workers.cri.state import HIDDEN, Container, Phase, Pod, Store

#: Of one client: events that wait, and their bytes; clients at a time.
MOST, MOST_BYTES, MOST_CLIENTS = 1000, 4 * 1024 * 1024, 32

Type = pb.ContainerEventType
_OF_PHASE: dict[Phase, list[Any]] = {
    Phase.CREATED: [Type.CONTAINER_CREATED_EVENT],
    Phase.READY: [Type.CONTAINER_CREATED_EVENT, Type.CONTAINER_STARTED_EVENT],
    Phase.RUNNING: [Type.CONTAINER_STARTED_EVENT],
    Phase.EXITED: [Type.CONTAINER_STOPPED_EVENT],
    Phase.STOPPED: [Type.CONTAINER_STOPPED_EVENT],
}


class Client:
    """One who listens."""

    def __init__(self) -> None:
        self.dropped = 0
        self.waiting = asyncio.Event()
        self._queue: deque[bytes] = deque()
        self._bytes = 0

    def put(self, event: bytes) -> int:
        """Queue an event; returns how many older ones had to go."""
        self._queue.append(event)
        self._bytes += len(event)
        lost = 0
        while len(self._queue) > MOST or (self._bytes > MOST_BYTES and len(self._queue) > 1):
            self._bytes -= len(self._queue.popleft())
            lost += 1
        self.dropped += lost
        self.waiting.set()
        return lost

    def take(self) -> bytes | None:
        """The oldest event that waits."""
        if not self._queue:
            self.waiting.clear()
            return None
        event = self._queue.popleft()
        self._bytes -= len(event)
        return event

    def __len__(self) -> int:
        return len(self._queue)


class Events:
    """Follows the store and tells who listens."""

    def __init__(self, store: Store) -> None:
        self.sent = 0
        self.dropped = 0
        self.clients: set[Client] = set()
        self._store = store
        self._phases: dict[str, Phase] = {}

    def begin(self) -> None:
        """The state is loaded: what is there is known, what changes from now on is told."""
        store = self._store
        self._phases = {pod.id: pod.phase for pod in store.pods.values()}
        self._phases |= {container.id: container.phase for container in store.containers.values()}
        self._store.observers.append(self.changed)

    async def listen(self) -> AsyncIterator[bytes]:
        """Every event from now on, as the bytes of its message. Raises RemoteError(RESOURCE_EXHAUSTED)."""
        if len(self.clients) >= MOST_CLIENTS:
            raise RemoteError(Code.RESOURCE_EXHAUSTED, f"{MOST_CLIENTS} clients are told of events already")
        client = Client()
        self.clients.add(client)
        try:
            while True:
                event = client.take()
                if event is None:
                    await client.waiting.wait()
                else:
                    yield event
        finally:
            self.clients.discard(client)
            if client.dropped:
                log.get().warning("a client was too slow for all events", lost=client.dropped)

    def changed(self, subject: Pod | Container, *, gone: bool) -> None:
        """Told by the store."""
        if isinstance(subject, Container) and subject.record.sandbox:
            return
        before = self._phases.get(subject.id, Phase.CREATING)
        if gone:
            self._phases.pop(subject.id, None)
            if before not in HIDDEN:
                self._tell(subject, Type.CONTAINER_DELETED_EVENT)
            return
        self._phases[subject.id] = subject.phase
        if before is not subject.phase:
            for type_ in _OF_PHASE.get(subject.phase, ()):
                self._tell(subject, type_)

    def _tell(self, subject: Pod | Container, type_: Any) -> None:
        if not self.clients:
            return
        event = self._event(subject, type_).SerializeToString()
        for client in self.clients:
            self.dropped += client.put(event)
            self.sent += 1

    def _event(self, subject: Pod | Container, type_: Any) -> pb.ContainerEventResponse:
        event = pb.ContainerEventResponse(
            container_id=subject.id, container_event_type=type_, created_at=time.time_ns()
        )
        pod = subject if isinstance(subject, Pod) else self._store.pods.get(subject.record.pod_id)
        if pod is not None:
            event.pod_sandbox_status.CopyFrom(views.pod_status(pod, verbose=False).status)
            event.containers_statuses.extend(self._containers(pod))
        return event

    def _containers(self, pod: Pod) -> list[pb.ContainerStatus]:
        return [
            views.container_status(one, None).status
            for one in self._store.containers_of(pod.id)
            if one.phase not in HIDDEN and not one.record.sandbox
        ]
