"""Runs in: cri. ListPodSandbox, ListContainers and all lists in pieces (CRI's streaming lists).

Kubelets ask for everything every second, and mostly nothing has changed: the answer is kept as the bytes
that go out, for as long as the store's version stays the same. A streamed list goes out in messages of
bounded size, each made when the one before is under way, so that however many objects there are, memory is
not theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

from google.protobuf.message import Message

from ipc.cri import api_pb2 as pb
from workers.cri import views
from workers.cri.state import HIDDEN, Store

#: Bytes and items of one message of a stream.
PIECE_BYTES, PIECE_ITEMS = 512 * 1024, 1000
M = TypeVar("M", bound=Message)


class Lists:
    """Lists of pods and containers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[str, tuple[int, bytes]] = {}

    def pods(self, request: pb.ListPodSandboxRequest) -> pb.ListPodSandboxResponse | bytes:
        """ListPodSandbox."""

        def answer() -> pb.ListPodSandboxResponse:
            return pb.ListPodSandboxResponse(items=views.list_pods(self._store, request.filter))

        return self._kept_or_made("pods", answer) if _wants_all(request.filter) else answer()

    def containers(self, request: pb.ListContainersRequest) -> pb.ListContainersResponse | bytes:
        """ListContainers."""

        def answer() -> pb.ListContainersResponse:
            return pb.ListContainersResponse(containers=views.list_containers(self._store, request.filter))

        return self._kept_or_made("containers", answer) if _wants_all(request.filter) else answer()

    def _kept_or_made(self, what: str, make: Callable[[], Message]) -> bytes:
        version, data = self._kept.get(what, (-1, b""))
        if version != self._store.version:
            data = make().SerializeToString()
            self._kept[what] = (self._store.version, data)
        return data

    def stream_pods(self, wanted: pb.PodSandboxFilter) -> AsyncIterator[pb.StreamPodSandboxesResponse]:
        """StreamPodSandboxes."""
        store = self._store
        found = views.match_pods(store, wanted)
        items = (views.pod_item(pod) for pod in found if pod.id in store.pods and pod.phase not in HIDDEN)
        return pieces(items, pb.StreamPodSandboxesResponse, "pod_sandboxes")

    def stream_containers(self, wanted: pb.ContainerFilter) -> AsyncIterator[pb.StreamContainersResponse]:
        """StreamContainers."""
        store = self._store
        found = views.match_containers(store, wanted)
        here = (one for one in found if one.id in store.containers and one.phase not in HIDDEN)
        return pieces(map(views.container_item, here), pb.StreamContainersResponse, "containers")


def _wants_all(wanted: Message) -> bool:
    return wanted.ByteSize() == 0


async def pieces(items: Iterable[Any], kind: type[M], field: str) -> AsyncIterator[M]:
    """Put items into messages of bounded size; each is let go before the next one is begun."""
    piece, size = kind(), 0
    for item in items:
        into = getattr(piece, field)
        into.append(item)
        size += item.ByteSize()
        if size >= PIECE_BYTES or len(into) >= PIECE_ITEMS:
            yield piece
            await asyncio.sleep(0)
            piece, size = kind(), 0
    if size:
        yield piece
