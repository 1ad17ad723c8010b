"""Runs in: storage.

The SQLite file: images with their names and digests, which container uses which image, and the layers. Only
images and containers are truth here; the layers' rows are a cache of their directories, rebuilt at start.
WAL with synchronous=FULL: what was answered of images survives a power loss. Containers do not survive one
themselves; their rows are written without waiting for the disk, and their directories tell what there was.

What makes room must work on a full disk: a reserve file is given up for it, and made again later.

A file that SQLite cannot read is put aside, never deleted, and a new one begun: the layers are still there,
so pulling an image again costs its manifest only.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ipc import log
from ipc.messages import Body

SCHEMA_VERSION = 1
RESERVE = 512 * 1024  # more than the journal of any removal needs
_SCHEMA = """
CREATE TABLE layers(
    number INTEGER PRIMARY KEY AUTOINCREMENT, chain_id TEXT NOT NULL UNIQUE, parent TEXT NOT NULL,
    diff_id TEXT NOT NULL, size INTEGER NOT NULL, entries INTEGER NOT NULL, opaque INTEGER NOT NULL);
CREATE TABLE images(
    id TEXT PRIMARY KEY, config BLOB NOT NULL, manifest BLOB NOT NULL, manifest_media_type TEXT NOT NULL,
    pinned INTEGER NOT NULL, created_at_ns INTEGER NOT NULL, broken INTEGER NOT NULL);
CREATE TABLE image_layers(
    image_id TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE, position INTEGER NOT NULL,
    chain_id TEXT NOT NULL, PRIMARY KEY (image_id, position)) WITHOUT ROWID;
CREATE INDEX image_layers_by_chain ON image_layers(chain_id);
CREATE TABLE names(
    name TEXT PRIMARY KEY, image_id TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE) WITHOUT ROWID;
CREATE TABLE digests(
    digest TEXT PRIMARY KEY, image_id TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE) WITHOUT ROWID;
