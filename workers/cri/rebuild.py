"""Runs in: cri. After a start, before anything is cleaned up: what the state has lost is known again.

The state of this boot may be gone, damaged, or older than it should be. What stands beside it is compared
with it at every start: a pod's file (kept.py) and the directory of a container's monitor. What the state does
not know is taken in with the id, names and results it had, and with the state it is in now, which the
monitor, its records and network tell. What was not finished gets its intent back. Owns nothing; what cannot
be known is left to the reconciliation, which spares what runs (`running`).
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ipc import log
from ipc.cri import api_pb2 as pb
from ipc.errors import RemoteError
from ipc.messages import Body, monitor, network, supervisor
from ipc.messages.monitor import ExitRecord
from workers.cri import kept as files
from workers.cri.node import Node
from workers.cri.peers import SHORT
from workers.cri.state import KeptContainer, KeptPod, Phase

#: Seconds for a monitor's word; its record stands in for it.
MONITOR_TIMEOUT = 2.0
#: Seconds for network's word; without it a pod counts as it was.
NETWORK_TIMEOUT = 10.0
KEPT, STATE, EXIT, SPEC = "cri.json", "state.json", "exit.json", "bundle/config.json"


class MonitorState(Body):
    """What is read of a monitor's `state.json`; with the pid's start time it names a process."""

    pod_id: str = ""
    status: str = ""
    pid: int = 0
    pid_start: int = 0
    started_at_ns: int = 0


@dataclass
class Lost:
    """A container that is to be known again, and the operation to finish on it."""

    kept: KeptContainer
    spec: bytes | None
    intent: str = ""


class Rebuild:
    """Fills the gaps of the state."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._store = node.store
        self._monitors = f"{node.settings.run_root}/monitors"

    async def run(self) -> None:
        """Take in what is missing. Raises RemoteError if the supervisor does not answer."""
        containers = self._kept_containers()
        pods = self._kept_pods(containers)
        if not containers and not pods:
            return
        log.get().error("the state has gaps and is made again", pods=len(pods), containers=len(containers))
        lost = await self._judge(containers)
        await self._take_pods(pods)
        for one in sorted(lost, key=lambda one: one.kept.record.created_at_ns):
            if one.kept.record.pod_id in self._store.pods:
                self._take(one)

    # -- what stands there ----------------------------------------------------------------------------

    def _kept_containers(self) -> list[KeptContainer]:
        found = []
        for name in files.directories(self._monitors):
            if name not in self._store.containers:
                kept = files.read(f"{self._monitors}/{name}/{KEPT}", KeptContainer)
                if kept is not None and kept.boot_id == self._store.boot_id and readable(kept):
                    found.append(kept)
        return found

    def _kept_pods(self, containers: list[KeptContainer]) -> dict[str, KeptPod]:
        """By id: a pod's own file, else what its youngest container has of it."""
        found = {}
        for container in sorted(containers, key=lambda kept: kept.record.created_at_ns):
            found[container.pod.record.id] = container.pod
        for pod_id in self._store.kept.ids():
            kept = self._store.kept.read(pod_id, KeptPod)
            if kept is None or kept.boot_id != self._store.boot_id or not readable_pod(kept):
                self._store.kept.remove(pod_id)
            else:
                found[pod_id] = kept
        return {pod_id: kept for pod_id, kept in found.items() if pod_id not in self._store.pods}

    # -- containers -----------------------------------------------------------------------------------

    async def _judge(self, containers: list[KeptContainer]) -> list[Lost]:
        if not containers:
            return []
        answer = await self._node.peers.supervisor.call(supervisor.MonitorList(), timeout=SHORT)
        alive = {state.container_id for state in answer.monitors if state.alive}
        judged = await asyncio.gather(*(self._judge_one(kept, alive) for kept in containers))
        return [one for one in judged if one is not None]

    async def _judge_one(self, kept: KeptContainer, alive: set[str]) -> Lost | None:
        """Its phase now; None for one that came to nothing."""
        directory = f"{self._monitors}/{kept.record.id}"
        lost = Lost(kept, files.read_bytes(f"{directory}/{SPEC}"))
        told = await self._ask(kept.record.id) if kept.record.id in alive else None
        record = files.read(f"{directory}/{STATE}", MonitorState)
        exit_ = files.read(f"{directory}/{EXIT}", ExitRecord)
        if exit_ is not None:
            lost.kept.record.phase, lost.kept.record.exit = Phase.EXITED, exit_
            lost.kept.record.started_at_ns = exit_.started_at_ns
        elif told is not None and told.pid:
            _set(lost, told.pid, told.started_at_ns)
            lost.intent = "container.start" if told.starting else ""
        elif record is not None:
            _set(lost, record.pid, record.started_at_ns)
        elif kept.record.id in alive:
            lost.intent = "container.create"
        else:
            return None
        return lost

    async def _ask(self, container_id: str) -> monitor.State | None:
        try:
            client = self._node.peers.monitor(container_id)
            return await client.call(monitor.StateGet(), timeout=MONITOR_TIMEOUT)
        except RemoteError as error:
            log.get().warning("a monitor does not answer", container=container_id, text=error.text)
            return None

    def _take(self, lost: Lost) -> None:
        container = self._store.take_container(lost.kept, lost.spec, intent=lost.intent)
        log.get().warning(
            "container known again",
            container=container.id,
            pod=container.record.pod_id,
            phase=container.phase,
        )

    # -- pods -----------------------------------------------------------------------------------------

    async def _take_pods(self, pods: dict[str, KeptPod]) -> None:
        connected = await self._connected() if pods else None
        for kept in sorted(pods.values(), key=lambda kept: kept.record.created_at_ns):
            record = kept.record
            if record.phase is Phase.READY and connected is not None and record.id not in connected:
                record.phase = Phase.STOPPED  # it was stopped after this was written
            pod = self._store.take_pod(kept, intent=unfinished(kept))
            log.get().warning("pod known again", pod=pod.id, phase=pod.phase)

    async def _connected(self) -> set[str] | None:
        """The pods that have their namespaces; None if that cannot be told."""
        try:
            answer = await self._node.peers.network.call(network.PodList(), timeout=NETWORK_TIMEOUT)
        except RemoteError as error:
            log.get().warning("network does not tell its pods", text=error.text)
            return None
        return set(answer.pods)


