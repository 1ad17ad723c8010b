"""Runs in: storage, unpack.

What the worker tells an unpack child, and what the child leaves for the commit job. A module of its own, so
that the worker need not load what only the child uses.
"""

from __future__ import annotations

from ipc.messages import Body


class Blob(Body):
    """One layer's blob and what it must turn out to be. `lowest`: nothing lies below it."""

    chain_id: str
    diff_id: str
    digest: str
    size: int
    lowest: bool = False


class Limits(Body):
    """How much one layer may be, and who the child is while it unpacks."""

    max_entries: int
    max_bytes: int
    max_ratio: int
    uid: int = 0


class LayerReport(Body):
    """What an unpack child says of its tree. Paths are relative to the layer's root, "" is the root."""

    size: int  # bytes on disk
    entries: int
    implied: list[bytes] = []  # directories that no entry describes
    opaque: list[bytes] = []  # directories that hide what lies below
    ignored_xattrs: list[str] = []
    diff_id: str = ""
    blob_digest: str = ""
    blob_size: int = 0
