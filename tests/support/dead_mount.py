"""Runs in: the tests. A mounted file system whose server takes every request and answers none.

FUSE, spoken by hand: INIT is answered, for the mount has to come to be, and then nothing. Who asks for a file
waits in the kernel and does not end of SIGKILL, as with a dead NFS server, until the server is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
from pathlib import Path
from types import TracebackType

from ipc import kernel

_IN, _OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_INIT, _LARGEST = 26, 1 << 20


class DeadMount:
    """A context: mounted with it, and whoever hangs is released at its end, or by `revive`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked = threading.Event()  # somebody waits for an answer
        self._stop = threading.Event()
        self._fd = -1
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> DeadMount:
        self.directory.mkdir(exist_ok=True)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        options = f"fd={self._fd},rootmode=40755,user_id=0,group_id=0,allow_other"
        kernel.mount("dead", str(self.directory), "fuse", kernel.MS_NODEV | kernel.MS_NOSUID, options)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.revive()
        with contextlib.suppress(OSError):
            kernel.umount(str(self.directory), kernel.MNT_DETACH)

    def revive(self) -> None:
        """The server goes: the kernel answers everybody with an error."""
        self._stop.set()
        self._thread.join()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _serve(self) -> None:
        while not self._stop.is_set():
            if select.select([self._fd], [], [], 0.05)[0]:
                with contextlib.suppress(BlockingIOError):
                    self._take(os.read(self._fd, _LARGEST))

    def _take(self, request: bytes) -> None:
        _length, opcode, unique, *_ = _IN.unpack_from(request)
        if opcode != _INIT:
            self.asked.set()
            return
        body = _INIT_OUT.pack(7, 31, 65536, 0, 8, 8, 65536, 1, 16, 0, 0)
        os.write(self._fd, _OUT.pack(_OUT.size + len(body), 0, unique) + body)
