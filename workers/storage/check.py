"""Runs in: children of storage, and of `bulkhead check` while the service is stopped.

What is wrong with what storage owns: layers against their records, images against layers, root file systems,
pods' files and mounts against the pods and containers that are known, directories that belong to nobody. It
only reads. Owns the words for what can be mended (`key`); mending.py does it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ipc.messages.checking import Finding, Known

from .commit import DESCRIPTION, DIFF
from .content import CONTENT, differences
from .database import LayerRow
from .mounts import mount_points
from .paths import Paths, digest_of

OWNER = "storage"
LAYER, IMAGE, CONTAINER, POD, TREE, DATABASE = "layer", "image", "container", "pod", "tree", "database"
_MAX_CONTENT = 256 * 1024 * 1024
_SHOWN = 3  # differences of one layer
#: What stands in root besides: the supervisor's lock.
_OURS = {
    "layers",
    "l",
    "staging",
    "containers",
    "images.db",
    "images.db-wal",
    "images.db-shm",
    "reserve",
    "lock",
}


@dataclass
class Rows:
    """What the database says."""

    layers: dict[str, LayerRow] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    images: dict[str, list[str]] = field(default_factory=dict)  # chain ids, lowest first
    damaged: dict[str, str] = field(default_factory=dict)  # image -> what is wrong with its row
    containers: dict[str, tuple[str, str]] = field(default_factory=dict)  # id -> pod, image


def inspect(
    root: str, run_root: str, known: Known, *, deep: bool, snapshot: bytes | None = None
) -> list[Finding]:
    """Everything that is wrong. `snapshot`: of the database, while a worker is at work in the store.

    Raises OSError.
    """
    return list(Inspection(Paths(root, run_root), known, deep=deep, snapshot=snapshot).findings())


class Inspection:
    """One look at everything."""

    def __init__(self, paths: Paths, known: Known, *, deep: bool, snapshot: bytes | None) -> None:
        self._paths = paths
        self._known = known
        self._deep = deep
        self._snapshot = snapshot
        self._running = snapshot is not None
        self._rows = Rows()

    def findings(self) -> Iterator[Finding]:
        """What is wrong, owners of others' trouble first."""
        if not self._paths.root.is_dir():
            return
        damage = self._read()
        if damage:
            yield _finding("image database", damage, "put aside; a new one is begun", DATABASE)
            return
        yield from self._layers()
        yield from self._images()
        yield from self._containers()
        yield from self._pods()
        yield from self._strays()

    # -- the database ---------------------------------------------------------------------------------

    def _read(self) -> str:
        """Read all rows; what is wrong with the file, "" for nothing."""
        if not self._paths.database.exists():
            return ""
        try:
            with _opened(self._paths.database, self._snapshot) as db:
                verdict = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
                if verdict != "ok":
                    return verdict
                self._rows = _rows(db)
        except sqlite3.DatabaseError as error:
            return str(error)
        return ""

    # -- layers ---------------------------------------------------------------------------------------

    def _layers(self) -> Iterator[Finding]:
        for chain_id, row in self._rows.layers.items():
            trouble = self._layer_trouble(chain_id, row)
            if trouble:
                yield self._layer(chain_id, trouble)
        for directory in sorted(self._paths.layers.iterdir()):
            chain_id = f"sha{256 if len(directory.name) == 64 else 512}:{directory.name}"
            if chain_id not in self._rows.layers and not self._running:
                yield self._unlisted(chain_id, directory)
        yield from self._links()

    def _layer(self, chain_id: str, trouble: str) -> Finding:
        images = [image for image, layers in self._rows.images.items() if chain_id in layers]
        repair = "layer dropped; " + (
            f"{len(images)} image(s) set aside, to be pulled again" if images else ""
        )
        return _finding(f"layer {chain_id}", trouble, repair.rstrip("; "), f"{LAYER}:{chain_id}")

    def _layer_trouble(self, chain_id: str, row: LayerRow) -> str:
        home = self._paths.layer(chain_id)
        if not (home / DIFF).is_dir():
            return "its directory is missing"
        if row.parent and row.parent not in self._rows.layers:
            return f"the layer below it, {row.parent}, is missing"
        try:
            told = msgspec.json.decode((home / DESCRIPTION).read_bytes(), type=LayerRow)
        except (OSError, msgspec.DecodeError) as error:
            return f"{DESCRIPTION}: {error}"
        if told != row:
            return f"{DESCRIPTION} and the database do not agree"
        return self._content_trouble(home)

    def _content_trouble(self, home: Path) -> str:
        """Layers of earlier releases have no record of their content."""
        try:
            with (home / CONTENT).open("rb") as file:
                found = list(differences(str(home / DIFF), file.read(_MAX_CONTENT), deep=self._deep))
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            return str(error)
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return "; ".join(found[:_SHOWN]) + more

    def _unlisted(self, chain_id: str, directory: Path) -> Finding:
        key = f"{TREE}:{directory}"
        with contextlib.suppress(OSError, msgspec.DecodeError):
            row = msgspec.json.decode((directory / DESCRIPTION).read_bytes(), type=LayerRow)
            if row.chain_id == chain_id:
                return _finding(
                    f"layer {chain_id}", "it is not listed", "listed again", f"{TREE}:{directory}"
                )
        return _finding(f"directory {directory}", "it is no layer", "deleted", key)

    def _links(self) -> Iterator[Finding]:
        """Short links are made when a container needs them; one that leads elsewhere would mislead."""
        targets = {str(number): self._paths.layer(c) / DIFF for c, number in self._rows.numbers.items()}
        for link in sorted(self._paths.links.iterdir()):
            trouble = "" if link.name == "empty" else _link_trouble(link, targets.get(link.name))
            if trouble and not (self._running and link.name not in targets):
                yield _finding(f"link {link}", trouble, "removed", f"{TREE}:{link}")

    # -- images ---------------------------------------------------------------------------------------

    def _images(self) -> Iterator[Finding]:
        for image, trouble in self._rows.damaged.items():
            yield self._image(image, trouble)
        for image, layers in self._rows.images.items():
            missing = [layer for layer in layers if layer not in self._rows.layers]
            if missing:
                yield self._image(image, f"its layer {missing[0]} is missing")

    def _image(self, image: str, trouble: str) -> Finding:
        return _finding(f"image {image}", trouble, "set aside, to be pulled again", f"{IMAGE}:{image}")

    # -- containers and pods --------------------------------------------------------------------------

    def _containers(self) -> Iterator[Finding]:
        known = set(self._known.containers)
        found = set(self._rows.containers)
        for directory in (self._paths.containers, self._paths.mounts):
            found.update(os.listdir(directory) if directory.is_dir() else [])
        for container in sorted(found - known):
            yield _stray("container", container, "files or mounts of it are left", CONTAINER)
        mounted = mount_points(str(self._paths.mounts))
        for container in sorted(known & set(self._known.running)):
            if container not in found:
                yield _finding(f"container {container}", "it runs, and storage knows nothing of it")
            elif str(self._paths.mounts / container / "rootfs") not in mounted:
                yield _finding(f"container {container}", "it runs, and its root file system is not mounted")

    def _pods(self) -> Iterator[Finding]:
        known = set(self._known.pods)
        for pod in sorted(os.listdir(self._paths.pods) if self._paths.pods.is_dir() else []):
            if pod not in known:
                yield _stray("pod", pod, "files or mounts of it are left", POD)
        mounted = mount_points(str(self._paths.pods))
        for pod in self._known.ready:
            home = self._paths.pods / pod
            if not (home / "resolv.conf").exists():
                yield _finding(f"pod {pod}", "its files are missing")
            elif (home / "shm").is_dir() and str(home / "shm") not in mounted:
                yield _finding(f"pod {pod}", "its /dev/shm is not mounted")

    def _strays(self) -> Iterator[Finding]:
        """Not in staging: what an end of storage leaves there is deleted by its next start."""
        for path in sorted(self._paths.root.iterdir()):
            if path.name not in _OURS and not path.name.startswith("images.db.broken-"):
                yield _finding(f"file {path}", "it is not of this program")


