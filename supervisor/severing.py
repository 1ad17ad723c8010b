"""Runs in: the supervisor.

The connections of a process that hangs in the kernel. SIGKILL has been sent, so it executes no more
instruction of its own, but its descriptors stay open until the kernel lets go of it, and whoever asked it
something would wait for as long. The sockets are taken hold of from here and shut down: their other ends see
the end that a death brings at once.
"""

from __future__ import annotations

import contextlib
import os
import socket

from ipc import kernel

_CONNECTED = {socket.SOCK_STREAM, socket.SOCK_SEQPACKET}


def sever(pid: int) -> int:
    """Shut every connection of a process; return how many there were.

    Sockets that listen are left alone: its successor listens at the same. Raises OSError if the process has
    ended or may not be looked into.
    """
    severed = 0
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # another thread, which does end, had closed it
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    severed += _shut(kernel.pidfd_getfd(pidfd, int(name)))
    finally:
        os.close(pidfd)
    return severed


def _shut(fd: int) -> bool:
    """Shut a connection, whoever else has it; close our duplicate. False if it is none."""
    with socket.socket(fileno=fd) as sock:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens or sock.type & 0xF not in _CONNECTED:
            return False
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is not connected any more
            return False
    return True
