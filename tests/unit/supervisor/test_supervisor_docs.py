"""Every command that the documents name is one that there is, with flags that there are."""

from __future__ import annotations

import argparse

import pytest

from supervisor.cli import bulkhead, bulkheadctl
from supervisor.cli.texts.commands import programs
from tests.support.docs import Command, commands

FOUND = commands("bulkhead", "bulkheadctl")
PARSERS = {"bulkhead": bulkhead.parser, "bulkheadctl": bulkheadctl.parser}


def parse(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> str:
    """What is wrong with a command line; --help is right everywhere."""
    try:
        parser.parse_args([word for word in words if word != "..."])
    except SystemExit as end:
        return "" if end.code == 0 else "refused"
    return ""


@pytest.mark.parametrize("command", [one for one in FOUND if one.block], ids=lambda one: one.place)
def test_a_command_in_a_block_is_accepted(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = parse(PARSERS[command.program](), command.words[1:])
    assert not wrong, f"{command.place}: {' '.join(command.words)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("command", [one for one in FOUND if not one.block], ids=lambda one: one.place)
def test_a_command_in_a_sentence_exists(command: Command) -> None:
    known = {program.name: {name for c in program.commands for name in c.names} for program in programs()}
    flags = {
        program.name: {flag for c in (program.top, *program.commands) for o in c.options for flag in o.flags}
        for program in programs()
    }
    words = [word for word in command.words[1:] if not word.startswith("-")]
    assert not words or words[0] in known[command.program], " ".join(command.words)
    named = {word.partition("=")[0] for word in command.words[1:] if word.startswith("-")}
    assert named <= flags[command.program], " ".join(command.words)


def test_the_documents_show_most_of_what_there_is() -> None:
    shown = {(one.program, one.words[1]) for one in FOUND if one.words[1:]}
    operators = {"status", "workers", "top", "prune", "reload", "restart", "debug", "bundle"}
    assert {("bulkheadctl", name) for name in operators} <= shown
    assert {("bulkhead", name) for name in ("serve", "config", "info", "migrate")} <= shown
