"""Runs in: `bulkhead check` and `bulkhead wipe`, which hold the instance's locks: no storage worker lives.

Storage without a socket, for as long as it takes to mend what a check has found, or to take everything away.
"""

from __future__ import annotations

from ipc.loop import Loop
from ipc.messages.checking import Finding, Known
from ipc.settings import StorageSettings

from . import check
from .main import Storage
from .mending import Mender
from .paths import Paths


def inspect(settings: StorageSettings, known: Known, *, deep: bool) -> list[Finding]:
    """What is wrong; nothing is changed. Raises OSError."""
    return check.inspect(settings.root, settings.run_root, known, deep=deep)


def mend(settings: StorageSettings, known: Known, findings: list[Finding]) -> list[Finding]:
    """Mend what was found; each finding says what has become of it. Raises OSError, sqlite3.Error."""
    loop = Loop()
    storage = _opened(loop, settings)
    try:
        storage.reconcile()
        Mender(storage, known, findings, lambda _: None).go_on()
        _finish(loop, storage)
    finally:
        storage.database.close()
    return findings


def wipe_images(settings: StorageSettings) -> None:
    """Forget every image and delete every layer. Raises OSError, sqlite3.Error."""
    loop = Loop()
    storage = _opened(loop, settings)
    try:
        storage.images.forget_all()
        storage.reconcile()
        storage.layers.sweep()
        _finish(loop, storage)
    finally:
        storage.database.close()


def _opened(loop: Loop, settings: StorageSettings) -> Storage:
    paths = Paths(settings.root, settings.run_root)
    paths.make()
    return Storage(loop, paths, settings, serves=False)


def _finish(loop: Loop, storage: Storage) -> None:
    """Turn the loop until no child is at work any more, nor has anything left to be deleted."""
    while storage.jobs.running:
        loop.turn()
    storage.layers.empty()
    while storage.jobs.running:
        loop.turn()
