"""Runs in: every process.

The messages that processes exchange, one module per owner (the process that answers them), each type
named owner.noun.verb. They are msgspec Structs in msgpack maps: fields may be added with a default,
never renamed, retyped or removed, because monitors outlive upgrades.

A request type is declared with `@request(name, reply=..., idempotent=...)`. `idempotent` means: sending
it twice has the effect of sending it once, so a caller may send it again when the receiver died.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import msgspec


class Body(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Base of everything that is a message or stands in one."""


class Empty(Body):
    """A reply that says only: done."""


class IdMapping(Body):
    """A range of uids or gids of a user namespace: `container_id` on is the host's `host_id` on."""

    container_id: int
    host_id: int
    length: int


R = TypeVar("R", bound=Body)
Q = TypeVar("Q")


class Request(Body, Generic[R]):
    """Base of every request; the parameter is the type of its reply."""

    NAME: ClassVar[str] = ""
    REPLY: ClassVar[type[Body]] = Empty
    UPDATE: ClassVar[type[Body] | None] = None
    IDEMPOTENT: ClassVar[bool] = False
    FDS: ClassVar[int] = 0


#: Every request type of the house by its name.
REGISTRY: dict[str, type[Request[Any]]] = {}


def request(
    name: str,
    *,
    reply: type[Body] = Empty,
    idempotent: bool,
    fds: int = 0,
    update: type[Body] | None = None,
) -> Callable[[type[Q]], type[Q]]:
    """Declare a request type.

    `fds` is the largest number of descriptors the request carries; `update` the type of the progress
    reports that the receiver may send before its reply. Raises ValueError if the name is taken or not
    of the form owner.noun.verb.
    """

    def declare(cls: type[Q]) -> type[Q]:
        if name in REGISTRY or name.count(".") != 2:
            raise ValueError(f"bad or repeated message name {name!r}")
        assert issubclass(cls, Request)
        cls.NAME, cls.REPLY, cls.IDEMPOTENT, cls.FDS, cls.UPDATE = name, reply, idempotent, fds, update
        REGISTRY[name] = cls
        return cls

    return declare
