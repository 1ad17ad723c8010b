"""Runs in: children of network and of storage.

User namespaces: writing the mappings of one that a process beside us has made, and becoming its root. It owns
nothing and decides nothing; what may be mapped was checked by whoever asked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ipc import confine, kernel
from ipc.messages import IdMapping

#: What the root of a new namespace keeps, to prepare what the namespace owns.
_ROOT_KEEPS = ("NET_ADMIN", "SYS_ADMIN")


def unshare(more: int = 0) -> None:
    """Enter a new user namespace and, owned by it, further ones (CLONE_NEW*). Raises OSError."""
    kernel.unshare(kernel.CLONE_NEWUSER | more)


def write_mappings(pid: int, uids: Sequence[IdMapping], gids: Sequence[IdMapping]) -> None:
    """Give the process's new user namespace its mappings, once and for all. Raises OSError."""
    for name, mappings in (("gid_map", gids), ("uid_map", uids)):
        lines = "".join(f"{m.container_id} {m.host_id} {m.length}\n" for m in mappings)
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, lines.encode())
        finally:
            os.close(fd)


def become_root() -> None:
    """Be the root of the user namespace that this process made: some parameters heed nobody else."""
    confine.become(0, 0, (), _ROOT_KEEPS)


def on_host(mappings: Sequence[IdMapping], number: int) -> int:
    """The host's id of a container's. Raises LookupError if it has none."""
    for mapping in mappings:
        if 0 <= number - mapping.container_id < mapping.length:
            return mapping.host_id + number - mapping.container_id
    raise LookupError(number)
