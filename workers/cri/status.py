"""Runs in: cri. How the node is: conditions with reasons, runtime handlers, features."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from ipc.cri import api_pb2 as pb
from ipc.errors import Code, RemoteError
from ipc.messages import Request, network, storage, supervisor
from ipc.messages.supervisor import HostInfo, RuntimeInfo, WorkerState
from ipc.settings import CriSettings
from workers.cri.node import Node
from workers.cri.peers import Peer

RUNTIME_NAME = "bulkhead"
KUBELET_API_VERSION = "0.1.0"  # what Version has answered since CRI began
CRI_VERSION = "v1"
#: Seconds for each question that Status asks: trouble is told within one.
STATUS_TIMEOUT = 0.8
PLUGIN_TIMEOUT = 2.0  # as long as the plugins have to say whether they are ready, if network is there
#: Workers without which no pod can be run, and the states that say so.
VITAL = ("storage", "network")
SICK = {"backoff", "failed"}

Complaint = tuple[str, str]  # reason and message of a condition


def version(runtime_version: str) -> pb.VersionResponse:
    """Version."""
    return pb.VersionResponse(
        version=KUBELET_API_VERSION,
        runtime_name=RUNTIME_NAME,
        runtime_version=runtime_version,
        runtime_api_version=CRI_VERSION,
    )


def runtime_config(settings: CriSettings) -> pb.RuntimeConfigResponse:
    """RuntimeConfig: the cgroup driver that the kubelet must use too."""
    systemd = settings.cgroup_driver == "systemd"
    driver = pb.CgroupDriver.SYSTEMD if systemd else pb.CgroupDriver.CGROUPFS
    return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=driver))


async def status(node: Node, *, verbose: bool) -> pb.StatusResponse:
    """Status: what is wrong is said with the process that is to blame."""
    runtime, network_, host, idmap = await asyncio.gather(
        _runtime_condition(node), _network_condition(node), _host(node), _idmap(node)
    )
    handlers = runtime_handlers(node.settings, host, idmap=idmap)
    host_network = any(handler.features.user_namespaces for handler in handlers)
    answer = pb.StatusResponse(
        status=pb.RuntimeStatus(conditions=[runtime, network_]),
        runtime_handlers=handlers,
        features=pb.RuntimeFeatures(
            supplemental_groups_policy=True, mount_options=True, user_namespaces_host_network=host_network
        ),
    )
    if verbose:
        answer.info.update(_info(node.settings, host))
    return answer


async def _runtime_condition(node: Node) -> pb.RuntimeCondition:
    # One that hangs is not sick yet: the supervisor waits longer before it kills.
    asked = _silence("storage", node.peers.storage, storage.FsInfoGet())
    sick, silent = await asyncio.gather(_sick_workers(node), asked)
    reason, message = sick or silent or ("", "")
    return pb.RuntimeCondition(type="RuntimeReady", status=not reason, reason=reason, message=message)


async def _sick_workers(node: Node) -> Complaint | None:
    try:
        listed = await node.peers.supervisor.call(supervisor.WorkerList(), timeout=STATUS_TIMEOUT)
    except RemoteError as error:
        return "SupervisorUnavailable", f"the supervisor does not answer: {error.text}"
    sick = [worker for worker in listed.workers if worker.kind in VITAL and worker.state in SICK]
    return ("WorkerFailed", "; ".join(map(_complaint, sick))) if sick else None


async def _silence(kind: str, peer: Peer, question: Request[Any]) -> Complaint | None:
    """What is to be said of a worker that does not answer a question for which it needs nobody else."""
    try:
        await peer.call(question, timeout=STATUS_TIMEOUT)
    except RemoteError as error:
        return f"{kind.capitalize()}WorkerUnavailable", f"the {kind} worker does not answer: {error.text}"
    return None


def _complaint(worker: WorkerState) -> str:
    return f"worker {worker.name} is in state {worker.state} (last death: {worker.last_death or 'none'})"


async def _network_condition(node: Node) -> pb.RuntimeCondition:
    """Plugins may take longer than one may wait for the word of a worker that hangs."""
    asking = asyncio.create_task(_network_state(node))
    try:
        silent = await _silence("network", node.peers.network, network.PodList())
        state = _unready(*silent) if silent else await asking
    finally:
        asking.cancel()
    return pb.RuntimeCondition(
        type="NetworkReady", status=state.ready, reason=state.reason, message=state.message
    )


async def _network_state(node: Node) -> network.NetworkState:
    try:
        return await node.peers.network.call(network.StatusGet(), timeout=PLUGIN_TIMEOUT)
    except RemoteError as error:
        if error.code is Code.DEADLINE_EXCEEDED:
            reason, message = "NetworkPluginUnknown", "the CNI plugins have not said whether they are ready"
        else:
            reason, message = "NetworkWorkerUnavailable", "the network worker does not answer"
        return _unready(reason, f"{message}: {error.text}")


def _unready(reason: str, message: str) -> network.NetworkState:
    return network.NetworkState(ready=False, reason=reason, message=message)


async def _host(node: Node) -> HostInfo | None:
    try:
        return await node.host(STATUS_TIMEOUT)
    except RemoteError:
        return None  # RuntimeReady says it


async def _idmap(node: Node) -> bool:
    try:
        return (await node.idmap(STATUS_TIMEOUT)).supported
    except RemoteError:
        return False  # not claimed while nobody can tell


def runtime_handlers(settings: CriSettings, host: HostInfo | None, *, idmap: bool) -> list[pb.RuntimeHandler]:
    """Every configured handler with its features, the default one under "" too."""
    known = {} if host is None else {info.name: info for info in host.runtimes}
    handlers = [_handler(r.name, known.get(r.name), idmap=idmap) for r in settings.runtimes]
    if settings.default_runtime:
        handlers.insert(0, _handler("", known.get(settings.default_runtime), idmap=idmap))
    return handlers


def _handler(name: str, info: RuntimeInfo | None, *, idmap: bool) -> pb.RuntimeHandler:
    features = pb.RuntimeHandlerFeatures(
        recursive_read_only_mounts=info is not None and info.recursive_read_only,
        user_namespaces=info is not None and info.user_namespaces and idmap,
    )
    return pb.RuntimeHandler(name=name, features=features)


def _info(settings: CriSettings, host: HostInfo | None) -> dict[str, str]:
    """Verbose details; no secrets stand in cri's settings."""
    config = {
        "root": settings.root,
        "runRoot": settings.run_root,
        "cgroupDriver": settings.cgroup_driver,
        "defaultRuntime": settings.default_runtime,
        "runtimes": {runtime.name: runtime.path for runtime in settings.runtimes},
    }
    info = {"config": msgspec.json.encode(config).decode()}
    if host is not None:
        info["host"] = msgspec.json.encode(host).decode()
    return info
