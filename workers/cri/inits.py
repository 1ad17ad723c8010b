"""Runs in: cri. How the end of a pod's built-in init becomes known.

With the init goes everything in the pod's PID namespace, by the kernel, and no container can be made in it
any more: a pod does not outlive its init. A pidfd tells the end at once; whose number it was is known by the
supervisor, which finds the inits by their locks.
"""

from __future__ import annotations

import asyncio
import os

from ipc import log
from ipc.errors import RemoteError
from ipc.messages import supervisor
from workers.cri.node import Node
from workers.cri.peers import SHORT
from workers.cri.state import Phase, Pod
from workers.cri.watch import POLL, readable


class Inits:
    """Follows the inits of all ready pods."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def watch(self, pod: Pod) -> None:
        """Begin to follow a pod's init, if it has one."""
        if pod.phase is Phase.READY and pod.record.init_pid and not pod.record.pause_image:
            self._node.operations.background(f"watch the init of {pod.id}", self._watch(pod))

    async def _watch(self, pod: Pod) -> None:
        while pod.phase is Phase.READY:
            fd = _pidfd(pod.record.init_pid)
            try:
                # asked after the pidfd was opened: so it is the init's, if that one lives
                if not await self._alive(pod.id):
                    return self._ended(pod)
                await (asyncio.sleep(POLL) if fd is None else readable(fd))
            finally:
                if fd is not None:
                    os.close(fd)

    async def _alive(self, pod_id: str) -> bool:
        """While the supervisor cannot be asked, nothing is concluded."""
        try:
            answer = await self._node.peers.supervisor.call(supervisor.InitList(), timeout=SHORT)
        except RemoteError as error:
            log.get().debug("the supervisor does not tell of inits", text=error.text)
            await asyncio.sleep(POLL)
            return True
        return any(state.alive for state in answer.inits if state.pod_id == pod_id)

    def _ended(self, pod: Pod) -> None:
        if pod.phase is Phase.READY:  # unless it is being stopped, that is news
            pod.record.phase = Phase.STOPPED
            self._node.store.save_pod(pod)
            log.get().error("the pod's init ended: the pod is not ready", pod=pod.id)


def _pidfd(pid: int) -> int | None:
    """None if there is no such process."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
