"""Runs in: bulkheadctl.

Helpers for the modules' command lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from supervisor.cli.ctl.connection import Connection, CtlError
from supervisor.cli.ctl.output import pairs

Commands = Any  # argparse's private subparsers type
Function = Callable[[Connection, argparse.Namespace], int]
M = TypeVar("M", bound=Message)
USAGE = 2
FORMS = ("table", "json", "yaml")


def command(
    commands: Commands, name: str, function: Function, help_: str, *aliases: str
) -> argparse.ArgumentParser:
    """Add one command and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_, description=help_, aliases=aliases
    )
    parser.set_defaults(function=function)
    return parser


def with_output(parser: argparse.ArgumentParser, *, ids: bool = True) -> None:
    """Add -o and, where there are ids to list, -q."""
    parser.add_argument("-o", "--output", choices=FORMS, default="table", help="for people, or for programs")
    if ids:
        parser.add_argument("-q", "--quiet", action="store_true", help="ids only")


def load(path: str, message: M) -> M:
    """Fill `message` from a JSON file ("-" is standard input). Raises CtlError naming what is wrong."""
    try:
        text = Path("/dev/stdin" if path == "-" else path).read_text()
        return json_format.ParseDict(json.loads(text), message)
    except OSError as error:
        raise CtlError(f"cannot read {path}: {error.strerror}", USAGE) from error
    except (ValueError, json_format.ParseError) as error:
        raise CtlError(f"{path}: {error}", USAGE) from error


def labels(items: list[str]) -> dict[str, str]:
    """Return --label KEY=VALUE arguments. Raises CtlError."""
    try:
        return pairs(items)
    except ValueError as error:
        raise CtlError(str(error), USAGE) from error


def each(ids: list[str], function: Callable[[str], object], done: Callable[[str], str] = str) -> int:
    """Do it for every id, say what was done, go on after an error; return 1 if there was one."""
    failed = 0
    for one in ids:
        try:
            function(one)
        except CtlError as error:
            if len(ids) == 1:
                raise
            print(f"bulkheadctl: {one}: {error}", file=sys.stderr)
            failed = 1
        else:
            print(done(one))
    return failed
