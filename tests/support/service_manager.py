"""Runs in: the tests; `python -m tests.support.service_manager FD,... NAME:... COMMAND...` becomes a service.

A service manager as sd_notify(3) and sd_listen_fds(3) describe it, as far as descriptors go: it keeps those
that a service stores, until the service has them removed, and hands them to the process that is started next.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import sys
import threading
from pathlib import Path

from supervisor.notify import FIRST_STORED

_MOST_FDS = 8
_APART = 200  # numbers that the descriptors of no test reach


class ServiceManager:
    """One. `kept`: name -> descriptor. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self.kept: dict[str, int] = {}
        self._path = str(directory / "notify")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self._path)
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> ServiceManager:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._sock.close()
        for fd in self.kept.values():
            os.close(fd)

    def service(self, command: list[str]) -> tuple[list[str], dict[str, str], list[int]]:
        """Return what starts a command as the service's process: command, environment, descriptors."""
        kept = dict(self.kept)
        module = [sys.executable, "-m", "tests.support.service_manager"]
        names, fds = ":".join(kept), ",".join(map(str, kept.values()))
        return [*module, fds, names, *command], {**os.environ, "NOTIFY_SOCKET": self._path}, [*kept.values()]

    def _listen(self) -> None:
        while True:
            data, ancillary, _, _ = self._sock.recvmsg(8192, socket.CMSG_SPACE(_MOST_FDS * 4))
            if not data:
                return
            fds = array.array("i")
            for _level, _type, raw in ancillary:
                fds.frombytes(raw)
            self._note(dict(line.split("=", 1) for line in data.decode().splitlines()), fds.tolist())

    def _note(self, fields: dict[str, str], fds: list[int]) -> None:
        name = fields.get("FDNAME", "")
        if (fields.get("FDSTOREREMOVE") == "1" or fds) and name in self.kept:
            os.close(self.kept.pop(name))
        if fds:
            (self.kept[name],) = fds


def become(fds: list[int], names: str, command: list[str]) -> None:
    """Execute the command with these descriptors from FIRST_STORED on."""
    apart = [os.dup2(fd, _APART + at) for at, fd in enumerate(fds)]
    for at, fd in enumerate(apart):
        os.dup2(fd, FIRST_STORED + at)
        os.close(fd)
    for fd in set(fds) - set(range(FIRST_STORED, FIRST_STORED + len(fds))):
        with contextlib.suppress(OSError):
            os.close(fd)
    listen = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
    os.execve(command[0], command, {**os.environ, **listen})


if __name__ == "__main__":
    become([int(word) for word in sys.argv[1].split(",") if word], sys.argv[2], sys.argv[3:])
