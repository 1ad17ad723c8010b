"""Runs in: cri.

The OCI runtime specification of a container, built from the CRI request, the image's config and facts that
other processes resolved. Sans-IO: no file is opened here, no socket, no clock. Owns the rules of CRI and OCI
about args, environment, users, capabilities, mounts, namespaces, cgroups, devices, seccomp. What it does not
honour it refuses (`validate.REFUSED`); nothing that a kubelet sets is dropped in silence.

    pod.*                       what RunPodSandbox asks of network and storage, and checks first
    request.container_create    what CreateContainer asks of storage, checked first
    build(SpecInputs) -> Built  the spec itself
    exec_process(spec, ...)     the OCI process of an ExecSync or Exec
"""

from .build import build
from .inputs import Built, SpecInputs
from .process import exec_process

__all__ = ["Built", "SpecInputs", "build", "exec_process"]
