"""Runs in: cri, after another one has taken over.

Passes on RPCs to the successor: those that come on connections which clients still have with this worker, and
those that it had begun and whose end is the successor's to see, since the state is there. The successor knows
everything that was begun and joins whoever asks for it. Owns one gRPC connection, made anew when need be: it
goes to the newest cri, by the name that the supervisor gives its socket.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio


class Relay:
    """The successor at `path`, as messages in bytes."""

    def __init__(self, path: str, max_message_bytes: int) -> None:
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        self._channel = grpc.aio.insecure_channel(f"unix:{path}", options=options)

    async def unary(self, method: str, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        """Pass one RPC on; the client gets the successor's answer, or its refusal."""
        call: Any = self._channel.unary_unary(method)
        try:
            answer: bytes = await call(request, timeout=context.time_remaining(), wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
        return answer

    async def stream(
        self, method: str, request: bytes, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        """Pass a stream on."""
        call: Any = self._channel.unary_stream(method)
        try:
            async for message in call(request, timeout=context.time_remaining(), wait_for_ready=True):
                yield message
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")

    async def close(self) -> None:
        """End the connection."""
        await self._channel.close()