CREATE TABLE containers(
    id TEXT PRIMARY KEY, pod_id TEXT NOT NULL, image_id TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX containers_by_image ON containers(image_id);
"""
#: Since the first schema, made where it is missing: an older release goes on without it.
_ADDITIONS = """
CREATE TABLE IF NOT EXISTS image_volumes(
    container_id TEXT NOT NULL, image_id TEXT NOT NULL, PRIMARY KEY (container_id, image_id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS image_volumes_by_image ON image_volumes(image_id);
CREATE VIEW IF NOT EXISTS image_users(image_id, container_id) AS
    SELECT image_id, id FROM containers UNION SELECT image_id, container_id FROM image_volumes;
"""


Operation = Callable[[sqlite3.Connection], object]


class LayerRow(Body):
    """One committed layer; also the content of its `layer.json`. `opaque`: hides all layers below it."""

    chain_id: str
    parent: str
    diff_id: str
    size: int
    entries: int
    opaque: bool = False


class Database:
    """One connection. Every method is one statement or one transaction."""

    def __init__(self, path: Path) -> None:
        self._reserve = path.with_name("reserve")
        self._connection = self._open_anyhow(path)
        self._make_reserve()

    def _open_anyhow(self, path: Path) -> sqlite3.Connection:
        try:
            return _open(path)
        except sqlite3.OperationalError:  # no space for the journal, a lock, no permission: the file is good
            if not self._reserve.exists():
                raise
            self._reserve.unlink()
            return _open(path)
        except sqlite3.DatabaseError as error:
            _put_aside(path, error)
            return _open(path)

    def close(self) -> None:
        """Close; a last checkpoint is made."""
        self._connection.close()

    @contextlib.contextmanager
    def _not_waiting(self) -> Iterator[None]:
        """Transactions meanwhile are all or nothing, and safe from the death of this process only."""
        self._connection.execute("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            self._connection.execute("PRAGMA synchronous = FULL")

    def write(self, operation: Operation) -> None:
        """Run one transaction: all or nothing, on disk when this returns. Raises sqlite3.Error."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            operation(self._connection)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite may have rolled back by itself
                self._connection.execute("ROLLBACK")
            raise

    def free(self, operation: Operation) -> None:
        """As `write`, for what removes something: on a full disk the reserve is used up."""
        try:
            self.write(operation)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL or not self._reserve.exists():
                raise
            log.get().warning("disk is full: the reserve is used up to make room")
            self._reserve.unlink()
            self.write(operation)
        else:
            self._make_reserve()

    def _make_reserve(self) -> None:
        if self._reserve.exists():
            return
        try:
            with self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE)
        except OSError:  # no room for it now; the next removal tries again
            self._reserve.unlink(missing_ok=True)

    def snapshot(self) -> bytes:
        """The whole file as it is now. A child cannot open it: SQLite's locks do not bear a fork."""
        data = bytearray(self._connection.serialize())
        data[18:20] = b"\1\1"  # no journal mode that needs a file beside it (fileformat2.html, 1.3.3)
        return bytes(data)

    def rows(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        """The rows of a query."""
        return self._connection.execute(statement, values).fetchall()

    # -- layers ---------------------------------------------------------------------------------------

    def layer(self, chain_id: str) -> tuple[int, LayerRow] | None:
        """A layer's number and row."""
        row = self._connection.execute(
            "SELECT number, chain_id, parent, diff_id, size, entries, opaque FROM layers WHERE chain_id = ?",
            (chain_id,),
        ).fetchone()
        return None if row is None else (row[0], _layer_row(row[1:]))

    def chain_ids(self) -> set[str]:
        """All layers that have a row."""
        return {str(row[0]) for row in self.rows("SELECT chain_id FROM layers")}

    def add_layer(self, layer: LayerRow) -> None:
        """Record a layer whose directory is in place."""
        self._connection.execute(
            "INSERT OR REPLACE INTO layers(chain_id, parent, diff_id, size, entries, opaque)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (layer.chain_id, layer.parent, layer.diff_id, layer.size, layer.entries, int(layer.opaque)),
        )

    def drop_layers(self, chain_ids: Iterable[str]) -> None:
        """Forget layers."""
        doomed = [(chain_id,) for chain_id in chain_ids]
        self.free(lambda c: c.executemany("DELETE FROM layers WHERE chain_id = ?", doomed))

    def totals(self) -> tuple[int, int]:
        """Bytes and entries of all layers."""
        row = self._connection.execute(
            "SELECT COALESCE(SUM(size), 0), COALESCE(SUM(entries), 0) FROM layers"
        ).fetchone()
        return row[0], row[1]

    def unreferenced_layers(self) -> list[str]:
        """Layers of no image, those on top first."""
        found = self.rows(
            "SELECT chain_id FROM layers WHERE chain_id NOT IN (SELECT chain_id FROM image_layers)"
            " ORDER BY number DESC"
        )
        return [str(row[0]) for row in found]

    # -- containers -----------------------------------------------------------------------------------

    def container(self, container_id: str) -> tuple[str, str] | None:
        """A container's pod and image."""
        row = self._connection.execute(
            "SELECT pod_id, image_id FROM containers WHERE id = ?", (container_id,)
        ).fetchone()
        return None if row is None else (row[0], row[1])

    def container_ids(self) -> set[str]:
        """All containers that have a row."""
        return {str(row[0]) for row in self.rows("SELECT id FROM containers")}

    def add_container(
        self, container_id: str, pod_id: str, image_id: str, volume_images: Iterable[str] = ()
    ) -> None:
        """Record a container; its image and those of its image volumes are in use from here on."""
        volumes = {(container_id, volume_image) for volume_image in volume_images}

        def add(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO containers VALUES (?, ?, ?)", (container_id, pod_id, image_id)
            )
            connection.executemany("INSERT OR REPLACE INTO image_volumes VALUES (?, ?)", volumes)

        with self._not_waiting():
            self.write(add)

    def drop_container(self, container_id: str) -> None:
        """Forget a container."""

        def drop(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM containers WHERE id = ?", (container_id,))
            connection.execute("DELETE FROM image_volumes WHERE container_id = ?", (container_id,))

        with self._not_waiting():
            self.free(drop)


def _layer_row(row: tuple[str, str, str, int, int, int]) -> LayerRow:
    chain_id, parent, diff_id, size, entries, opaque = row
    return LayerRow(
        chain_id=chain_id, parent=parent, diff_id=diff_id, size=size, entries=entries, opaque=bool(opaque)
    )


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;"
            "PRAGMA cache_size = -512; PRAGMA journal_size_limit = 1048576;"
        )
        _check(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    elif version != SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"its schema is version {version}, this program's {SCHEMA_VERSION}")
    connection.executescript(f"BEGIN; {_ADDITIONS} COMMIT;")
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)


def _put_aside(path: Path, error: sqlite3.DatabaseError) -> None:
    aside = f"{path}.broken-{time.time_ns()}"
    log.get().error("image database is unreadable; put aside, a new one is begun", why=error, kept_as=aside)
    for suffix in ("", "-wal", "-shm"):
        if Path(f"{path}{suffix}").exists():
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
