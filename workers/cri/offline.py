"""Runs in: `bulkhead check` and `bulkhead wipe`, which hold the instance's locks: no cri lives.

The state as the next cri will find it: of a copy, for a database that is opened makes files of whoever opened
it. Whom it does not tell of, but whom their own records tell of, is known all the same: the next cri takes
them in again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from ipc import log
from ipc.messages.checking import Finding, Known, repaired
from ipc.settings import CriSettings
from workers.cri import database, kept
from workers.cri.check import FILE, OWNER
from workers.cri.names import sandbox_id
from workers.cri.rebuild import EXIT, KEPT, running
from workers.cri.state import KeptContainer, KeptPod, Phase, Store


class _Quiet(log.Log):
    """The copy's own trouble is a finding, not a line."""

    def __init__(self) -> None:
        super().__init__("check", level="error")

    def error(self, event: str, **fields: object) -> None:
        """Nothing."""


def look(settings: CriSettings, boot_id: str) -> tuple[Known, list[Finding]]:
    """Who is known, and what is wrong with the file. Raises OSError."""
    path = _path(settings)
    with _copy(path) as copy:
        findings = list(_damage(path, copy))
        store = Store(copy, boot_id)
        try:
            return _known(settings, store, boot_id), findings
        finally:
            store.close()


def mend(settings: CriSettings, findings: list[Finding]) -> list[Finding]:
    """A damaged file is set aside; the next cri makes another of what stands beside it. Raises OSError."""
    for finding in findings:
        if finding.key == FILE:
            database.set_aside(_path(settings))
            repaired(finding)
    return findings


def _path(settings: CriSettings) -> str:
    return f"{settings.run_root}/cri/state.db"


@contextlib.contextmanager
def _copy(path: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="bulkhead-check-") as home:
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path + suffix, f"{home}/state.db{suffix}")
        before = log.get()
        log.set_log(_Quiet())
        try:
            yield f"{home}/state.db"
        finally:
            log.set_log(before)


def _damage(path: str, copy: str) -> Iterator[Finding]:
    """What the next cri would set aside. A file that is not there is none of the trouble."""
    if not os.path.lexists(path):
        return
    trouble = Store.trouble(copy)
    if trouble:
        yield Finding(
            owner=OWNER,
            object=f"file {path}",
            problem=trouble,
            repair="set aside; made again at the next start",
            key=FILE,
        )


def _known(settings: CriSettings, store: Store, boot_id: str) -> Known:
    monitors = f"{settings.run_root}/monitors"
    strangers = running(monitors)
    live = {c.id for c in store.containers.values() if c.phase in {Phase.CREATED, Phase.RUNNING}}
    ended = {name for name in kept.directories(monitors) if os.path.lexists(f"{monitors}/{name}/{EXIT}")}
    pods = {*store.pods, *strangers.values(), *_kept_pods(settings, boot_id)}
    containers = {*store.containers, *strangers}
    for name in kept.directories(monitors):
        found = kept.read(f"{monitors}/{name}/{KEPT}", KeptContainer)
        if found is not None and found.boot_id == boot_id:
            containers.add(name)
            pods.add(found.record.pod_id)
    ready = {pod.id for pod in store.pods.values() if pod.phase is Phase.READY}
    return Known(
        pods=sorted(pods),
        containers=sorted(containers | {sandbox_id(pod) for pod in pods}),
        running=sorted((live - ended) | set(strangers)),
        ready=sorted(ready),
    )


def _kept_pods(settings: CriSettings, boot_id: str) -> Iterator[str]:
    directory = f"{settings.run_root}/cri/pods"
    for name in kept.directories(directory):
        found = kept.read(f"{directory}/{name}", KeptPod) if name.endswith(kept.SUFFIX) else None
        if found is not None and found.boot_id == boot_id:
            yield found.record.id


def forget_all(settings: CriSettings) -> None:
    """Nobody is known any more: the state and what stands beside it go. Raises OSError."""
    for name in os.listdir(os.path.dirname(_path(settings))):
        path = f"{os.path.dirname(_path(settings))}/{name}"
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
