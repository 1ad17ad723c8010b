"""Runs in: the tests.

Golden frames: the bytes of every message that processes of different releases exchange, and of every record
that one release writes and another reads. `python -m tests.support.golden` records those of this release into
tests/golden/; once a release is out its file is never changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from ipc import vault, wire
from ipc.messages import REGISTRY, Body, Request, control, cri, monitor, supervisor
from supervisor.heritage import Heritage
from workers.cri.state import KeptContainer, KeptPod
from workers.monitor.link import CHILD, TAKEN
from workers.monitor.records import StateRecord

DIRECTORY = Path(__file__).resolve().parents[1] / "golden"
#: Messages that outlive an upgrade, by the beginning of their names: old monitors and workers speak them.
OWNERS = tuple(f"{module.__name__.rpartition('.')[2]}." for module in (control, cri, monitor, supervisor))
#: Whole files, by their names: JSON.
RECORDS: Mapping[str, type[Body]] = {
    "state.json": StateRecord,
    "exit.json": monitor.ExitRecord,
    "cri.json": KeptContainer,
    "pod.json": KeptPod,
    "heritage": Heritage,
}
#: What travels through a pipe, alone.
ALONE: Mapping[str, type[Body]] = {"session end": monitor.SessionEnd}


@dataclass(frozen=True)
class Sample:
    """One frame: its bytes, how they are read today, and how what was read is written again."""

    data: bytes
    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]


def sample(kind: Any) -> Any:
    """A value of a type that differs from every default: deterministic, and deep."""
    found = inspect.type_info(kind) if not isinstance(kind, inspect.Type) else kind
    match found:
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return 7
        case inspect.FloatType():
            return 1.5
        case inspect.StrType():
            return "word"
        case inspect.BytesType():
            return b"\x00bytes\xff"
        case inspect.ListType():
            return [sample(found.item_type)]
        case inspect.DictType():
            return {sample(found.key_type): sample(found.value_type)}
        case inspect.EnumType():
            return list(found.cls)[:2][-1]
        case inspect.UnionType():
            return sample(next(one for one in found.types if not isinstance(one, inspect.NoneType)))
        case inspect.StructType():
            return found.cls(**{field.name: _field(field) for field in found.fields})
    raise TypeError(f"no sample of {found}")


def _field(field: inspect.Field) -> Any:
    value = sample(field.type)
    return not value if isinstance(value, bool) and field.default is True else value


def samples() -> dict[str, Sample]:
    """Every frame of this release, by name."""
    found = {}
    for name, request in sorted(REGISTRY.items()):
        if name.startswith(OWNERS):
            for what, kind in (("request", request), ("reply", request.REPLY)):
                found[f"{name} {what}"] = _packet(request, kind)
    found["error"] = _packet(None, wire.WireError)
    for name, kind in RECORDS.items():
        found[name] = _sampled(kind, _of_json(kind), json_of)
    for name, kind in ALONE.items():
        found[name] = _sampled(kind, _of_body(kind), wire.encode_body)
    found["vault taken"] = Sample(_vault((7, CHILD, True, False, 2, 1, 8)), _of_vault, _vault)
    return found


def _sampled(kind: type[Body], read: Callable[[bytes], Any], write: Callable[[Any], bytes]) -> Sample:
    return Sample(write(sample(kind)), read, write)


def _packet(request: type[Request[Any]] | None, kind: type[Body]) -> Sample:
    """Of a request, its reply, or an error."""

    def write(value: Body) -> bytes:
        body = wire.encode_body(value)
        if request is None:
            return wire.encode_head(wire.Kind.ERROR, 7, body=body)
        if kind is request.REPLY:
            return wire.encode_head(wire.Kind.REPLY, 7, body=body)
        name, fds = request.NAME, request.FDS
        return wire.encode_head(wire.Kind.REQUEST, 7, type_=name, deadline_ns=8, fds=fds, body=body)

    return _sampled(kind, lambda data: wire.decode_body(kind, wire.decode_head(data).body), write)


def _of_json(kind: type[Body]) -> Callable[[bytes], Any]:
    return lambda data: msgspec.json.decode(data, type=kind)


def _of_body(kind: type[Body]) -> Callable[[bytes], Any]:
    return lambda data: wire.decode_body(kind, data)


def json_of(value: Body) -> bytes:
    """A record as it stands in its file."""
    return msgspec.json.encode(value)


def _vault(numbers: tuple[int, ...]) -> bytes:
    return vault.TAKEN + TAKEN.pack(*numbers) + b"/group"


def _of_vault(data: bytes) -> tuple[int, ...]:
    assert (data[:1], data[1 + TAKEN.size :]) == (vault.TAKEN, b"/group")
    return TAKEN.unpack(data[1 : 1 + TAKEN.size])


def plain(data: bytes) -> Any:
    """What stands in a frame, without its types: maps, lists and words."""
    if data[:1] == vault.TAKEN:
        return data
    return msgspec.json.decode(data) if data[:1] == b"{" else msgspec.msgpack.decode(data)


def recorded() -> dict[str, dict[str, bytes]]:
    """The frames of every release that has any, by release and name."""
    files = sorted(DIRECTORY.glob("*.json"))
    return {
        path.stem: {
            name: bytes.fromhex(text) for name, text in msgspec.json.decode(path.read_bytes()).items()
        }
        for path in files
    }


def main() -> None:
    """Record this release."""
    DIRECTORY.mkdir(exist_ok=True)
    frames = {name: one.data.hex() for name, one in samples().items()}
    path = DIRECTORY / f"{sys.argv[1]}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(frames), indent=1) + b"\n")
    print(f"{path}: {len(frames)} frames")


if __name__ == "__main__":
    main()
