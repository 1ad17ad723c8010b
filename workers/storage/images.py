"""Runs in: storage.

Images: what a name, a digest or an id stands for, and when an image goes. An image's id is the digest of
its config. The rows are written after the layers are committed and deleted before they are, so an image
that is listed is whole.

Refuses to remove an image that a container uses. An image whose layers are damaged is set aside (not
listed, not found) so that it is pulled again; its other layers stay while containers run on them.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable

from ipc import log
from ipc.errors import Code, RemoteError, invalid, precondition
from ipc.messages import Empty
from ipc.messages.storage import (
    ImageFound,
    ImageGet,
    ImageList,
    ImagePut,
    ImageRecord,
    ImageRemove,
    ImagesListed,
    ImageStored,
)
from ipc.serve import Call

from .database import Database
from .layers import Layers
from .paths import checked_digest, digest_of

_ID_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{3,64})")
MAX_REFERENCES = 4096


class Images:
    """The image store of one root directory."""

    def __init__(
        self, database: Database, layers: Layers, soon: Callable[[Callable[[], object]], None]
    ) -> None:
        self._database = database
        self._layers = layers
        self._soon = soon

    def put(self, _call: Call, body: ImagePut) -> ImageStored:
        """storage.image.put"""
        image = body.image
        self._check(image)
        self._database.write(lambda connection: _write(connection, image))
        self._layers.release(image.layers)
        return ImageStored(image=self._record(image.id))

    def _check(self, image: ImageRecord) -> None:
        checked_digest(image.id, "image")
        if image.id != digest_of(image.config, image.id.partition(":")[0]):
            raise RemoteError(Code.DATA_LOSS, f"image id {image.id} is not the digest of its config")
        if len(image.names) + len(image.digests) > MAX_REFERENCES or "" in image.names + image.digests:
            raise invalid(f"image {image.id}: empty or too many names")
        below = ""
        for chain_id in image.layers:
            found = self._database.layer(chain_id)
            if found is None:
                raise precondition(f"image {image.id}: layer {chain_id} is not committed")
            if found[1].parent != below:
                raise invalid(f"image {image.id}: layer {chain_id} does not lie on {below or 'nothing'}")
            below = chain_id

    def get(self, _call: Call, body: ImageGet) -> ImageFound:
        """storage.image.get"""
        image_id = self.find(body.reference)
        return ImageFound(image=None if image_id is None else self._record(image_id))

    def list_all(self, _call: Call, _body: ImageList) -> ImagesListed:
        """storage.image.list"""
        rows = self._database.rows("SELECT id FROM images WHERE broken = 0 ORDER BY created_at_ns, id")
        return ImagesListed(images=[self._record(str(row[0])) for row in rows])

    def find(self, reference: str) -> str | None:
        """The id that a reference stands for. INVALID_ARGUMENT if several do."""
        for statement in (
            "SELECT id FROM images WHERE id = ? AND broken = 0",
            "SELECT image_id FROM names WHERE name = ?",
            "SELECT image_id FROM digests WHERE digest = ?",
        ):
            rows = self._database.rows(statement, reference)
            if rows:
                return str(rows[0][0])
        prefix = _ID_PREFIX.fullmatch(reference)
        return self._find_prefix(prefix[1]) if prefix else None

    def _find_prefix(self, prefix: str) -> str | None:
        rows = self._database.rows(
            "SELECT id FROM images WHERE id GLOB ? AND broken = 0 LIMIT 2", f"sha256:{prefix}*"
        )
        if len(rows) > 1:
            raise invalid(f"several images have an id that begins with {prefix}")
        return str(rows[0][0]) if rows else None

    def layers_of(self, image_id: str) -> list[str]:
        """An image's chain ids, lowest first."""
        rows = self._database.rows(
            "SELECT chain_id FROM image_layers WHERE image_id = ? ORDER BY position", image_id
        )
        return [str(row[0]) for row in rows]

    def _record(self, image_id: str) -> ImageRecord:
        (config, manifest, media_type, pinned, created), *_ = self._database.rows(
            "SELECT config, manifest, manifest_media_type, pinned, created_at_ns FROM images WHERE id = ?",
            image_id,
        )
        assert isinstance(config, bytes)
        assert isinstance(manifest, bytes)
        assert isinstance(created, int)
        return ImageRecord(
            id=image_id,
            config=config,
            manifest=manifest,
            manifest_media_type=str(media_type),
            names=self._column("SELECT name FROM names WHERE image_id = ? ORDER BY name", image_id),
            digests=self._column("SELECT digest FROM digests WHERE image_id = ? ORDER BY digest", image_id),
            layers=self.layers_of(image_id),
            size=self._number(_SIZE, image_id),
            pinned=bool(pinned),
            created_at_ns=created,
            in_use=self._number(_IN_USE, image_id),
        )

    def _column(self, statement: str, image_id: str) -> list[str]:
        return [str(row[0]) for row in self._database.rows(statement, image_id)]

    def _number(self, statement: str, image_id: str) -> int:
        value = self._database.rows(statement, image_id)[0][0]
        assert isinstance(value, int)
        return value

    # -- removal --------------------------------------------------------------------------------------

    def remove(self, _call: Call, body: ImageRemove) -> Empty:
        """storage.image.remove"""
        image_id = self.find(body.reference)
        if image_id is None:
            return Empty()
        image = self._record(image_id)
        if _is_last(image, body.reference):
            self._refuse_in_use(image)
            self._delete(image_id)
        else:
            self._untag(body.reference)
        return Empty()

    def _refuse_in_use(self, image: ImageRecord) -> None:
        if image.in_use:
            users = self._column(_USERS, image.id)
            shown = ", ".join(users) + (", ..." if image.in_use > len(users) else "")
            raise precondition(f"image {image.id} is in use by {image.in_use} container(s): {shown}")

    def _untag(self, reference: str) -> None:
        def untag(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM names WHERE name = ?", (reference,))
            connection.execute("DELETE FROM digests WHERE digest = ?", (reference,))

        self._database.free(untag)

    def _delete(self, image_id: str) -> None:
        self._database.free(lambda c: c.execute("DELETE FROM images WHERE id = ?", (image_id,)))
        log.get().info("image removed", image=image_id)
        self._soon(self._layers.sweep)  # when the answer is on its way

    def container_gone(self) -> None:
        """A container was removed: a damaged image that only it still used can go."""
        broken = "SELECT id FROM images WHERE broken = 1 AND id NOT IN (SELECT image_id FROM image_users)"
        for row in self._database.rows(broken):
            self._delete(str(row[0]))

    # -- start ----------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """At start, after the layers': set images aside that lack a layer. Nothing else is touched."""
        damaged = self._database.rows(
            "SELECT DISTINCT image_id FROM image_layers JOIN images ON id = image_id"
            " WHERE broken = 0 AND chain_id NOT IN (SELECT chain_id FROM layers)"
        )
        for row in damaged:
            image_id = str(row[0])
            log.get().error(
                "image lacks a layer and must be pulled again",
                image=image_id,
                names=self._column("SELECT name FROM names WHERE image_id = ?", image_id),
            )
            self.set_aside(image_id)
        self.container_gone()

    def users_of_layer(self, chain_id: str) -> set[str]:
        """The containers whose root, or a volume of which, has this layer."""
        return set(self._column(_LAYER_USERS, chain_id))

    def set_aside_with(self, chain_id: str) -> None:
        """Set every image aside that has this layer."""
        for image_id in self._column("SELECT image_id FROM image_layers WHERE chain_id = ?", chain_id):
            self.set_aside(image_id)
        self.container_gone()

    def forget_all(self) -> None:
        """No image is known any more, whoever uses it."""
        self._database.free(lambda c: c.execute("DELETE FROM images"))

    def set_aside(self, image_id: str) -> None:
        """It is not listed any more, and goes with the last container that uses it."""

        def set_aside(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE images SET broken = 1 WHERE id = ?", (image_id,))
            connection.execute("DELETE FROM names WHERE image_id = ?", (image_id,))
            connection.execute("DELETE FROM digests WHERE image_id = ?", (image_id,))

        self._database.free(set_aside)


_SIZE = (
    "SELECT COALESCE(SUM(size), 0) FROM layers WHERE chain_id IN"
    " (SELECT chain_id FROM image_layers WHERE image_id = ?)"
)
_IN_USE = "SELECT COUNT(*) FROM image_users WHERE image_id = ?"
_LAYER_USERS = (
    "SELECT DISTINCT container_id FROM image_users JOIN image_layers USING (image_id) WHERE chain_id = ?"
)
_USERS = "SELECT container_id FROM image_users WHERE image_id = ? ORDER BY container_id LIMIT 3"


def _is_last(image: ImageRecord, reference: str) -> bool:
    """True if without `reference` nothing is left of the image: it was meant by its id, by its only name, or
    by its only digest while it has no name."""
    if reference in image.names:
        return len(image.names) == 1
    if reference in image.digests:
        return len(image.digests) == 1 and not image.names
    return True


def _write(connection: sqlite3.Connection, image: ImageRecord) -> None:
    connection.execute(
        "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, 0) ON CONFLICT(id) DO UPDATE SET"
        " manifest = excluded.manifest, manifest_media_type = excluded.manifest_media_type,"
        " pinned = excluded.pinned, broken = 0",
        (
            image.id,
            image.config,
            image.manifest,
            image.manifest_media_type,
            int(image.pinned),
            image.created_at_ns or time.time_ns(),
        ),
    )
    connection.execute("DELETE FROM image_layers WHERE image_id = ?", (image.id,))
    connection.executemany(
        "INSERT INTO image_layers VALUES (?, ?, ?)",
        [(image.id, position, chain_id) for position, chain_id in enumerate(image.layers)],
    )
    for name in image.names:
        connection.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (name, image.id))
    for digest in image.digests:
        connection.execute("INSERT OR REPLACE INTO digests VALUES (?, ?)", (digest, image.id))