def _finding(what: str, problem: str, repair: str = "", key: str = "") -> Finding:
    return Finding(owner=OWNER, object=what, problem=problem, repair=repair, key=key)


def _stray(kind: str, id_: str, problem: str, key: str) -> Finding:
    finding = _finding(f"{kind} {id_}", f"nobody knows it; {problem}", "removed", f"{key}:{id_}")
    finding.subject = id_
    return finding


def _link_trouble(link: Path, target: Path | None) -> str:
    if target is None:
        return "there is no layer of that number"
    leads = link.is_symlink() and (link.parent / link.readlink()).resolve() == target.resolve()
    return "" if leads else "it does not lead to its layer"


@contextlib.contextmanager
def _opened(path: Path, snapshot: bytes | None) -> Iterator[sqlite3.Connection]:
    """What a worker told of its database; without one a copy, since whoever opens a database makes files."""
    with contextlib.ExitStack() as stack:
        if snapshot is None:
            home = stack.enter_context(tempfile.TemporaryDirectory(prefix="bulkhead-check-"))
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(f"{path}{suffix}", f"{home}/copy{suffix}")
            db = stack.enter_context(contextlib.closing(sqlite3.connect(f"{home}/copy")))
        else:
            db = stack.enter_context(contextlib.closing(sqlite3.connect(":memory:")))
            db.deserialize(snapshot)
        yield db


def _rows(db: sqlite3.Connection) -> Rows:
    rows = Rows()
    statement = "SELECT number, chain_id, parent, diff_id, size, entries, opaque FROM layers"
    for number, chain_id, parent, diff_id, size, entries, opaque in db.execute(statement):
        rows.numbers[chain_id] = number
        rows.layers[chain_id] = LayerRow(
            chain_id=chain_id,
            parent=parent,
            diff_id=diff_id,
            size=size,
            entries=entries,
            opaque=bool(opaque),
        )
    for image, config in db.execute("SELECT id, config FROM images WHERE broken = 0"):
        rows.images[image] = []
        if not isinstance(config, bytes) or digest_of(config) != image:
            rows.damaged[image] = "its id is not the digest of its config"
    for image, chain_id in db.execute(
        "SELECT image_id, chain_id FROM image_layers ORDER BY image_id, position"
    ):
        if image in rows.images:
            rows.images[image].append(chain_id)
    rows.containers = {id_: (pod, image) for id_, pod, image in db.execute("SELECT * FROM containers")}
    return rows
