"""Runs in: no process of the house; `python -m ipc.cri.generate`, when `api.proto` has changed.

Makes api_pb2.py, api_pb2.pyi and api_pb2_grpc.py with grpcio-tools, and writes api_pb2_grpc.pyi itself, since
grpcio-tools has no types for servicers and stubs. Owns those four files. A test holds them current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).resolve().parents[2]
PROTO = "ipc/cri/api.proto"
GENERATED = ("api_pb2.py", "api_pb2.pyi", "api_pb2_grpc.py", "api_pb2_grpc.pyi")

#: In a generated module: what brings protobuf in pure Python along, and what is there instead.
OUR_BUILDER = (
    ("from google.protobuf.internal import builder as _builder", "from ipc.cri import builder as _builder"),
    ("from google.protobuf import descriptor_pool as _descriptor_pool\n", ""),
    ("from google.protobuf import symbol_database as _symbol_database\n", ""),
    ("_sym_db = _symbol_database.Default()\n", ""),
    ("_descriptor_pool.Default()", "_builder.Default()"),
)

HEADER = '''"""Types of api_pb2_grpc.py; made by ipc/cri/generate.py, not by hand.

Servicers are those of grpc.aio. The Async classes exist for type checkers only: see ipc/cri/rpc.py.
"""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from ipc.cri import api_pb2
'''


def main() -> int:
    generate(ROOT)
    return 0


def generate(output: Path) -> None:
    """Write the four modules under `output`/ipc/cri. RuntimeError if the compiler refuses the proto."""
    described = _compile(output)
    text = HEADER + "".join(_service(service) for service in described.service)
    modules = (output / PROTO).parent
    (modules / "api_pb2_grpc.pyi").write_text(text)
    complete_types(modules / "api_pb2.pyi")
    use_our_builder(modules / "api_pb2.py")


def complete_types(stub: Path) -> None:
    """Give the compiler's bare `_Mapping` its parameters, without which mypy --strict refuses the file."""
    text = (
        stub.read_text().replace("_Mapping]", "_Mapping[str, _Any]]").replace("**kwargs)", "**kwargs: _Any)")
    )
    stub.write_text(
        text.replace("import ClassVar as _ClassVar,", "import Any as _Any, ClassVar as _ClassVar,")
    )


def use_our_builder(module: Path) -> None:
    """Build the classes by ipc/cri/builder.py, which takes less memory than protobuf's."""
    text = module.read_text()
    for theirs, ours in OUR_BUILDER:
        if theirs not in text:
            raise RuntimeError(f"{module} does not say {theirs.strip()!r}")
        text = text.replace(theirs, ours)
    module.write_text(text)


def _compile(output: Path) -> FileDescriptorProto:
    # a tool of developers, not of the installed program; it carries no types
    from grpc_tools import protoc  # type: ignore[import-untyped]

    descriptors = output / "ipc/cri/api.descriptors"
    arguments = [
        "protoc",
        f"-I{ROOT}",
        f"--python_out={output}",
        f"--pyi_out={output}",
        f"--grpc_python_out={output}",
        f"--descriptor_set_out={descriptors}",
        PROTO,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc refused {PROTO}")
    described = FileDescriptorSet.FromString(descriptors.read_bytes()).file[0]
    descriptors.unlink()
    return described


def _service(service: ServiceDescriptorProto) -> str:
    name = service.name
    arguments = f"servicer: {name}Servicer, server: grpc.aio.Server"
    return "\n".join(
        [
            "",
            *_class(f"{name}Stub", _stub_lines(service, "grpc.Channel", "grpc")),
            *_class(f"{name}AsyncStub", _stub_lines(service, "grpc.aio.Channel", "grpc.aio")),
            *_class(f"{name}Servicer", map(_servicer_method, service.method)),
            f"def add_{name}Servicer_to_server({arguments}) -> None: ...",
            "",
        ]
    )


def _class(name: str, lines: Iterator[str]) -> list[str]:
    return [f"class {name}:", *(f"    {line}" for line in lines), ""]


def _stub_lines(service: ServiceDescriptorProto, channel: str, module: str) -> Iterator[str]:
    yield f"def __init__(self, channel: {channel}) -> None: ..."
    for method in service.method:
        kind = "UnaryStreamMultiCallable" if method.server_streaming else "UnaryUnaryMultiCallable"
        yield f"{method.name}: {module}.{kind}[{_type(method.input_type)}, {_type(method.output_type)}]"


def _servicer_method(method: MethodDescriptorProto) -> str:
    reply = _type(method.output_type)
    # an async generator is declared without `async`: calling it gives the iterator, no coroutine
    prefix, result = ("", f"AsyncIterator[{reply}]") if method.server_streaming else ("async ", reply)
    context = "grpc.aio.ServicerContext[Any, Any]"
    arguments = f"self, request: {_type(method.input_type)}, context: {context}"
    return f"{prefix}def {method.name}({arguments}) -> {result}: ..."


def _type(full_name: str) -> str:
    return "api_pb2." + full_name.rsplit(".", 1)[1]


if __name__ == "__main__":
    sys.exit(main())
