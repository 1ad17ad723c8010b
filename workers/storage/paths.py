"""Runs in: storage and its children.

Where storage keeps what, and which identifiers may become a file's name there.

    <root>/layers/<chain hex>/{diff/,layer.json}    one committed layer
    <root>/l/<number>                               short link to a layer's diff, for overlay options
    <root>/l/empty/                                 what lies below an image without layers
    <root>/staging/<name>/                          what is being made, or being deleted
    <root>/containers/<id>/{upper,work}/            one container's writable layer
    <root>/images.db                                images, and a cache of the layers
    <run_root>/containers/<id>/rootfs               one container's overlay mount
    <run_root>/containers/<id>/{lower,mounts}/      id-mapped mounts of one in a user namespace (idmap.py)
    <run_root>/pods/<id>/{resolv.conf,hostname,hosts,shm/}
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import sys
from pathlib import Path

from ipc.errors import invalid

#: The interpreter's own modules of hashes, by algorithm.
_OWN = {
    algorithm: importlib.import_module("_sha2" if sys.version_info >= (3, 12) else f"_{algorithm}")
    for algorithm in ("sha256", "sha512")
}
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def checked_id(identifier: str, what: str) -> str:
    """An identifier that is safe as a file name. INVALID_ARGUMENT otherwise."""
    if not _ID.fullmatch(identifier):
        raise invalid(f"{identifier!r} is no {what} id")
    return identifier


def checked_digest(digest: str, what: str) -> str:
    """A digest of OCI's registered algorithms. INVALID_ARGUMENT otherwise."""
    if not _DIGEST.fullmatch(digest):
        raise invalid(f"{digest!r} is no digest for a {what}")
    return digest


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """OCI digest of `data`, which is small: by the interpreter's own code, for hashlib brings OpenSSL along,
    a fifth of an idle worker's memory."""
    return f"{algorithm}:{getattr(_OWN[algorithm], algorithm)(data).hexdigest()}"


class Paths:
    """All paths of one instance. No name in staging is ever used twice, not by two lives of the worker."""

    def __init__(self, root: str, run_root: str) -> None:
        self.root = Path(root)
        self.layers = self.root / "layers"
        self.links = self.root / "l"
        self.staging = self.root / "staging"
        self.containers = self.root / "containers"
        self.database = self.root / "images.db"
        self.mounts = Path(run_root) / "containers"
        self.pods = Path(run_root) / "pods"
        self.namespaces = Path(run_root) / "ns"  # pins, made by network
        self._life = os.urandom(4).hex()
        self._numbers = itertools.count(1)

    def make(self) -> None:
        """Make the directories. Closed to everybody else: what lies in them may be setuid."""
        for directory in (self.root, self.mounts.parent, self.pods.parent):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        private = (self.layers, self.links, self.staging, self.containers, self.mounts, self.pods)
        for directory in private:
            directory.mkdir(mode=0o700, exist_ok=True)
        (self.links / "empty").mkdir(mode=0o755, exist_ok=True)

    def layer(self, chain_id: str) -> Path:
        """A committed layer's directory."""
        return self.layers / chain_id.partition(":")[2]

    def fresh(self, name: str) -> Path:
        """A new name in staging."""
        return self.staging / f"{name}-{self._life}-{next(self._numbers)}"
