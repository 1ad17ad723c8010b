"""Runs in: network, and the child that makes a pod's namespaces.

Sysctls of a pod: which of them belong to a namespace (sans I/O), and writing them in the namespaces of the
process that calls. It refuses every key that would reach the node, and values that no kernel parameter has
(CVE-2022-0811: a value that carried further settings was set on the node).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Mapping

from ipc.errors import RemoteError, internal, invalid

_KEY = re.compile(r"[a-z0-9][a-z0-9_\-]*(\.[A-Za-z0-9_\-]+)+\Z")
_VALUE = re.compile(r"[^\x00-\x1f\x7f+]*(\t[^\x00-\x1f\x7f+]*)*\Z")
_VALUE_LIMIT = 4096
_REFUSALS = {
    errno.ENOENT: "the kernel has no such parameter per namespace",
    errno.ENOTDIR: "the kernel has no such parameter per namespace",
    errno.EISDIR: "it names a group of parameters",
    errno.EACCES: "it may not be written in a namespace",
    errno.EPERM: "it may not be written in a namespace",
    errno.EROFS: "it may not be written in a namespace",
    errno.EINVAL: "the kernel refuses the value",
    errno.ERANGE: "the kernel refuses the value",
    errno.EOVERFLOW: "the kernel refuses the value",
}


def namespace_of(key: str) -> str | None:
    """Return the namespace ("net", "ipc", "uts") that a parameter belongs to, None for the node's."""
    if key.startswith("net."):
        return "net"
    if key.startswith(("kernel.shm", "kernel.msg", "fs.mqueue.")) or key == "kernel.sem":
        return "ipc"
    return "uts" if key in {"kernel.hostname", "kernel.domainname"} else None


def check(sysctls: Mapping[str, str], namespaces: Collection[str]) -> None:
    """Raise INVALID_ARGUMENT naming the first key that a pod with these namespaces of its own cannot set."""
    for key, value in sysctls.items():
        if not _KEY.match(key):
            raise invalid(f"sysctl {key!r} is not a name of words joined by dots")
        owner = namespace_of(key)
        if owner is None:
            raise invalid(f"sysctl {key} is the node's: it belongs to no namespace of a pod")
        if owner not in namespaces:
            raise invalid(f"sysctl {key} needs the pod to have its own {owner} namespace")
        if len(value) > _VALUE_LIMIT or not _VALUE.match(value):
            raise invalid(f"sysctl {key}: {value!r} is not a value")


def apply(sysctls: Mapping[str, str], *, base: str = "/proc/sys") -> None:
    """Write the parameters in the namespaces of this process. Raises INVALID_ARGUMENT naming the key."""
    for key, value in sysctls.items():
        try:
            _write(os.path.join(base, *key.split(".")), value)
        except OSError as error:
            raise _refused(key, value, error) from None


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _refused(key: str, value: str, error: OSError) -> RemoteError:
    why = _REFUSALS.get(error.errno or 0)
    if why is None:
        return internal(f"sysctl {key}={value}: {error.strerror}")
    return invalid(f"sysctl {key}={value}: {why} ({error.strerror})")
