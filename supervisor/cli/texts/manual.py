"""Runs in: the build of packages, and tests.

Manual pages: prose from packaging/common/man/, with the lists in it written from the command lines and from
the schema. A line `@COMMANDS@`, `@OPTIONS@` or `@KEYS@` stands for such a list, @VERSION@ for the release.
"""

from __future__ import annotations

from collections.abc import Iterator

from supervisor.cli.texts.commands import Command, Option, Program
from supervisor.cli.texts.configuration import Key, tables


def page(prose: str, program: Program | None, version: str) -> str:
    """Return a manual page."""
    lines: list[str] = []
    for line in prose.splitlines():
        if line == "@COMMANDS@" and program is not None:
            lines += (row for command in program.commands for row in _command(command))
        elif line == "@OPTIONS@" and program is not None:
            lines += (row for option in program.top.options for row in _option(option))
        elif line == "@KEYS@":
            lines += _keys()
        else:
            lines.append(line.replace("@VERSION@", version))
    return "\n".join(lines) + "\n"


def roff(text: str) -> str:
    """Escape a text: what begins a request, what begins an escape, hyphens that are to be copied."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return f"\\&{escaped}" if escaped.startswith(".") else escaped


def _command(command: Command) -> Iterator[str]:
    words = [f"\\fB{roff(command.name)}\\fR"]
    words += [_usage(option) for option in command.options if option.flags != ("-h", "--help")]
    yield ".TP"
    yield " ".join(words)
    aliases = f" Also called {', '.join(command.aliases)}." if command.aliases else ""
    yield f"{roff(_sentence(command.help) + aliases)}"
    described = [option for option in command.options if option.help and option.flags != ("-h", "--help")]
    if described:
        yield ".RS"
        for option in described:
            yield from _option(option)
        yield ".RE"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _usage(option: Option) -> str:
    if option.is_argument:
        name = f"\\fI{roff(option.value)}\\fR" + (" ..." if option.repeated else "")
        return name if option.required else f"[{name}]"
    return f"[{_flags(option, option.flags[:1])}]"


def _flags(option: Option, flags: tuple[str, ...]) -> str:
    value = f" \\fI{roff(option.value)}\\fR" if option.value else ""
    return ", ".join(f"\\fB{roff(flag)}\\fR" for flag in flags) + value


def _option(option: Option) -> Iterator[str]:
    yield ".TP"
    yield _flags(option, option.flags) if option.flags else f"\\fI{roff(option.value)}\\fR"
    yield roff(_sentence(option.help or "what to work on"))


def _keys() -> Iterator[str]:
    for table in tables():
        yield f".SS {roff(table.heading)}"
        yield roff(table.doc)
        for key in table.keys:
            yield from _key(key)


def _key(key: Key) -> Iterator[str]:
    yield ".TP"
    yield f"\\fB{roff(key.name)}\\fR = {roff(key.default)}"
    live = "" if key.live else " Takes a restart."
    yield roff(key.doc + live)
