"""Runs in: cri. What exists: pods, containers and the operations that were begun on them.

Owns `<run_root>/cri/state.db` (SQLite) and its mirror in memory; lists and look-ups never touch the disk.
Every operation of several steps writes an intent before its first step and drops it with its result, so
that the next `cri` finishes or undoes it (recovery.py). The file belongs to one boot: rows of another boot id
are forgotten. It must survive the death of this process, not a power cut, so nothing is fsynced: a write
costs microseconds and may stand in the event loop. A damaged file is set aside and the state begins empty;
rebuild.py fills it from what stands beside it.
"""

from __future__ import annotations

import enum
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec
from google.protobuf.message import DecodeError

from ipc import log
from ipc.cri import api_pb2 as pb
from ipc.errors import RemoteError, not_found
from ipc.messages import Body
from ipc.messages.monitor import ExitRecord
from ipc.messages.storage import PodFiles
from workers.cri import database
from workers.cri.kept import PodFiles as KeptFiles
from workers.cri.names import ContainerName, Ids, PodName

B = TypeVar("B", bound=Body)
NOWHERE = ":memory:"


class Phase(enum.StrEnum):
    """Where a pod or a container stands. CREATING and GONE are never shown to a client."""

    CREATING = "creating"
    READY = "ready"  # pods only
    STOPPED = "stopped"  # pods only
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"
    GONE = "gone"  # its name is free; what is left of it is being removed, however often it takes


HIDDEN = frozenset({Phase.CREATING, Phase.GONE})


class PodRecord(Body):
    """The durable part of a pod. Fields may be added with a default, as in messages."""

    id: str
    created_at_ns: int
    handler: str  # as it was asked for, "" = the default
    phase: Phase = Phase.CREATING
    hostname: str = ""
    ips: list[str] = []
    namespaces: dict[str, str] = {}  # "net", "ipc", "uts", "pid" -> path of the pinned namespace
    files: PodFiles | None = None
    cni_result: bytes = b""
    init_pid: int = 0
    released: bool = False  # stopped to the end: no network, no init
    runtime: str = ""  # the runtime that the handler meant when the pod was made
    pause_image: str = ""  # of its sandbox container, "" if it has none


class ContainerRecord(Body):
    """The durable part of a container."""

    id: str
    pod_id: str
    created_at_ns: int
    phase: Phase = Phase.CREATING
    image_id: str = ""
    image_name: str = ""  # what people call the image, for status
    uid: int = 0
    gid: int = 0
    groups: list[int] = []
    pid: int = 0
    log_path: str = ""
    stop_signal: str = "SIGTERM"
    mount_images: list[str] = []  # id of the image of each mount, "" where it is no image volume
    started_at_ns: int = 0
    exit: ExitRecord | None = None
    sandbox: bool = False  # the pod's sandbox container, which no client sees
    cgroup: str = ""  # below each hierarchy's root


class KeptPod(Body):
    """A pod as it is kept beside the state; `boot_id` says of which boot."""

    boot_id: str
    record: PodRecord
    config: bytes


class KeptContainer(Body):
    """A container as its monitor keeps it, with its pod as it was when the container was made."""

    boot_id: str
    record: ContainerRecord
    config: bytes
    pod: KeptPod


class Intent(Body):
    """An operation that was begun: on what, which ("pod.run", "container.stop", ...), and its details."""

    subject: str
    kind: str
    detail: dict[str, str] = {}


@dataclass(slots=True)
class Pod:
    """A pod in memory."""

    record: PodRecord
    config: pb.PodSandboxConfig

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def phase(self) -> Phase:
        return self.record.phase

    @property
    def name(self) -> PodName:
        return pod_name(self.config)


@dataclass(slots=True)
class Container:
    """A container in memory."""

    record: ContainerRecord
    config: pb.ContainerConfig
    listed: pb.Container = field(default_factory=pb.Container)  # ready for ListContainers, but for the state

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def phase(self) -> Phase:
        return self.record.phase

    @property
    def name(self) -> ContainerName:
        return container_name(self.record.pod_id, self.config)


def pod_name(config: pb.PodSandboxConfig) -> PodName:
    """The key of a pod sandbox."""
    meta = config.metadata
    return PodName(meta.name, meta.namespace, meta.uid, meta.attempt)


def container_name(pod_id: str, config: pb.ContainerConfig) -> ContainerName:
    """The key of a container."""
    return ContainerName(pod_id, config.metadata.name, config.metadata.attempt)


