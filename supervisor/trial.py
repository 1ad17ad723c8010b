"""Runs in: a process of its own, `bulkhead serve --check`, which a supervisor starts before it executes this
program.

Whether this program would do: every module that the supervisor and its workers are made of is loaded, the
configuration has been read, and one line of JSON says which build this is and what it understands.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import msgspec

from supervisor.config import Config
from supervisor.sandbox.spec import Identity
from supervisor.spawn import BOOT
from supervisor.table import Table
from supervisor.upgrade import trial


def check(config: Config, who: Mapping[str, Identity], table: Table) -> str:
    """Load everything; return the line. Raises whatever a module raises that does not load."""
    for name in (
        "supervisor.server",
        "supervisor.sandbox",
        BOOT,
        *(entry.module for entry in table.values()),
    ):
        if name:
            importlib.import_module(name)
    return msgspec.json.encode(trial(config, who)).decode()
