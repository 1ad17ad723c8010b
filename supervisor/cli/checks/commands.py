"""Runs in: `bulkhead check`.

Whether the service runs is told by the instance's locks: then its workers are asked, else their code runs
here.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys

from ipc.errors import RemoteError
from supervisor.cli.checks import report
from supervisor.cli.checks.running import Running
from supervisor.cli.checks.stopped import Stopped, locked
from supervisor.config import Config
from supervisor.directories import InstanceRunning
from supervisor.table import Table

FAILED = 1
#: The host, a worker or a file failed us: a sentence, not a stack.
TROUBLE = (OSError, RemoteError, sqlite3.Error)


def check(config: Config, table: Table, options: argparse.Namespace) -> int:
    """`bulkhead check`: return the exit code."""
    missing = absent(config)
    if missing:
        return complain(missing)
    try:
        try:
            with locked(config):
                found = report.check(Stopped(config, table), deep=options.deep, repair=options.repair)
        except InstanceRunning:
            found = report.check(Running(config.run_root), deep=options.deep, repair=options.repair)
    except TROUBLE as error:
        return complain(str(error))
    return report.show(found, options.output)


def absent(config: Config) -> str:
    """What of an instance is not there; "" if there is one."""
    if os.geteuid() != 0:
        return "only root can look at everything"
    missing = [path for path in (config.root, config.run_root) if not os.path.isdir(path)]
    return f"{missing[0]}: there is no such directory: nothing has run there" if missing else ""


def complain(text: str) -> int:
    """Say why it cannot be done; return the exit code."""
    print(f"bulkhead: {text}", file=sys.stderr)
    return FAILED
