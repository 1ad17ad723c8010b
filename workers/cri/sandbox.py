"""Runs in: cri. The sandbox container of a pod, where the configuration names a pause image.

It is a container like any other (image, root file system, monitor, exit record), but nobody's: hidden from
clients, first to be started and last to be stopped. It shares the pod's namespaces; in a pod with a PID
namespace for all it is that namespace's init. Its id is derived from the pod's, so that every step can be
repeated. Owns nothing but what makes such a container: the work is done by Containers.
"""

from __future__ import annotations

from ipc.cri import api_pb2 as pb
from ipc.errors import precondition
from workers.cri.containers import Containers
from workers.cri.images import Images
from workers.cri.pull import Pulls
from workers.cri.spec import pod as podspec
from workers.cri.state import Phase, Pod

NAME = "sandbox"
#: The least that the kernel gives, and the score that keeps a pod's frame up when memory is short.
CPU_SHARES, OOM_SCORE = 2, -998


class Sandboxes:
    """Sandbox containers."""

    def __init__(self, containers: Containers, images: Images, pulls: Pulls) -> None:
        self._containers = containers
        self._images = images
        self._pulls = pulls

    async def need_image(self, image: str) -> None:
        """Pull the pause image if it is not there. Raises RemoteError."""
        spec = pb.ImageSpec(image=image)
        if await self._images.find(spec) is None:
            await self._pulls.pull(spec, None)

    async def run(self, pod: Pod) -> None:
        """Create and start the pod's sandbox container; what is done already is not done again.

        The namespaces of the pod's network are there. Raises RemoteError.
        """
        container = await self._containers.run_sandbox(pod, container_config(pod))
        if podspec.shares_pid(pod.config):
            pod.record.init_pid = container.record.pid
            path = f"/proc/{container.record.pid}/ns/pid"
            pod.record.namespaces = {**pod.record.namespaces, "pid": path}

    def check(self, pod: Pod) -> None:
        """Raises RemoteError(FAILED_PRECONDITION) if the pod has a sandbox container that does not run."""
        container = self._containers.find_sandbox(pod)
        if pod.record.pause_image and (container is None or container.phase is not Phase.RUNNING):
            exit_ = container.record.exit if container is not None else None
            how = f"with code {exit_.exit_code} {exit_.message}".rstrip() if exit_ is not None else ""
            image = pod.record.pause_image
            raise precondition(f"the sandbox container (image {image!r}) ended at once {how}".rstrip())


def container_config(pod: Pod) -> pb.ContainerConfig:
    """The request that nobody made: the pod's own security settings, no privilege, the image's command."""
    sandbox = pod.config.linux.security_context
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=NAME), image=pb.ImageSpec(image=pod.record.pause_image)
    )
    config.linux.resources.cpu_shares = CPU_SHARES
    config.linux.resources.oom_score_adj = OOM_SCORE
    security = config.linux.security_context
    security.readonly_rootfs = security.no_new_privs = True
    security.capabilities.drop_capabilities.append("ALL")
    security.supplemental_groups.extend(sandbox.supplemental_groups)
    for name in ("run_as_user", "run_as_group", "seccomp", "apparmor", "selinux_options"):
        if sandbox.HasField(name):
            getattr(security, name).CopyFrom(getattr(sandbox, name))
    security.namespace_options.CopyFrom(sandbox.namespace_options)
    if podspec.shares_pid(pod.config):  # it makes the namespace that the others join
        security.namespace_options.pid = pb.NamespaceMode.CONTAINER
    return config
