"""Runs in: no process of the house; `python -m ipc.nri.generate`, when one of the two protos has changed.

Makes the modules and their types with grpcio-tools; there are no services, since ttrpc is ours. A test holds
them current.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ipc.cri.generate import complete_types, use_our_builder

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ("ipc/nri/nri.proto", "ipc/nri/ttrpc.proto")
GENERATED = ("nri_pb2.py", "nri_pb2.pyi", "ttrpc_pb2.py", "ttrpc_pb2.pyi")


def main() -> int:
    generate(ROOT)
    return 0


def generate(output: Path) -> None:
    """Write the modules under `output`/ipc/nri. RuntimeError if the compiler refuses a proto."""
    # a tool of developers, not of the installed program; it carries no types
    from grpc_tools import protoc  # type: ignore[import-untyped]

    (output / "ipc/nri").mkdir(parents=True, exist_ok=True)
    arguments = ["protoc", f"-I{ROOT}", f"--python_out={output}", f"--pyi_out={output}", *PROTOS]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc refused {' or '.join(PROTOS)}")
    for name in GENERATED:
        improve = complete_types if name.endswith(".pyi") else use_our_builder
        improve(output / "ipc/nri" / name)


if __name__ == "__main__":
    sys.exit(main())
