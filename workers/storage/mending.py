"""Runs in: storage, and in `bulkhead check --repair` while the service is stopped.

Mends what a check has found, one thing after the other, with the means by which storage does everything: a
broken layer is dropped and its images are set aside, so that they are pulled again; what belongs to nobody is
unmounted and removed. It leaves alone what a container that runs is made of, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ipc.errors import RemoteError
from ipc.messages.checking import Finding, Known, left, repaired

from .check import CONTAINER, DATABASE, IMAGE, LAYER, POD, TREE
from .paths import checked_id
from .trouble import HOST_TROUBLE

if TYPE_CHECKING:
    from .main import Storage

_Next = Callable[[], None]


class Mender:
    """One list of findings, being worked off; `done` is called at the end."""

    def __init__(
        self, storage: Storage, known: Known, findings: list[Finding], done: Callable[[list[Finding]], None]
    ) -> None:
        self._storage = storage
        self._known = known
        self._findings = findings
        self._pending = list(reversed(findings))
        self._done = done
        self._means: dict[str, Callable[[Finding, str, _Next], None]] = {
            LAYER: self._layer,
            IMAGE: self._image,
            CONTAINER: self._container,
            POD: self._pod,
            TREE: self._tree,
            DATABASE: self._database,
        }

    def go_on(self) -> None:
        """The next finding, or the end."""
        if not self._pending:
            self._storage.layers.sweep()
            self._done(self._findings)
            return
        finding = self._pending.pop()
        kind, _, name = finding.key.partition(":")
        means = self._means.get(kind)
        if means is None:
            left(finding, "nothing can mend it")
            self.go_on()
            return
        try:
            means(finding, name, self.go_on)
        except (RemoteError, *HOST_TROUBLE) as error:
            left(finding, str(error))
            self.go_on()

    # -- layers and images ----------------------------------------------------------------------------

    def _layer(self, finding: Finding, chain_id: str, then: _Next) -> None:
        users = self._storage.images.users_of_layer(chain_id) & set(self._known.running)
        if users:
            left(finding, f"container {min(users)} runs on it; its image can be removed after its end")
        else:
            self._storage.images.set_aside_with(chain_id)
            self._storage.layers.drop(chain_id)
            repaired(finding)
        then()

    def _image(self, finding: Finding, image_id: str, then: _Next) -> None:
        self._storage.images.set_aside(image_id)
        repaired(finding)
        then()

    def _database(self, finding: Finding, _name: str, then: _Next) -> None:
        """It was put aside when it was opened, or a worker has it open."""
        if self._storage.serves:
            left(finding, "`bulkheadctl restart storage` puts it aside and lists the layers again")
        else:
            repaired(finding)
        then()

    # -- what belongs to nobody -----------------------------------------------------------------------

    def _container(self, finding: Finding, container_id: str, then: _Next) -> None:
        checked_id(container_id, "container")
        self._storage.containers.discard(container_id, lambda outcome: self._ended(finding, outcome, then))

    def _pod(self, finding: Finding, pod_id: str, then: _Next) -> None:
        checked_id(pod_id, "pod")
        self._storage.pods.discard(pod_id, lambda outcome: self._ended(finding, outcome, then))

    def _ended(self, finding: Finding, outcome: object, then: _Next) -> None:
        left(finding, outcome.text) if isinstance(outcome, RemoteError) else repaired(finding)
        then()

    def _tree(self, finding: Finding, name: str, then: _Next) -> None:
        path = Path(name)
        if path.parent == self._storage.paths.links:
            path.unlink(missing_ok=True)
        repaired(finding)  # a directory of no layer: the start of storage has seen to it
        then()