class Observer(Protocol):
    """Who is told of changes."""

    def __call__(self, subject: Pod | Container, *, gone: bool) -> None: ...


class Store:
    """All pods and containers. Changing a record takes effect with `save_pod` or `save_container`.

    `wait`: the file is another worker's until `open`. After `let_go` it is; what is changed then is nobody's.
    """

    def __init__(self, path: str, boot_id: str, *, wait: bool = False) -> None:
        self.pods: dict[str, Pod] = {}
        self.containers: dict[str, Container] = {}
        self._of_pod: dict[str, dict[str, Container]] = {}
        self._pod_names: dict[PodName, str] = {}
        self._container_names: dict[ContainerName, str] = {}
        self._pod_ids = Ids("pod sandbox")
        self._container_ids = Ids("container")
        self.boot_id = boot_id
        #: Counts the changes: what was made of the state is good for as long as this stays the same.
        self.version = 0
        #: Called after every change, with the state as it is from now on; `gone` if the subject was dropped.
        self.observers: list[Observer] = []
        self.kept = KeptFiles(f"{os.path.dirname(path)}/pods")
        self._unsaved: dict[str, set[str]] = {}  # what the disk did not take -> intents that ended with it
        self._path = path
        self._db = database.connect(NOWHERE) if wait else self._open(path)

    def open(self) -> None:
        """The file is ours now. Raises what the disk has against it."""
        self._db.close()
        self._db = self._open(self._path)

    def let_go(self) -> None:
        """The file is another worker's from now on; what operations still write goes nowhere."""
        self.flush()
        self.kept.let_go()
        self._db.close()
        self._db = database.connect(NOWHERE)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # -- look-ups -------------------------------------------------------------------------------------

    def find_pod(self, text: str) -> Pod | None:
        """The pod with that id or unique prefix, None if absent. Raises RemoteError(INVALID_ARGUMENT)."""
        found = self._pod_ids.find(text)
        return self.pods[found] if found else None

    def need_pod(self, text: str) -> Pod:
        """As `find_pod`; raises RemoteError(NOT_FOUND) if absent."""
        pod = self.find_pod(text)
        if pod is None:
            raise not_found(f"no pod sandbox has the id {text[:ID_SHOWN]}")
        return pod

    def find_container(self, text: str) -> Container | None:
        """As `find_pod`, of containers."""
        found = self._container_ids.find(text)
        return self.containers[found] if found else None

    def need_container(self, text: str) -> Container:
        """As `find_container`; raises RemoteError(NOT_FOUND) if absent."""
        container = self.find_container(text)
        if container is None:
            raise not_found(f"no container has the id {text[:ID_SHOWN]}")
        return container

    def match_pods(self, prefix: str) -> list[Pod]:
        """The shown pods whose id begins so, oldest first; all for ""."""
        ids = self._pod_ids.match(prefix) if prefix else self.pods
        return [pod for pod in map(self.pods.__getitem__, ids) if pod.record.phase not in HIDDEN]

    def match_containers(self, prefix: str) -> list[Container]:
        """The shown containers whose id begins so."""
        ids = self._container_ids.match(prefix) if prefix else self.containers
        found = map(self.containers.__getitem__, ids)
        return [one for one in found if one.record.phase not in HIDDEN and not one.record.sandbox]

    def pod_named(self, name: PodName) -> Pod | None:
        """The pod that owns the name now."""
        id_ = self._pod_names.get(name)
        return self.pods[id_] if id_ else None

    def container_named(self, name: ContainerName) -> Container | None:
        """The container that owns the name now."""
        id_ = self._container_names.get(name)
        return self.containers[id_] if id_ else None

    def containers_of(self, pod_id: str) -> list[Container]:
        """All containers of a pod, hidden ones and its sandbox container too."""
        return list(self._of_pod.get(pod_id, {}).values())

    # -- changes --------------------------------------------------------------------------------------

    def add_pod(self, record: PodRecord, config: pb.PodSandboxConfig) -> Pod:
        """A pod begins to be: its row and its intent are written together, its name is taken."""
        kept = self.keep_pod(Pod(record, config))
        try:
            with self._transaction():
                row = (record.id, msgspec.msgpack.encode(record), kept.config)
                self._db.execute("INSERT INTO pods VALUES (?, ?, ?)", row)
                self.begin(record.id, "pod.run")
                self.kept.write(record.id, kept)
        except RemoteError:
            self._unkeep(record.id)
            raise
        pod = self._show_pod(record, config)
        self._changed(pod)
        return pod

    def _unkeep(self, pod_id: str) -> None:
        with suppress(OSError):
            self.kept.remove(pod_id)

    def add_container(self, record: ContainerRecord, config: pb.ContainerConfig) -> Container:
        """A container begins to be: its row and its intent are written together, its name is taken."""
        row = (record.id, msgspec.msgpack.encode(record), config.SerializeToString())
        with self._transaction():
            self._db.execute("INSERT INTO containers VALUES (?, ?, ?, NULL)", row)
            self.begin(record.id, "container.create")
        container = self._show_container(record, config)
        self._changed(container)
        return container

    def save_pod(self, pod: Pod, *, done: str = "") -> None:
        """Write a pod's record; `done` is the intent that ends with it. A pod that was removed stays so."""
        if pod.id not in self.pods:
            return
        if pod.phase is Phase.GONE:
            self._free_pod_name(pod)
        self._save(pod.id, done)
        self._changed(pod)

    def save_container(self, container: Container, *, done: str = "") -> None:
        """Write a container's record; `done` is the intent that ends with it."""
        if container.id not in self.containers:
            return
        if container.phase is Phase.GONE:
            self._free_container_name(container)
        self._save(container.id, done)
        self._changed(container, gone=container.phase is Phase.GONE)

    def flush(self) -> None:
        """Write what the disk did not take when it was due. What it takes no better now stays due."""
        for subject in list(self._unsaved):
            self._save(subject, "")

    def _save(self, subject: str, done: str) -> None:
        """Write a record, or have it written later: what has come to pass has, whether the disk is full or
        not, and the file is read by the next cri only."""
        ended = self._unsaved.pop(subject, set()) | ({done} if done else set())
        try:
            with database.writing():
                self._write_record(subject, ended)
        except RemoteError as error:
            log.get().error("a record is not written; tried again", id=subject, why=error.text)
            self._unsaved[subject] = ended

    def _write_record(self, subject: str, ended: set[str]) -> None:
        pod, container = self.pods.get(subject), self.containers.get(subject)
        with self._transaction():
            if pod is not None:
                row = (msgspec.msgpack.encode(pod.record), subject)
                self._db.execute("UPDATE pods SET record = ? WHERE id = ?", row)
            elif container is not None:
                row = (msgspec.msgpack.encode(container.record), subject)
                self._db.execute("UPDATE containers SET record = ? WHERE id = ?", row)
            for kind in ended:
                self._end(subject, kind)
        if pod is not None:
            self.kept.write(subject, self.keep_pod(pod))

    def drop_pod(self, pod: Pod) -> None:
        """Nothing is left of the pod: forget it and its intents. Absent is success."""
        with database.writing():
            self.kept.remove(pod.id)  # first: what stands there without a row is taken for a lost pod
        with self._transaction():
            self._db.execute("DELETE FROM pods WHERE id = ?", (pod.id,))
            self._db.execute("DELETE FROM intents WHERE subject = ?", (pod.id,))
        self._unsaved.pop(pod.id, None)
        self._free_pod_name(pod)
        self._pod_ids.discard(pod.id)
        if self.pods.pop(pod.id, None) is not None:
            self._changed(pod, gone=True)
        self._of_pod.pop(pod.id, None)

    def drop_container(self, container: Container) -> None:
        """Nothing is left of the container: forget it and its intents. Absent is success."""
        with self._transaction():
            self._db.execute("DELETE FROM containers WHERE id = ?", (container.id,))
            self._db.execute("DELETE FROM intents WHERE subject = ?", (container.id,))
        self._unsaved.pop(container.id, None)
        self._free_container_name(container)
        self._container_ids.discard(container.id)
        self._of_pod.get(container.record.pod_id, {}).pop(container.id, None)
        if self.containers.pop(container.id, None) is not None:
            self._changed(container, gone=True)

    def save_pod_update(self, pod: Pod, config: pb.PodSandboxConfig) -> None:
        """A pod's resources were told anew."""
        row = (config.SerializeToString(), pod.id)
        with self._transaction():
            self._db.execute("UPDATE pods SET config = ? WHERE id = ?", row)
            pod.config = config
            self.kept.write(pod.id, self.keep_pod(pod))
        self._changed(pod)

    def keep_pod(self, pod: Pod) -> KeptPod:
        """A pod in the form that is kept beside the state."""
        return KeptPod(boot_id=self.boot_id, record=pod.record, config=pod.config.SerializeToString())

    def keep_container(
        self, pod: Pod, container: Container, config: pb.ContainerConfig | None = None
    ) -> bytes:
        """What a container's monitor keeps of it; `config` if it is to be another one."""
        return msgspec.json.encode(
            KeptContainer(
                boot_id=self.boot_id,
                record=container.record,
                config=(config or container.config).SerializeToString(),
                pod=self.keep_pod(pod),
            )
        )

    def take_pod(self, kept: KeptPod, *, intent: str = "") -> Pod:
        """A pod that was lost is known again; `intent` is the operation to finish on it."""
        record = kept.record
        with self._transaction():
            row = (record.id, msgspec.msgpack.encode(record), kept.config)
            self._db.execute("INSERT INTO pods VALUES (?, ?, ?)", row)
            self._begin_if(record.id, intent)
        pod = self._show_pod(record, pb.PodSandboxConfig.FromString(kept.config))
        self.kept.write(pod.id, kept)
        self._changed(pod)
        return pod

    def take_container(self, kept: KeptContainer, spec: bytes | None, *, intent: str = "") -> Container:
        """A container that was lost is known again."""
        record = kept.record
        with self._transaction():
            row = (record.id, msgspec.msgpack.encode(record), kept.config, spec)
            self._db.execute("INSERT INTO containers VALUES (?, ?, ?, ?)", row)
            self._begin_if(record.id, intent)
        container = self._show_container(record, pb.ContainerConfig.FromString(kept.config))
        self._changed(container)
        return container

    def _begin_if(self, subject: str, intent: str) -> None:
        if intent:
            self.begin(subject, intent)

    def begin(self, subject: str, kind: str, detail: dict[str, str] | None = None) -> None:
        """Write an intent; begun again, the newer detail counts."""
        row = (subject, kind, msgspec.json.encode(detail or {}).decode(), time.time_ns())
        with database.writing():
            self._db.execute("INSERT OR REPLACE INTO intents VALUES (?, ?, ?, ?)", row)

    def begin_ending(self, subject: str, kind: str, detail: dict[str, str] | None = None) -> None:
        """As `begin`, of what gives room back: a full disk must not keep it from that.

        Without its intent the next cri does not finish it by itself, but for whoever asks again.
        """
        try:
            self.begin(subject, kind, detail)
        except RemoteError as error:
            log.get().warning("an intent is not written", id=subject, intent=kind, why=error.text)

    def end(self, subject: str, kind: str) -> None:
        """Drop an intent."""
        self._save(subject, kind)

    def intents(self) -> list[Intent]:
        """Every intent that has not ended, oldest first."""
        rows = self._db.execute("SELECT subject, kind, detail FROM intents ORDER BY at_ns").fetchall()
        return [Intent(subject=s, kind=k, detail=msgspec.json.decode(d)) for s, k, d in rows]

    def has_intent(self, subject: str, kind: str) -> bool:
        """Whether that operation was begun and has not ended."""
        row = self._db.execute("SELECT 1 FROM intents WHERE subject = ? AND kind = ?", (subject, kind))
        return row.fetchone() is not None

    def save_spec(self, container_id: str, spec: bytes) -> None:
        """Keep the OCI spec a container was made with: exec and verbose status read it."""
        with database.writing():
            self._db.execute("UPDATE containers SET spec = ? WHERE id = ?", (spec, container_id))

    def save_update(self, container: Container, config: pb.ContainerConfig, spec: bytes) -> None:
        """A container's limits were changed: what it was asked to be and its OCI spec, together."""
        row = (config.SerializeToString(), spec, container.id)
        with database.writing():
            self._db.execute("UPDATE containers SET config = ?, spec = ? WHERE id = ?", row)
        container.config = config
        self._changed(container)

    def spec(self, container_id: str) -> bytes:
        """The OCI spec of a container. Raises RemoteError(NOT_FOUND) before there is one."""
        row = self._db.execute("SELECT spec FROM containers WHERE id = ?", (container_id,)).fetchone()
        if row is None or row[0] is None:
            raise not_found(f"container {container_id} has no OCI spec yet")
        return bytes(row[0])

    def damage(self) -> str:
        """What is wrong with the file, "" for nothing."""
        return database.integrity(self._db)

    @staticmethod
    def trouble(path: str) -> str:
        """Why the next cri would set a file aside, "" if it would not."""
        try:
            with closing(database.connect(path)) as db:
                _rows(db)
                return database.integrity(db)
        except (database.Damaged, sqlite3.Error) as error:
            return str(error)

    # -- inside ---------------------------------------------------------------------------------------

    def _changed(self, subject: Pod | Container, *, gone: bool = False) -> None:
        self.version += 1
        for observer in self.observers:
            observer(subject, gone=gone)

    def _open(self, path: str) -> sqlite3.Connection:
        """Open the file and take its rows in; a damaged one makes room for an empty one."""
        try:
            return self._read(path)
        except database.Damaged as error:
            aside = database.set_aside(path)
            log.get().error("the state is damaged and set aside", file=aside, why=error)
        return self._read(path)

    def _read(self, path: str) -> sqlite3.Connection:
        db = database.connect(path)
        try:
            self._of_this_boot(db)
            pods, containers = _rows(db)
        except sqlite3.Error as error:
            db.close()
            raise database.damage(error) from error
        except database.Damaged:
            db.close()
            raise
        for pod, sandbox_config in pods:
            self._show_pod(pod, sandbox_config)
        for container, config in containers:
            self._show_container(container, config)
        return db

    def _of_this_boot(self, db: sqlite3.Connection) -> None:
        """Forget what another boot left, in the file and beside it."""
        row = db.execute("SELECT value FROM meta WHERE key = 'boot_id'").fetchone()
        if row is not None and row[0] != self.boot_id:
            log.get().info("the machine was booted anew, old pods and containers are forgotten")
            db.executescript("DELETE FROM pods; DELETE FROM containers; DELETE FROM intents;")
            for pod_id in self.kept.ids():
                self.kept.remove(pod_id)
        pairs = [("schema", str(database.SCHEMA)), ("boot_id", self.boot_id)]
        db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", pairs)

    def _show_pod(self, record: PodRecord, config: pb.PodSandboxConfig) -> Pod:
        pod = self.pods[record.id] = Pod(record, config)
        self._pod_ids.add(record.id)
        if record.phase is not Phase.GONE:
            self._pod_names[pod.name] = record.id
        return pod

    def _show_container(self, record: ContainerRecord, config: pb.ContainerConfig) -> Container:
        container = self.containers[record.id] = Container(record, config)
        self._of_pod.setdefault(record.pod_id, {})[record.id] = container
        if record.sandbox:  # clients find it by no id and no name
            return container
        self._container_ids.add(record.id)
        if record.phase is not Phase.GONE:
            self._container_names[container.name] = record.id
        return container

    def _free_pod_name(self, pod: Pod) -> None:
        if self._pod_names.get(pod.name) == pod.id:
            del self._pod_names[pod.name]

    def _free_container_name(self, container: Container) -> None:
        if self._container_names.get(container.name) == container.id:
            del self._container_names[container.name]

    def _end(self, subject: str, kind: str) -> None:
        if kind:
            self._db.execute("DELETE FROM intents WHERE subject = ? AND kind = ?", (subject, kind))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. Raises RemoteError for what the disk refuses."""
        with database.writing():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite may have rolled back by itself
                    self._db.execute("ROLLBACK")
                raise


Rows = tuple[list[tuple[PodRecord, pb.PodSandboxConfig]], list[tuple[ContainerRecord, pb.ContainerConfig]]]


def _rows(db: sqlite3.Connection) -> Rows:
    """All rows, decoded. Raises database.Damaged, sqlite3.Error."""
    pods = db.execute("SELECT record, config FROM pods ORDER BY rowid").fetchall()
    containers = db.execute("SELECT record, config FROM containers ORDER BY rowid").fetchall()
    try:
        return (
            [(_decode(r, PodRecord), pb.PodSandboxConfig.FromString(c)) for r, c in pods],
            [(_decode(r, ContainerRecord), pb.ContainerConfig.FromString(c)) for r, c in containers],
        )
    except (msgspec.DecodeError, DecodeError, TypeError) as error:
        raise database.Damaged(f"a row cannot be read: {error}") from error


def _decode(data: bytes, kind: type[B]) -> B:
    return msgspec.msgpack.decode(data, type=kind)


#: How much of a wrong id an error repeats.
ID_SHOWN = 80
