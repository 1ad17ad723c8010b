"""Runs in: cri, bulkheadctl and tests. What `api_pb2.py` is built with, in place of protobuf's own builder.

That one makes a Python object of every descriptor and loads the whole implementation in pure Python beside
the one in C: 3 MB in a process that serves 43 RPCs. Here classes come from the descriptors, and nothing else
is made. ipc/cri/generate.py puts it into the generated module, whose calls are these two functions.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor, message_factory
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper


def BuildMessageAndEnumDescriptors(_file: descriptor.FileDescriptor, _module: dict[str, Any]) -> None:
    """Nothing: the objects would be for protobuf in pure Python, which is refused."""
    if not descriptor._USE_C_DESCRIPTORS:
        raise ImportError("protobuf without its C extension is not supported")


def BuildTopDescriptorsAndMessages(
    file: descriptor.FileDescriptor, _name: str, module: dict[str, Any]
) -> None:
    """Put the file's enums, their values and its message classes into the module."""
    for name, enum in file.enum_types_by_name.items():
        module[name] = EnumTypeWrapper(enum)
        module.update((value.name, value.number) for value in enum.values)
    for name, message in file.message_types_by_name.items():
        module[name] = message_factory.GetMessageClass(message)
