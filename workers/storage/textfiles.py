"""Runs in: children of storage. Small files of the host's administrator: hooks, CDI specifications.

Refuses what is no regular file or larger than its reader expects.
"""

from __future__ import annotations

import os
import stat


def read_file(path: str, limit: int) -> bytes:
    """The content of a regular file, links followed. Raises OSError, ValueError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return data
