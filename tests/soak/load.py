"""Runs in: the tests. What a node sees in a day, in a hurry.

Pods are run and removed, several at a time, each with a container, exec probes and a status; beside them
stats and lists are asked for every second, and an image is pulled and removed again and again. Every answer
that is an error is kept: there must be none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import grpc

from ipc.cri import api_pb2 as pb
from tests.support.cri_client import Client
from tests.support.daemon import Node, wait_for
from tests.support.images import Served

PROBES = 3
LINES = 50  # that a container logs


@dataclass
class Done:
    """What has been done, by kind, and what went wrong."""

    counts: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str) -> None:
        """One more."""
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def fail(self, what: str, error: Exception) -> None:
        """Something went wrong."""
        with self.lock:
            self.errors.append(f"{what}: {error}")


class Load:
    """The work on one node; `run` returns when it is done."""

    def __init__(self, node: Node, images: Served) -> None:
        self._client = Client(node, images)
        self._node = node
        self._images = images
        self._end = threading.Event()
        self.done = Done()

    def run(self, *, at_once: int, pods: int | None = None, seconds: float | None = None) -> Done:
        """So many pods, or for so many seconds, `at_once` of them at a time."""
        self._client.pull()
        until = time.monotonic() + seconds if seconds is not None else float("inf")
        numbers: Iterator[int] = count() if pods is None else iter(range(pods))
        beside = [
            threading.Thread(target=self._again, args=(1.0, "stats", self._stats)),
            threading.Thread(target=self._again, args=(1.0, "lists", self._lists)),
            threading.Thread(target=self._again, args=(5.0, "pulls", self._pull)),
        ]
        for thread in beside:
            thread.start()
        try:
            with ThreadPoolExecutor(at_once) as pool:
                for _ in range(at_once):
                    pool.submit(self._pods, numbers, until)
        finally:
            self._end.set()
            for thread in beside:
                thread.join()
        return self.done

    def _again(self, period: float, what: str, step: Callable[[], None]) -> None:
        while not self._end.wait(period):
            self._try(what, step)

    def _try(self, what: str, step: Callable[[], None]) -> None:
        try:
            step()
            self.done.note(what)
        except (grpc.RpcError, AssertionError, OSError) as error:
            self.done.fail(what, error)

    def _pods(self, numbers: Iterator[int], until: float) -> None:
        while time.monotonic() < until and not self.done.errors:
            with self.done.lock:  # an iterator is no shared thing by itself
                if next(numbers, None) is None:
                    return
            self._try("pods", self._pod)

    def _pod(self) -> None:
        script = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); done; exec sleep 1000"
        client = self._client
        pod_id, container_id = client.running("/bin/sh", "-c", script)
        for _ in range(PROBES):
            probe = client.execute(container_id, "true")
            assert probe.exit_code == 0, f"a probe ended with {probe.exit_code}"
            self.done.note("probes")
        status = client.status(container_id)
        assert status.state == pb.ContainerState.CONTAINER_RUNNING, f"a container does not run: {status}"
        # On a busy machine three probes are over before a shell has written its lines.
        wait_for(lambda: len(client.log(container_id)) >= LINES, "a container writes its lines")
        client.stop(container_id)
        lines = client.log(container_id)
        assert len(lines) == LINES, f"{len(lines)} lines were logged: {lines}"
        client.remove(container_id)
        client.remove_pod(pod_id)

    def _stats(self) -> None:
        runtime = self._node.runtime
        runtime.ListContainerStats(pb.ListContainerStatsRequest(), timeout=30)
        runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest(), timeout=30)

    def _lists(self) -> None:
        runtime = self._node.runtime
        runtime.ListContainers(pb.ListContainersRequest(), timeout=30)
        runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=30)
        self._node.images.ListImages(pb.ListImagesRequest(), timeout=30)
        runtime.Status(pb.StatusRequest(), timeout=30)

    def _pull(self) -> None:
        image = pb.ImageSpec(image=self._images.larger)
        self._node.images.PullImage(pb.PullImageRequest(image=image), timeout=120)
        self._node.images.RemoveImage(pb.RemoveImageRequest(image=image), timeout=60)
