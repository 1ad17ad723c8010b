"""Runs in: storage, network, and a child of each.

How a job is told to a child that is there already: which function, and its arguments. Sans-IO. What cannot be
told (descriptors, functions inside functions, long requests) is no error: it takes a fork.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ipc.messages import Body

LIMIT = 128 * 1024  # bytes of a telling: one packet
_SHARED, _PLAIN = "*", ""


class _Telling(Body):
    module: str
    function: str
    arguments: list[tuple[str, bytes]]


def tell(function: Callable[..., Any], arguments: Sequence[Any], shared: object) -> bytes | None:
    """Return the packet for `function(*arguments)`, None if it cannot be told.

    An argument that is `shared` itself stands for what the child has of it since its fork.
    """
    module, name = function.__module__, function.__qualname__
    if getattr(sys.modules.get(module), name, None) is not function:
        return None
    told = [_argument(value, shared) for value in arguments]
    known = [one for one in told if one is not None]
    if len(known) < len(told):
        return None
    packet = msgspec.msgpack.encode(_Telling(module=module, function=name, arguments=known))
    return packet if len(packet) <= LIMIT else None


def _argument(value: Any, shared: object) -> tuple[str, bytes] | None:
    if value is shared and shared is not None:
        return _SHARED, b""
    if isinstance(value, Body):
        kind = type(value)
        return f"{kind.__module__}:{kind.__qualname__}", msgspec.msgpack.encode(value)
    if value is None or isinstance(value, str | bytes | int | float) or _of_strings(value):
        return _PLAIN, msgspec.msgpack.encode(value)
    return None


def _of_strings(value: Any) -> bool:
    return type(value) is list and all(type(item) is str for item in value)


def told(packet: bytes, shared: object) -> tuple[Callable[..., Any], list[Any]]:
    """Return function and arguments."""
    telling = msgspec.msgpack.decode(packet, type=_Telling)
    function = getattr(sys.modules[telling.module], telling.function)
    return function, [_value(kind, data, shared) for kind, data in telling.arguments]


def _value(kind: str, data: bytes, shared: object) -> Any:
    if kind == _SHARED:
        return shared
    return msgspec.msgpack.decode(data) if kind == _PLAIN else _decoder(kind).decode(data)


@functools.cache
def _decoder(kind: str) -> msgspec.msgpack.Decoder[Any]:
    module, name = kind.split(":")
    return msgspec.msgpack.Decoder(getattr(sys.modules[module], name))
