"""Runs in: cri, nri, bulkheadctl and tests. What generated messages are built with, not protobuf's builder.

That one makes a Python object of every descriptor and loads the whole implementation in pure Python beside
the one in C: 4 MB in a process that serves 43 RPCs. Here classes come from the descriptors of the C
extension, and nothing else is made or imported. ipc/cri/generate.py puts it into the generated modules, whose
calls are these functions; the tests of the CRI's messages hold it to what protobuf's own would make.
"""

from __future__ import annotations

from typing import Any

import google._upb._message as upb  # the C extension
from google.protobuf import descriptor
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message


def Default() -> Any:
    """The pool of descriptors that protobuf itself has."""
    return upb.default_pool


def BuildMessageAndEnumDescriptors(_file: descriptor.FileDescriptor, _module: dict[str, Any]) -> None:
    """Nothing: the objects would be for protobuf in pure Python, which is refused."""


def BuildTopDescriptorsAndMessages(
    file: descriptor.FileDescriptor, name: str, module: dict[str, Any]
) -> None:
    """Put the file's enums, their values and its message classes into the module."""
    for enum_name, enum in file.enum_types_by_name.items():
        module[enum_name] = EnumTypeWrapper(enum)
        module.update((value.name, value.number) for value in enum.values)
    for title, message in file.message_types_by_name.items():
        module[title] = upb.MessageMeta(title, (Message,), {"DESCRIPTOR": message, "__module__": name})
