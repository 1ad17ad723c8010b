"""Runs in: children of storage, and the supervisor as it reads its configuration.

YAML of the host's administrator (CDI specifications, registries.d), as plain data.

Refuses what JSON could not say and what makes a small file large: aliases, tags, several documents, depth.
"""

from __future__ import annotations

from typing import Any

MAX_YAML = 1024 * 1024  # bytes; parsing takes a hundred times as much memory
MAX_DEPTH = 64


def parse(data: bytes) -> Any:
    """The one document of a file. Raises ValueError."""
    import yaml  # here, for who has no such file must not pay for the library

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check(yaml.parse(data, Loader=loader), yaml)
        return yaml.load(data, Loader=loader)  # noqa: S506 - either loader is a safe one
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _check(events: Any, yaml: Any) -> None:
    """Look at the events before anything is built of them; the parser makes them without recursion."""
    depth = documents = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has an alias")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"it has the tag {event.tag!r}")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is more than {MAX_DEPTH} levels deep")
        if documents > 1:
            raise ValueError("it has more than one document")
