"""Runs in: the build of packages. `python -m supervisor.cli.texts --pages packaging/common/man DIRECTORY`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ipc.release import version
from supervisor.cli.texts import completions, configuration, manual
from supervisor.cli.texts.commands import programs

#: manual page -> the program whose command line it describes
PAGES = {"bulkhead.8": "bulkhead", "bulkheadctl.8": "bulkheadctl", "bulkhead.toml.5": ""}


def texts(pages: Path) -> dict[str, str]:
    """Every text by the name of its file; `pages` has the prose of the manual pages. Raises OSError."""
    found = {"bulkhead.toml": configuration.commented()}
    by_name = {program.name: program for program in programs()}
    for program in by_name.values():
        for shell, write in completions.SHELLS.items():
            found[f"{program.name}.{shell}"] = write(program)
    for page, name in PAGES.items():
        prose = (pages / page).read_text(encoding="utf-8")
        found[page] = manual.page(prose, by_name.get(name), version())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the texts of a package into a directory, or the reference of the configuration into a file."""
    parser = argparse.ArgumentParser(prog="supervisor.cli.texts")
    parser.add_argument("--pages", type=Path, metavar="DIR", help="prose of the manual pages")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="write docs/configuration.md")
    parser.add_argument("directory", type=Path, nargs="?")
    options = parser.parse_args(arguments)
    if options.reference:
        options.reference.write_text(configuration.reference(), encoding="utf-8")
    if options.directory:
        options.directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts(options.pages).items():
            (options.directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