def _set(lost: Lost, pid: int, started_at_ns: int) -> None:
    record = lost.kept.record
    record.phase = Phase.RUNNING if started_at_ns else Phase.CREATED
    record.pid, record.started_at_ns = pid, started_at_ns


def unfinished(kept: KeptPod) -> str:
    """The operation that was going on when a pod's record was written, "" if there was none."""
    if kept.record.phase is Phase.CREATING:
        return "pod.run"
    return "pod.stop" if kept.record.phase is Phase.STOPPED and not kept.record.released else ""


def readable(kept: KeptContainer) -> bool:
    """Whether the messages in it can be read."""
    try:
        pb.ContainerConfig.FromString(kept.config)
    except DecodeError as error:
        log.get().error("a record is damaged", container=kept.record.id, text=error)
        return False
    return readable_pod(kept.pod)


def readable_pod(kept: KeptPod) -> bool:
    """Whether the message in it can be read."""
    try:
        pb.PodSandboxConfig.FromString(kept.config)
    except DecodeError as error:
        log.get().error("a record is damaged", pod=kept.record.id, text=error)
        return False
    return True


# -- what must not be touched -----------------------------------------------------------------------------


def running(monitors: str) -> dict[str, str]:
    """The containers whose process runs now -> their pod, whatever else is known of them."""
    found = {}
    for name in files.directories(monitors):
        state = files.read(f"{monitors}/{name}/{STATE}", MonitorState)
        if state is not None and state.status == "running" and is_alive(state.pid, state.pid_start):
            found[name] = state.pod_id
    return found


def lives(monitor_directory: str) -> bool:
    """Whether a container's process lives, monitor or not."""
    state = files.read(f"{monitor_directory}/{STATE}", MonitorState)
    return state is not None and is_alive(state.pid, state.pid_start)


def is_alive(pid: int, start: int) -> bool:
    """Whether that very process lives (proc(5): fields 3 and 22 of /proc/PID/stat)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
        return fields[0] not in (b"Z", b"X") and int(fields[19]) == start
    return False
