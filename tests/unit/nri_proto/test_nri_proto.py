"""The protos of the node resource interface are what plugins speak, and the modules are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from ipc.nri import generate, nri_pb2, ttrpc_pb2
from workers.nri import interface

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "nri-v1alpha1.json").read_text())
FILE = nri_pb2.DESCRIPTOR
SCALARS = {value: name[5:].lower() for name, value in vars(FieldDescriptor).items() if name[:5] == "TYPE_"}


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


def test_messages_and_enums_are_those_of_the_table() -> None:
    assert FILE.package == TABLE["package"]
    assert set(FILE.message_types_by_name) == set(TABLE["messages"])
    enums = {e.name: {v.name: v.number for v in e.values} for e in FILE.enum_types_by_name.values()}
    assert enums == TABLE["enums"]


@pytest.mark.parametrize("name", sorted(TABLE["messages"]))
def test_fields_have_the_numbers_and_types_of_the_table(name: str) -> None:
    assert fields_of(FILE.message_types_by_name[name]) == TABLE["messages"][name]


def test_every_call_of_the_interface_has_the_types_of_the_table() -> None:
    """Replies that say nothing are one type here: an empty message is empty on the wire."""
    calls = {
        method: [call.request.DESCRIPTOR.name, call.reply.DESCRIPTOR.name]
        for method, call in interface.PLUGIN_CALLS.items()
    }
    assert calls == TABLE["services"]["Plugin"]
    served = {
        method: [call.request.DESCRIPTOR.name, call.reply.DESCRIPTOR.name]
        for method, call in interface.RUNTIME_CALLS.items()
    }
    assert served == TABLE["services"]["Runtime"]
    assert f"{FILE.package}.Plugin" == interface.PLUGIN
    assert f"{FILE.package}.Runtime" == interface.RUNTIME


def test_the_messages_of_ttrpc_have_its_numbers() -> None:
    fields = ttrpc_pb2.DESCRIPTOR.message_types_by_name
    assert fields_of(fields["Request"]) == {
        "service": [1, "string"],
        "method": [2, "string"],
        "payload": [3, "bytes"],
        "timeout_nano": [4, "int64"],
        "metadata": [5, "repeated KeyValue"],
    }
    assert fields_of(fields["Response"]) == {"status": [1, "Status"], "payload": [2, "bytes"]}
    assert fields_of(fields["Status"]) == {"code": [1, "int32"], "message": [2, "string"]}


def test_generated_modules_are_current(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    checked_in = Path(generate.__file__).parent
    for name in generate.GENERATED:
        made = (tmp_path / "ipc/nri" / name).read_text()
        assert made == (checked_in / name).read_text(), f"{name}: run python -m ipc.nri.generate"
