"""Runs in: network, and in a child for each connection.

Connects to a port of a pod's loopback, for port-forward: in the pod's network namespace, or the node's own
for a pod with host network. The child enters the namespace, connects and hands the socket over; it never
comes back from there, it ends. What the kernel says (nobody listens, nobody answers) is the caller's answer.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from ipc import kernel
from ipc.errors import Code, RemoteError, invalid, not_found, precondition
from ipc.messages import Empty
from ipc.messages.network import PortConnect
from ipc.serve import Call
from workers.jobs import Jobs
from workers.network import namespaces
from workers.network.operations import Places
from workers.network.records import READY, Records, check_pod_id

CONNECT_TIMEOUT = 10.0  # seconds for each address
TIMEOUT = 2 * CONNECT_TIMEOUT + 5.0
HIGHEST_PORT = 65535
LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
#: What it means that a family is not to be had: the next one is tried, and the first refusal is told.
_NO_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENETUNREACH}


class Dialling:
    """Handler of network.port.connect."""

    def __init__(self, jobs: Jobs, places: Callable[[], Places]) -> None:
        self._jobs = jobs
        self._places = places

    def connect(self, call: Call, body: PortConnect) -> None:
        """network.port.connect"""
        if not 0 < body.port <= HIGHEST_PORT:
            raise invalid(f"{body.port} is no port")
        namespace = self._namespace(check_pod_id(body.pod_id))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def done(outcome: object) -> None:
            with ours:
                if isinstance(outcome, RemoteError):
                    call.fail(outcome)
                else:
                    call.reply(Empty(), fds=[_received(ours)])

        call.doing = f"connecting to port {body.port} of {body.pod_id}"
        theirs_fd = theirs.fileno()
        with theirs:
            try:
                job = self._jobs.start(
                    *(dial, namespace, body.port, theirs_fd), on_done=done, timeout=TIMEOUT, fds=[theirs_fd]
                )
            except OSError as error:
                ours.close()
                text = f"no process to connect to a pod: {error.strerror}"
                raise RemoteError(Code.RESOURCE_EXHAUSTED, text) from None
        call.on_abandon(job.kill)

    def _namespace(self, pod_id: str) -> str:
        """Path of the pod's network namespace, "" for the node's own."""
        record = Records(self._places().records).load(pod_id)
        if record is None:
            raise not_found(f"pod {pod_id} has no network")
        if record.state != READY:
            raise precondition(f"the network of pod {pod_id} is not ready: {record.state}")
        path = record.namespaces.get("net", "")
        if path and not namespaces.pinned(path):
            raise precondition(f"the network namespace of pod {pod_id} is gone from {path}")
        return path


def _received(sock: socket.socket) -> int:
    """The one descriptor that the child has sent before it ended."""
    _data, fds, _flags, _address = socket.recv_fds(sock, 1, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    return fds[0]


def dial(namespace: str, port: int, answer_fd: int) -> None:
    """Enter, connect and send the socket; in a child. Raises RemoteError with the first address's trouble."""
    if namespace:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        kernel.setns(fd, kernel.CLONE_NEWNET)
    with _connected(port) as sock, socket.socket(fileno=answer_fd) as answer:
        sock.setblocking(False)
        socket.send_fds(answer, [b"."], [sock.fileno()])


def _connected(port: int) -> socket.socket:
    troubles: list[RemoteError] = []
    for family, address in LOOPBACK:
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.settimeout(CONNECT_TIMEOUT)
            sock.connect((address, port))
            return sock
        except OSError as error:
            if sock is not None:
                sock.close()
            if error.errno not in _NO_FAMILY:
                troubles.append(_trouble(address, port, error))
    raise troubles[0] if troubles else RemoteError(Code.UNAVAILABLE, "the pod has no loopback")


def _trouble(address: str, port: int, error: OSError) -> RemoteError:
    where = f"connect to {address} port {port}"
    if isinstance(error, TimeoutError):
        return RemoteError(Code.DEADLINE_EXCEEDED, f"{where}: nobody answered within {CONNECT_TIMEOUT:g} s")
    return RemoteError(Code.UNAVAILABLE, f"{where}: {(error.strerror or str(error)).lower()}")
