"""Runs in: the build of packages, and tests.

The command lines as data: argparse's parsers, walked once for everybody who writes of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from supervisor.cli.ctl.complete import OFFERED

_NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Option:
    """A flag with its spellings, or an argument (no spellings) with its name."""

    flags: tuple[str, ...]
    value: str  # what stands for its value; "" for a switch
    help: str
    choices: tuple[str, ...]
    repeated: bool
    required: bool
    offered: str = ""  # what of the node its value names: `bulkheadctl complete` lists it

    @property
    def is_argument(self) -> bool:
        """True for what is told by its place."""
        return not self.flags


@dataclass(frozen=True)
class Command:
    """One command; the program itself has the name ""."""

    name: str
    aliases: tuple[str, ...]
    help: str
    options: tuple[Option, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every word that means it."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Program:
    """A program: what stands before the command, and the commands."""

    name: str
    top: Command
    commands: tuple[Command, ...]


def programs() -> tuple[Program, ...]:
    """Both command lines."""
    from supervisor.cli import bulkhead, bulkheadctl

    return (program(bulkhead.parser()), program(bulkheadctl.parser()))


def program(parser: argparse.ArgumentParser) -> Program:
    """Read a parser with one level of commands."""
    top = Command("", (), parser.description or "", tuple(_options(parser)))
    return Program(parser.prog, top, tuple(_commands(parser)))


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found[0]


def _commands(parser: argparse.ArgumentParser) -> Iterator[Command]:
    action = _subparsers(parser)
    helps = {pseudo.dest: pseudo.help or "" for pseudo in action._choices_actions}
    names: dict[int, list[str]] = {}
    for name, sub in action.choices.items():
        names.setdefault(id(sub), []).append(name)
    for name, sub in action.choices.items():
        if names[id(sub)][0] == name:
            offered = OFFERED.get(name, {}) if parser.prog == "bulkheadctl" else {}
            yield Command(name, tuple(names[id(sub)][1:]), helps[name], tuple(_options(sub, offered)))


def _options(parser: argparse.ArgumentParser, offered: Mapping[str, str] = _NOTHING) -> Iterator[Option]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        takes = action.nargs != 0
        yield Option(
            flags=tuple(action.option_strings),
            value=_value(action) if takes else "",
            help=_help(action, parser.prog),
            choices=tuple(str(choice) for choice in action.choices or ()),
            repeated=action.nargs in ("*", "+", argparse.REMAINDER),
            required=action.nargs not in ("?", "*", argparse.REMAINDER),
            offered=next(
                (offered[name] for name in (*action.option_strings, _value(action)) if name in offered), ""
            ),
        )


def _value(action: argparse.Action) -> str:
    if action.choices:
        return "|".join(str(choice) for choice in action.choices)
    if isinstance(action.metavar, str):
        return action.metavar
    return action.dest.upper().replace("_", "-")


def _help(action: argparse.Action, prog: str) -> str:
    if not action.help:
        return ""
    return action.help % {**vars(action), "prog": prog} if "%" in action.help else action.help
