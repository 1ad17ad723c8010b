"""Runs in: nri. The calls of the node resource interface, both ways, and the events that plugins subscribe
to.

Data only. A plugin of an older release that does not know a call is told by StateChange instead, where the
interface once had it so: those have `state_change`.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message

from ipc.nri import nri_pb2 as pb

PLUGIN = "nri.pkg.api.v1alpha1.Plugin"
RUNTIME = "nri.pkg.api.v1alpha1.Runtime"
#: The release of the interface that this is, for plugins that ask.
VERSION = "v0.12.2"


@dataclass(frozen=True)
class Call:
    """One call. `event` is the bit of its subscription, 0 if it has none."""

    request: type[Message]
    reply: type[Message]
    event: int = 0
    state_change: bool = False


PLUGIN_CALLS: dict[str, Call] = {
    "Configure": Call(pb.ConfigureRequest, pb.ConfigureResponse),
    "Synchronize": Call(pb.SynchronizeRequest, pb.SynchronizeResponse),
    "Shutdown": Call(pb.Empty, pb.Empty),
    "RunPodSandbox": Call(pb.RunPodSandboxRequest, pb.Empty, pb.RUN_POD_SANDBOX, state_change=True),
    "UpdatePodSandbox": Call(pb.UpdatePodSandboxRequest, pb.Empty, pb.UPDATE_POD_SANDBOX),
    "PostUpdatePodSandbox": Call(
        pb.PostUpdatePodSandboxRequest, pb.Empty, pb.POST_UPDATE_POD_SANDBOX, state_change=True
    ),
    "StopPodSandbox": Call(pb.StopPodSandboxRequest, pb.Empty, pb.STOP_POD_SANDBOX, state_change=True),
    "RemovePodSandbox": Call(pb.RemovePodSandboxRequest, pb.Empty, pb.REMOVE_POD_SANDBOX, state_change=True),
    "CreateContainer": Call(pb.CreateContainerRequest, pb.CreateContainerResponse, pb.CREATE_CONTAINER),
    "PostCreateContainer": Call(
        pb.PostCreateContainerRequest, pb.Empty, pb.POST_CREATE_CONTAINER, state_change=True
    ),
    "StartContainer": Call(pb.StartContainerRequest, pb.Empty, pb.START_CONTAINER, state_change=True),
    "PostStartContainer": Call(
        pb.PostStartContainerRequest, pb.Empty, pb.POST_START_CONTAINER, state_change=True
    ),
    "UpdateContainer": Call(pb.UpdateContainerRequest, pb.UpdateContainerResponse, pb.UPDATE_CONTAINER),
    "PostUpdateContainer": Call(
        pb.PostUpdateContainerRequest, pb.Empty, pb.POST_UPDATE_CONTAINER, state_change=True
    ),
    "StopContainer": Call(pb.StopContainerRequest, pb.StopContainerResponse, pb.STOP_CONTAINER),
    "RemoveContainer": Call(pb.RemoveContainerRequest, pb.Empty, pb.REMOVE_CONTAINER, state_change=True),
    "StateChange": Call(pb.StateChangeEvent, pb.Empty),
    "ValidateContainerAdjustment": Call(
        pb.ValidateContainerAdjustmentRequest,
        pb.ValidateContainerAdjustmentResponse,
        pb.VALIDATE_CONTAINER_ADJUSTMENT,
    ),
}

RUNTIME_CALLS: dict[str, Call] = {
    "RegisterPlugin": Call(pb.RegisterPluginRequest, pb.Empty),
    "UpdateContainers": Call(pb.UpdateContainersRequest, pb.UpdateContainersResponse),
}

ALL_EVENTS = (1 << (pb.LAST - 1)) - 1


def subscribes(mask: int, event: int) -> bool:
    """Whether a mask of ConfigureResponse has the bit of an event."""
    return bool(mask & 1 << (event - 1))
