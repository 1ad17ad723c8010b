"""Runs in: every process. Sans-IO.

A receiver's one table: which requests it answers, with what, and who may send them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from ipc.messages import Request

#: What uid 0 is called in `callers`: the supervisor, storage, network, monitors and bulkheadctl.
ROOT = "root"


@dataclass(frozen=True)
class Handler:
    """One row: the request type, the function that answers it, the kinds of process that may ask."""

    request: type[Request[Any]]
    function: Callable[..., Any]
    callers: Collection[str] = field(default_factory=frozenset)


Handlers = dict[str, Handler]


def table(*rows: Handler) -> Handlers:
    """Return the rows by message name. Raises ValueError if a name comes twice or is none."""
    handlers: Handlers = {}
    for row in rows:
        if not row.request.NAME or row.request.NAME in handlers:
            raise ValueError(f"{row.request.__name__} has no name or is in the table twice")
        handlers[row.request.NAME] = row
    return handlers
