"""Runs in: the supervisor.

sd_notify(3): tells the service manager READY, STATUS, STOPPING and the watchdog's beat over the datagram
socket named in the environment. Without one, nothing is sent. A manager that is busy or gone is no error.
It also keeps descriptors for a supervisor that is killed, and gives them to the next (sd_listen_fds(3)).
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence

FIRST_STORED = 3  # SD_LISTEN_FDS_START


class Notifier:
    """The service manager's ear. Takes what it says out of the environment at start.

    `stored`: the descriptors that it has kept for us, by name; they are whose takes them out.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        # Taken out: an OCI runtime that inherits the socket would speak for us.
        self._address = environ.pop("NOTIFY_SOCKET", "")
        self.watchdog = _watchdog_seconds(environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", ""))
        names = environ.pop("LISTEN_FDNAMES", "")
        count, pid = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
        self.stored = _stored(int(count), names.split(":")) if pid == str(os.getpid()) else {}

    def send(self, **fields: str) -> None:
        """Send assignments, such as READY="1", STATUS="...". Never blocks, never fails."""
        with contextlib.suppress(OSError):
            self._send(fields, [])

    def store(self, name: str, fd: int) -> bool:
        """Have a duplicate of a descriptor kept until the service ends. Never blocks.

        Returns False if the manager could not be told now.
        """
        try:
            # FDPOLL: it is not to watch the descriptor and drop it when it thinks that it is of no use.
            self._send({"FDSTORE": "1", "FDNAME": name, "FDPOLL": "0"}, [fd])
        except OSError:
            return False
        return True

    def unstore(self, name: str) -> None:
        """Have a descriptor kept no longer. Never blocks, never fails."""
        self.send(FDSTOREREMOVE="1", FDNAME=name)

    def _send(self, fields: Mapping[str, str], fds: Sequence[int]) -> None:
        if not self._address:
            return
        # A leading @ names the abstract namespace, whose addresses begin with a zero byte.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        data = "\n".join(f"{key}={value}" for key, value in fields.items()).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.sendmsg([data], rights, 0, address)


def _stored(count: int, names: list[str]) -> dict[str, int]:
    """Descriptors that the manager has put from FIRST_STORED on; of two with one name the last."""
    found: dict[str, int] = {}
    for fd, name in zip(range(FIRST_STORED, FIRST_STORED + count), [*names, *[""] * count], strict=False):
        os.set_inheritable(fd, False)
        if name in found:
            os.close(found[name])
        found[name] = fd
    return found


def _watchdog_seconds(wanted: str, pid: str) -> float:
    """The interval within which the manager wants a beat, 0 for none."""
    if not wanted.isdigit() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(wanted) / 1e6
