"""The CRI proto is what kubelets speak, and the generated modules are made of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from ipc.cri import api_pb2, api_pb2_grpc, generate, rpc

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "cri-v1.json").read_text())
FILE = api_pb2.DESCRIPTOR

SCALARS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_DOUBLE: "double",
}


def type_of(field: FieldDescriptor) -> str:
    """The type as the table spells it."""
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        key, value = message.fields_by_name["key"], message.fields_by_name["value"]
        return f"map<{type_of(key)},{type_of(value)}>"
    named = message or field.enum_type
    base = named.name if named is not None else SCALARS[field.type]
    return f"repeated {base}" if field.is_repeated else base


def fields_of(message: Descriptor) -> dict[str, list[object]]:
    return {field.name: [field.number, type_of(field)] for field in message.fields}


def enums_in_file() -> dict[str, dict[str, int]]:
    nested = [enum for message in FILE.message_types_by_name.values() for enum in message.enum_types]
    enums = [*FILE.enum_types_by_name.values(), *nested]
    package = len(FILE.package) + 1
    return {enum.full_name[package:]: {v.name: v.number for v in enum.values} for enum in enums}


def test_package_and_syntax_are_those_of_the_table() -> None:
    assert FILE.package == TABLE["package"] == "runtime.v1"
    assert TABLE["syntax"] == "proto3"
    assert not any(field.has_presence for field in FILE.message_types_by_name["VersionRequest"].fields)


def test_messages_need_nothing_of_protobuf_in_pure_python() -> None:
    """It would be some megabytes in cri (ipc/cri/builder.py)."""
    code = "import sys, ipc.cri.api_pb2, ipc.nri.nri_pb2; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"google.protobuf.internal.python_message", "google.protobuf.text_format"} & {*loaded.split()}


def test_messages_are_those_of_the_table() -> None:
    assert set(FILE.message_types_by_name) == set(TABLE["messages"])


@pytest.mark.parametrize("name", sorted(TABLE["messages"]))
def test_fields_have_the_numbers_and_types_of_the_table(name: str) -> None:
    assert fields_of(FILE.message_types_by_name[name]) == TABLE["messages"][name]


def test_enums_have_the_values_of_the_table() -> None:
    assert enums_in_file() == TABLE["enums"]


def test_all_43_rpcs_have_the_types_of_the_table() -> None:
    found = {
        service.name: {
            method.name: [
                method.input_type.name,
                ("stream " if method.server_streaming else "") + method.output_type.name,
            ]
            for method in service.methods
        }
        for service in FILE.services_by_name.values()
    }
    assert found == TABLE["services"]
    assert sum(len(methods) for methods in found.values()) == 43


def test_no_rpc_streams_requests() -> None:
    services = FILE.services_by_name.values()
    assert not [m.full_name for s in services for m in s.methods if m.client_streaming]


def test_service_names_are_those_of_the_grpc_paths() -> None:
    assert rpc.RUNTIME_SERVICE == "runtime.v1.RuntimeService"
    assert rpc.IMAGE_SERVICE == "runtime.v1.ImageService"


def test_generated_modules_are_current(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    checked_in = Path(generate.__file__).parent
    for name in generate.GENERATED:
        made = (tmp_path / "ipc/cri" / name).read_text()
        assert made == (checked_in / name).read_text(), f"{name}: run python -m ipc.cri.generate"
    assert {path.name for path in (tmp_path / "ipc/cri").iterdir()} == set(generate.GENERATED)


def test_unknown_fields_of_a_newer_kubelet_do_no_harm() -> None:
    newer = api_pb2.VersionRequest(version="v1").SerializeToString() + b"\xf2\x3f\x03abc"
    assert api_pb2.VersionRequest.FromString(newer).version == "v1"


def test_environment_values_need_not_be_utf8() -> None:
    pair = api_pb2.KeyValue(key="LC", value=b"\xff\xfe")
    assert api_pb2.KeyValue.FromString(pair.SerializeToString()).value == b"\xff\xfe"


class Runtime(api_pb2_grpc.RuntimeServiceServicer):
    async def Version(
        self,
        request: api_pb2.VersionRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> api_pb2.VersionResponse:
        return api_pb2.VersionResponse(version=request.version, runtime_name="bulkhead")


def test_typed_clients_reach_a_servicer_and_the_rest_is_unimplemented(tmp_path: Path) -> None:
    async def talk() -> None:
        server = grpc.aio.server()
        api_pb2_grpc.add_RuntimeServiceServicer_to_server(Runtime(), server)
        address = f"unix:{tmp_path}/cri.sock"
        server.add_insecure_port(address)
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            client = rpc.async_runtime_client(channel)
            reply = await client.Version(api_pb2.VersionRequest(version="v1"), timeout=10)
            assert (reply.version, reply.runtime_name) == ("v1", "bulkhead")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client.Status(api_pb2.StatusRequest(), timeout=10)
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        await server.stop(None)

    asyncio.run(talk())


def test_client_calls_the_paths_of_the_table(tmp_path: Path) -> None:
    seen: list[str] = []

    class Recorder(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
            seen.append(handler_call_details.method)

    async def talk() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([Recorder()])
        server.add_insecure_port(f"unix:{tmp_path}/cri.sock")
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/cri.sock") as channel:
            for call in (
                rpc.async_image_client(channel).ImageFsInfo(api_pb2.ImageFsInfoRequest(), timeout=10),
                rpc.async_runtime_client(channel).Status(api_pb2.StatusRequest(), timeout=10),
            ):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call
        await server.stop(None)

    asyncio.run(talk())
    assert sorted(seen) == ["/runtime.v1.ImageService/ImageFsInfo", "/runtime.v1.RuntimeService/Status"]
