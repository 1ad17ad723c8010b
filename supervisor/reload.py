"""Runs in: the supervisor. What a reload of the configuration changes; sans-IO.

Owns the list of keys that only a new start can change, and the comparison of two configurations key by key.
Everything else is live: for workers that run, for those that come, or for the next pod, container or layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from supervisor.config import Config

#: Keys, or tables of keys, that a running instance is built on.
FIXED = (
    "root",
    "run_root",
    "listen",
    "cgroup_manager",
    "users",
    "ops.listen",  # the listeners are bound once
    "ops.address",
    "ops.port",
    "nri",
    "grpc",  # given to the gRPC server when it is made
    "stream.address",  # as those of ops
    "stream.port",
    "cni.cache_dir",  # where the records of running pods are
)


@dataclasses.dataclass(frozen=True)
class Change:
    """The configuration from now on, the keys that have another value in it, and those that would have."""

    config: Config
    taken: list[str]
    refused: list[str]


def change(old: Config, new: Config) -> Change:
    """Compare, and keep what is fixed."""
    refused = [key for key in differences(old, new) if is_fixed(key)]
    config = new
    for key in refused:
        config = _with(config, key.split("."), _value(old, key))
    return Change(config, list(differences(old, config)), refused)


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    """The keys whose values differ, dotted."""
    for declared in dataclasses.fields(old):
        before, after = getattr(old, declared.name), getattr(new, declared.name)
        if dataclasses.is_dataclass(before):
            yield from differences(before, after, f"{prefix}{declared.name}.")
        elif before != after:
            yield prefix + declared.name


def is_fixed(key: str) -> bool:
    """True if only a new start changes this key."""
    return key in FIXED or key.partition(".")[0] in FIXED


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _with(config: Any, path: list[str], value: Any) -> Any:
    """`config` with one key changed."""
    if path[1:]:
        value = _with(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: value})
