"""Runs in: bulkheadctl.

The two ways in: gRPC on the CRI socket, house messages on the supervisor's socket. Errors of both become
one sentence with an exit code.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import grpc

from ipc.blocking import Client
from ipc.cri import api_pb2_grpc, rpc
from ipc.errors import Code, RemoteError
from ipc.messages import Body, Request

MAX_MESSAGE = 256 * 1024 * 1024
REFUSED, UNREACHABLE = 1, 3
#: How gRPC's own UNAVAILABLE begins; a runtime says it too, of a registry that does not answer.
_NOT_CONNECTED, _DISCONNECTED = "failed to connect", ("Socket closed", "recvmsg:", "Broken pipe")
T = TypeVar("T")
R = TypeVar("R", bound=Body)


class CtlError(Exception):
    """What the user reads, and the exit code."""

    def __init__(self, text: str, exit_code: int = REFUSED) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Connection:
    """Both sockets, opened when first needed."""

    def __init__(self, socket: str, run_root: str, timeout: float) -> None:
        self.timeout = timeout
        self.socket = socket.removeprefix("unix://")
        self.run_root = run_root
        self._channel: grpc.Channel | None = None
        self._supervisor: Client | None = None

    @property
    def channel(self) -> grpc.Channel:
        """The gRPC channel of the CRI socket."""
        if self._channel is None:
            options = [
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.enable_http_proxy", 0),
                ("grpc.default_authority", "localhost"),
            ]
            self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=options)
        return self._channel

    @property
    def runtime(self) -> api_pb2_grpc.RuntimeServiceStub:
        return rpc.runtime_client(self.channel)

    @property
    def images(self) -> api_pb2_grpc.ImageServiceStub:
        return rpc.image_client(self.channel)

    def call(self, method: Callable[..., T], request: Any, *, timeout: float | None = None) -> T:
        """Call one RPC. Raises CtlError with the runtime's own sentence."""
        try:
            return method(request, timeout=self.timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise rpc_error(error, self.socket) from error

    def ask(self, request: Request[R]) -> R:
        """Ask the supervisor. Raises CtlError."""
        if self._supervisor is None:
            self._supervisor = Client(f"{self.run_root}/ipc/supervisor.sock", timeout=self.timeout)
        try:
            return self._supervisor.call(request)
        except RemoteError as error:
            code = UNREACHABLE if error.code is Code.UNAVAILABLE else REFUSED
            raise CtlError(error.text, code) from error

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._supervisor is not None:
            self._supervisor.close()


def rpc_error(error: grpc.RpcError, socket: str) -> CtlError:
    """Return the sentence for a failed RPC."""
    assert isinstance(error, grpc.Call)
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and details.startswith(_NOT_CONNECTED):
        return CtlError(f"no runtime answers at {socket}: {details.rpartition('error: ')[2]}", UNREACHABLE)
    if code is grpc.StatusCode.UNAVAILABLE and details.startswith(_DISCONNECTED):
        return CtlError(f"the runtime at {socket} went away before it answered", UNREACHABLE)
    return CtlError(f"{details} ({code.name})")
