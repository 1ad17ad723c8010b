"""Runs in: cri. What pods and containers tell node resource plugins, where no plugins are allowed: nothing.

The places where plugins have a word, as methods; workers/cri/nri/relay.py fills them, and is only loaded
where the configuration enables NRI. A method that raises ends the operation; those that only tell never
raise.
"""

from __future__ import annotations

from ipc.cri import api_pb2 as pb
from ipc.settings import CriSettings
from workers.cri.spec import Built
from workers.cri.state import Container, Pod


class Plugins:
    """Nobody."""

    def reload(self, settings: CriSettings) -> None:
        """The settings at the start, and whenever they change."""

    # -- pods -----------------------------------------------------------------------------------------

    async def run_pod(self, pod: Pod) -> None:
        """A pod is made and about to be ready. Raises RemoteError if a plugin refuses it."""

    async def update_pod(self, pod: Pod, request: pb.UpdatePodSandboxResourcesRequest) -> None:
        """A pod's resources are about to change. Raises RemoteError if a plugin refuses."""

    async def pod_updated(self, pod: Pod) -> None:
        """They have changed."""

    async def stop_pod(self, pod: Pod) -> None:
        """A pod's containers have ended, its network still stands. Told once."""

    async def remove_pod(self, pod: Pod) -> None:
        """A pod is about to be forgotten."""

    async def undo_pod(self, pod: Pod) -> None:
        """A pod could not be made."""

    # -- containers -----------------------------------------------------------------------------------

    async def create(self, pod: Pod, container: Container, built: Built) -> Built:
        """A container is about to be made of `built`; return what it shall be made of. Raises RemoteError."""
        return built

    async def created(self, container: Container) -> None:
        """It has been made."""

    async def undo(self, container: Container) -> None:
        """It could not be made."""

    async def start(self, container: Container) -> None:
        """It is about to be started. Raises RemoteError if a plugin refuses."""

    async def started(self, container: Container) -> None:
        """It has been started."""

    async def update(
        self, container: Container, asked: pb.LinuxContainerResources
    ) -> tuple[pb.LinuxContainerResources, dict[str, object]]:
        """Its limits are about to change: what shall change, and limits for which CRI has no field.

        Raises RemoteError.
        """
        return asked, {}

    async def updated(self, container: Container) -> None:
        """They have changed."""

    def ended(self, container: Container) -> None:
        """It has ended, by itself or not."""

    async def settled(self, container: Container) -> None:
        """Wait until plugins have been told of its end."""

    async def remove(self, container: Container) -> None:
        """It is about to be forgotten."""
