"""Runs in: `bulkhead wipe --force` beside a service that runs.

Everything goes through the CRI: pods are stopped and removed with their containers, then images.
"""

from __future__ import annotations

import sys

from ipc.cri import api_pb2 as cri
from supervisor.cli.ctl.connection import Connection, CtlError
from supervisor.config import Config

_TIMEOUT = 300.0


def empty(config: Config, *, containers: bool, images: bool) -> int:
    """Remove pods, images or both; return the exit code."""
    try:
        with Connection(config.listen, config.run_root, _TIMEOUT) as connection:
            if containers:
                _remove_pods(connection)
            if images:
                _remove_images(connection)
    except CtlError as error:
        print(f"bulkhead: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _remove_pods(connection: Connection) -> None:
    runtime = connection.runtime
    for pod in connection.call(runtime.ListPodSandbox, cri.ListPodSandboxRequest()).items:
        print(f"remove pod {pod.id}")
        connection.call(runtime.StopPodSandbox, cri.StopPodSandboxRequest(pod_sandbox_id=pod.id))
        connection.call(runtime.RemovePodSandbox, cri.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


def _remove_images(connection: Connection) -> None:
    for image in connection.call(connection.images.ListImages, cri.ListImagesRequest()).images:
        print(f"remove image {image.id}")
        request = cri.RemoveImageRequest(image=cri.ImageSpec(image=image.id))
        connection.call(connection.images.RemoveImage, request)
