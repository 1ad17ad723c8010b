"""Runs in: every process.

The one error class that crosses process borders: a machine-readable code and a text for people.
One table maps codes to gRPC statuses; whoever answers a kubelet uses it and nothing else.

A RemoteError says that the peer, or what the peer was asked for, is at fault: it is answered and life
goes on. Any other exception in a handler is a bug of ours: it is logged with its stack and ends the worker.
"""

from __future__ import annotations

import enum


class Code(enum.StrEnum):
    """Why a request failed. The values are on the wire: never change one."""

    NOT_FOUND = "not_found"
    INVALID_ARGUMENT = "invalid_argument"
    FAILED_PRECONDITION = "failed_precondition"
    ALREADY_EXISTS = "already_exists"
    RESOURCE_EXHAUSTED = "resource_exhausted"  # also: the receiver's queue is full ("busy")
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    UNAVAILABLE = "unavailable"  # the peer died or cannot be reached: try again
    UNAUTHENTICATED = "unauthenticated"  # credentials of a registry
    PERMISSION_DENIED = "permission_denied"  # this caller may not send this message
    UNIMPLEMENTED = "unimplemented"
    DATA_LOSS = "data_loss"  # a digest or a length did not match
    INTERNAL = "internal"
    MOVED = "moved"  # not begun: the receiver is being replaced, a new connection leads to its successor


#: Code -> number of the gRPC status (google.rpc.Code); numbers, so that no gRPC import is needed here.
GRPC_STATUS: dict[Code, int] = {
    Code.CANCELLED: 1,
    Code.INVALID_ARGUMENT: 3,
    Code.DEADLINE_EXCEEDED: 4,
    Code.NOT_FOUND: 5,
    Code.ALREADY_EXISTS: 6,
    Code.PERMISSION_DENIED: 7,
    Code.RESOURCE_EXHAUSTED: 8,
    Code.FAILED_PRECONDITION: 9,
    Code.UNIMPLEMENTED: 12,
    Code.INTERNAL: 13,
    Code.UNAVAILABLE: 14,
    Code.MOVED: 14,
    Code.DATA_LOSS: 15,
    Code.UNAUTHENTICATED: 16,
}


class RemoteError(Exception):
    """A failure that its process answers to a peer, or that a peer answered to us.

    `code` is machine-readable; `text` is a sentence for the operator, with the cause in it.
    `reason` is an optional word that kubelets recognise (`RegistryUnavailable`, `RROUnsupported`, ...);
    it becomes the prefix of the gRPC message.
    """

    def __init__(self, code: Code, text: str, *, reason: str = "") -> None:
        super().__init__(f"{code.value}: {text}")
        self.code = code
        self.text = text
        self.reason = reason

    @property
    def message(self) -> str:
        """The text with the kubelet's reason word before it, if there is one."""
        return f"{self.reason}: {self.text}" if self.reason else self.text


def invalid(text: str) -> RemoteError:
    """Short for RemoteError(INVALID_ARGUMENT, text)."""
    return RemoteError(Code.INVALID_ARGUMENT, text)


def not_found(text: str) -> RemoteError:
    """Short for RemoteError(NOT_FOUND, text)."""
    return RemoteError(Code.NOT_FOUND, text)


def precondition(text: str) -> RemoteError:
    """Short for RemoteError(FAILED_PRECONDITION, text)."""
    return RemoteError(Code.FAILED_PRECONDITION, text)


def unavailable(text: str) -> RemoteError:
    """Short for RemoteError(UNAVAILABLE, text)."""
    return RemoteError(Code.UNAVAILABLE, text)


def internal(text: str) -> RemoteError:
    """Short for RemoteError(INTERNAL, text)."""
    return RemoteError(Code.INTERNAL, text)


def moved(name: str) -> RemoteError:
    """What a receiver that is being replaced answers: clients ask its successor, nobody else sees it."""
    return RemoteError(Code.MOVED, f"{name}: this worker is being replaced")
