"""Runs in: the supervisor.

sd_notify(3): tells the service manager READY, STATUS, STOPPING and the watchdog's beat over the datagram
socket named in the environment. Without one, nothing is sent. A manager that is busy or gone is no error.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping


class Notifier:
    """The service manager's ear. Takes NOTIFY_SOCKET and WATCHDOG_USEC out of the environment at start."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        # Taken out: an OCI runtime that inherits the socket would speak for us.
        self._address = environ.pop("NOTIFY_SOCKET", "")
        self.watchdog = _watchdog_seconds(environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", ""))

    def send(self, **fields: str) -> None:
        """Send assignments, such as READY="1", STATUS="...". Never blocks, never fails."""
        if not self._address:
            return
        # A leading @ names the abstract namespace, whose addresses begin with a zero byte.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        data = "\n".join(f"{key}={value}" for key, value in fields.items()).encode()
        with (
            contextlib.suppress(OSError),
            socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sock,
        ):
            sock.sendto(data, address)


def _watchdog_seconds(wanted: str, pid: str) -> float:
    """The interval within which the manager wants a beat, 0 for none."""
    if not wanted.isdigit() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(wanted) / 1e6
