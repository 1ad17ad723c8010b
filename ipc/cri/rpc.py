"""Runs in: bulkheadctl and tests (clients), and cri (the names of services).

Typed doors to the generated gRPC code. The generated stub classes serve blocking and asyncio channels alike,
which a type checker cannot see; these functions tell it. Owns no connection: the caller makes the channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ipc.cri import api_pb2, api_pb2_grpc

if TYPE_CHECKING:
    import grpc
    import grpc.aio

RUNTIME_SERVICE: str = api_pb2.DESCRIPTOR.services_by_name["RuntimeService"].full_name
IMAGE_SERVICE: str = api_pb2.DESCRIPTOR.services_by_name["ImageService"].full_name


def runtime_client(channel: grpc.Channel) -> api_pb2_grpc.RuntimeServiceStub:
    """The blocking client of the 37 RPCs of RuntimeService."""
    return api_pb2_grpc.RuntimeServiceStub(channel)


def image_client(channel: grpc.Channel) -> api_pb2_grpc.ImageServiceStub:
    """The blocking client of the 6 RPCs of ImageService."""
    return api_pb2_grpc.ImageServiceStub(channel)


def async_runtime_client(channel: grpc.aio.Channel) -> api_pb2_grpc.RuntimeServiceAsyncStub:
    """The asyncio client of RuntimeService."""
    stub: Any = api_pb2_grpc.RuntimeServiceStub
    return cast("api_pb2_grpc.RuntimeServiceAsyncStub", stub(channel))


def async_image_client(channel: grpc.aio.Channel) -> api_pb2_grpc.ImageServiceAsyncStub:
    """The asyncio client of ImageService."""
    stub: Any = api_pb2_grpc.ImageServiceStub
    return cast("api_pb2_grpc.ImageServiceAsyncStub", stub(channel))
