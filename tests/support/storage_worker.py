"""Runs in: the tests, and as a program of its own (a supervisor in miniature, which forks the worker).

A storage worker with directories of its own, outside of any sandbox but the one its unpack children put on,
and the images to feed it with.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from ipc.blocking import Client
from ipc.channel import Peer
from ipc.errors import RemoteError
from ipc.log import Log
from ipc.loop import Loop
from ipc.messages import Empty, control, storage
from ipc.serve import Connection
from ipc.settings import StorageSettings
from ipc.table import Handler, table
from workers.jobs import SPARE

REPO = Path(__file__).resolve().parents[2]


class Layer:
    """A layer made by a test: its blob and what identifies it."""

    def __init__(
        self, tar: bytes, parent: str = "", compress: Callable[[bytes], bytes] = gzip.compress
    ) -> None:
        self.blob = compress(tar)
        self.parent = parent
        self.diff_id = digest(tar)
        self.digest = digest(self.blob)
        self.chain_id = digest(f"{parent} {self.diff_id}".encode()) if parent else self.diff_id

    def begin(self, **changes: Any) -> storage.LayerBegin:
        """The request that begins it."""
        request = storage.LayerBegin(
            chain_id=self.chain_id,
            parent=self.parent,
            diff_id=self.diff_id,
            blob_digest=self.digest,
            blob_size=len(self.blob),
            media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        )
        return msgspec.structs.replace(request, **changes)


def digest(data: bytes) -> str:
    """OCI digest."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    """A tar header."""
    header = tarfile.TarInfo(name)
    header.type = kind
    header.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    header.mtime = 1_700_000_000
    for field, value in fields.items():
        setattr(header, field, value)
    return header


def tar_of(members: Iterable[tuple[tarfile.TarInfo, bytes]], format_: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of headers and contents."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as archive:
        for header, content in members:
            header.size = len(content) if header.isreg() else 0
            archive.addfile(header, io.BytesIO(content))
    return file.getvalue()


def simple_tar(files: dict[str, bytes]) -> bytes:
    """An archive of regular files."""
    return tar_of((info(name), content) for name, content in files.items())


def upload(client: Client, layer: Layer, blob: bytes | None = None, **changes: Any) -> bool:
    """Begin a layer and write its blob. False if it was there already."""
    reply, fds = client.call_fds(layer.begin(**changes), timeout=20)
    if reply.present:
        return False
    with fds:
        pour(fds.take(), layer.blob if blob is None else blob)
    return True


def pour(fd: int, data: bytes) -> None:
    """Write all and close; a reader that has gone is not our business."""
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view[:65536]) :]
    except BrokenPipeError:
        pass
    finally:
        os.close(fd)


def commit(client: Client, layer: Layer) -> storage.LayerCommitted:
    """Commit a layer."""
    return client.call(storage.LayerCommit(chain_id=layer.chain_id), timeout=60)


def put_image(
    client: Client, layers: list[Layer], name: str = "docker.io/library/t:latest", tag: str = ""
) -> storage.ImageRecord:
    """Store the layers, then an image of them."""
    for layer in layers:
        if upload(client, layer):
            commit(client, layer)
    config = json.dumps({"tag": tag, "rootfs": [layer.diff_id for layer in layers]}).encode()
    image = storage.ImageRecord(
        id=digest(config), config=config, names=[name], layers=[layer.chain_id for layer in layers]
    )
    return client.call(storage.ImagePut(image=image), timeout=20).image


class Worker:
    """A storage worker in a process of its own; a context manager that leaves nothing mounted."""

    def __init__(self, **settings: Any) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="bh-storage-"))
        self.root, self.run_root = self.base / "root", self.base / "run"
        self.settings = StorageSettings(
            root=str(self.root), run_root=str(self.run_root), uids={0: "root"}, **settings
        )
        self._host: subprocess.Popen[str] | None = None
        self.pid = 0

    def start(self) -> Worker:
        """Start it, or start it again."""
        told = msgspec.json.encode(self.settings).decode()
        arguments = [sys.executable, "-m", "tests.support.storage_worker", told]
        self._host = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.PIPE, text=True)
        assert self._host.stdout is not None
        self.pid = int(self._host.stdout.readline())
        return self

    def client(self, timeout: float = 30.0) -> Client:
        """A new connection."""
        return Client(self.settings.ipc_socket("storage"), timeout=timeout)

    def kill(self) -> None:
        """SIGKILL the worker and wait until nothing of it is left."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end."""
        assert self._host is not None
        assert self._host.stdout is not None
        code = self._host.wait(20)
        self._host.stdout.close()
        self._host = None
        return code

    def dead(self) -> bool:
        """True if it has ended by itself."""
        assert self._host is not None
        try:
            self._host.wait(0.2)
        except subprocess.TimeoutExpired:
            return False
        return True

    def mounts(self) -> list[str]:
        """Mount points below its directories."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if line.split()[4].startswith(str(self.base))]

    def children(self) -> list[int]:
        """Its children that have a job."""
        pids = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in pids if _comm(pid) != SPARE]

    def staged(self) -> list[str]:
        """What stands in staging."""
        return sorted(os.listdir(self.root / "staging"))

    def layers(self) -> list[str]:
        """Committed layers' directories."""
        return sorted(os.listdir(self.root / "layers"))

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._host is not None:
            self.kill()
        for mount in reversed(self.mounts()):
            subprocess.run(["umount", "-l", mount], check=True)
        subprocess.run(["rm", "-rf", str(self.base)], check=True)


def _comm(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except FileNotFoundError:  # it ended meanwhile
        return SPARE


def eventually(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def refusal(function: Callable[[], object]) -> RemoteError:
    """The RemoteError that `function` must raise."""
    try:
        function()
    except RemoteError as error:
        return error
    raise AssertionError("it was not refused")


def in_background(function: Callable[[], object]) -> threading.Thread:
    """Run in a thread, which the caller joins."""
    thread = threading.Thread(target=function)
    thread.start()
    return thread


# -- the program: a supervisor in miniature -------------------------------------------------------------


def _main(settings: StorageSettings) -> int:
    path = Path(settings.ipc_socket("storage"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(64)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _work(settings, listener, theirs)
    theirs.close()
    return _supervise(pid, ours)


def _work(settings: StorageSettings, listener: socket.socket, own: socket.socket) -> None:
    from ipc import kernel
    from workers import boot
    from workers.storage import main as module

    status = 1
    try:
        kernel.die_with_parent(signal.SIGKILL, os.getppid())
        log = Log("storage", level=settings.log_level)
        context = boot.Context("storage", settings, log, listener=listener, control=own)
        boot.main(module, context, lambda: context.report)
        status = 0
    finally:
        os._exit(status)


def _supervise(pid: int, sock: socket.socket) -> int:
    loop = Loop()
    codes: list[int] = []

    def welcome(_call: object, _body: control.Hello) -> Empty:
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        return Empty()

    def ended(code: int) -> None:
        codes.append(code)
        loop.stop()

    Connection(loop, sock, Peer(pid, 0, 0, "worker"), table(Handler(control.Hello, welcome, {"worker"})))
    loop.watch_child(pid, ended)
    loop.run()
    return codes[0] if codes[0] >= 0 else 128 - codes[0]


if __name__ == "__main__":
    sys.exit(_main(msgspec.json.decode(sys.argv[1], type=StorageSettings)))
