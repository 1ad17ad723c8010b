"""Texts that are written from the code: complete, accepted by those who read them, and what stands in
docs/.
"""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

from supervisor.cli.texts import configuration
from supervisor.cli.texts.__main__ import texts
from supervisor.cli.texts.commands import programs
from supervisor.cli.texts.manual import roff
from supervisor.config import Config
from supervisor.configfile import build, key_paths, load

REPO = Path(__file__).resolve().parents[3]
PAGES = REPO / "packaging/common/man"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    for name, text in texts(PAGES).items():
        (directory / name).write_text(text)
    return directory


def check(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout + done.stderr == ""


def test_shells_accept_their_completions(written: Path) -> None:
    for program in ("bulkhead", "bulkheadctl"):
        check("bash", "-n", written / f"{program}.bash")
        check("zsh", "-n", written / f"{program}.zsh")
        check("fish", "--no-execute", written / f"{program}.fish")


def completed(written: Path, *words: str) -> set[str]:
    """What bash would offer after these words of a bulkheadctl command line."""
    line = " ".join(f"'{word}'" for word in ("bulkheadctl", *words))
    script = (
        f"source {written}/bulkheadctl.bash; COMP_WORDS=({line}); COMP_CWORD={len(words)};"
        '_bulkheadctl; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return set(
        subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_bash_completes_commands_flags_and_values(written: Path) -> None:
    assert {"pods", "ps", "pull", "workers"} <= completed(written, "p") | completed(written, "w")
    assert completed(written, "ps", "--st") == {"--state"}
    assert completed(written, "ps", "--state", "r") == {"running"}


def test_shells_offer_pods_containers_and_images_by_asking(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "bulkheadctl"
    asked.write_text('#!/bin/sh\n[ "$1" = complete ] && printf "%s\\tone\\na.test/%s:1\\ttwo\\n" "$2" "$2"\n')
    asked.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert completed(written, "stopp", "p") == {"pods"}
    assert completed(written, "logs", "-f", "c") == {"containers"}
    assert completed(written, "ps", "--pod", "") == {"pods", "a.test/pods:1"}
    assert completed(written, "rmi", "a.test/i") == {"a.test/images:1"}
    assert completed(written, "logs", "--fo") == {"--follow"}
    line = f"source {written}/bulkheadctl.fish; complete -C 'bulkheadctl rmi a'"
    done = subprocess.run(["fish", "--no-config", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "a.test/images:1\ttwo"
    assert "_bulkheadctl_asked containers" in (written / "bulkheadctl.zsh").read_text()


def test_every_argument_that_names_something_of_the_node_is_offered() -> None:
    bulkheadctl = programs()[1]
    named = {"ID", "POD", "NAME"}
    for command in bulkheadctl.commands:
        lost = [one.value for one in command.options if one.value in named and not one.offered]
        assert not lost, f"{command.name} {lost}"


def test_manual_pages_are_well_formed_and_complete(written: Path) -> None:
    for program in programs():
        text = (written / f"{program.name}.8").read_text()
        check("mandoc", "-T", "lint", "-W", "warning", written / f"{program.name}.8")
        for command in program.commands:
            assert f"\\fB{roff(command.name)}\\fR" in text
            flags = {flag for option in command.options for flag in option.flags} - {"-h", "--help"}
            assert [flag for flag in flags if flag.replace("-", "\\-") not in text] == []
    page = written / "bulkhead.toml.5"
    check("mandoc", "-T", "lint", "-W", "warning", page)
    assert all(f"\\fB{path[-1]}\\fR" in page.read_text() for path in key_paths())


def test_every_command_and_key_is_explained() -> None:
    for program in programs():
        for command in program.commands:
            assert command.help, command.name
            flags = [option for option in command.options if option.flags]
            assert all(option.help for option in flags), command.name
    for table in configuration.tables():
        assert all(key.doc for key in table.keys), table.name


def test_the_configuration_file_has_every_default_as_a_comment(written: Path, tmp_path: Path) -> None:
    path = written / "bulkhead.toml"
    assert tomllib.loads(path.read_text()) == {}
    lines = path.read_text().splitlines()
    keys = [line[1:] for line in lines if line.startswith("#") and not line.startswith("# ")]
    stated = tomllib.loads("\n".join(keys))
    del stated["runtimes"]
    assert build(Config, stated) == Config()
    load(str(path), str(tmp_path))


def test_the_reference_is_that_of_the_schema() -> None:
    text = (REPO / "docs/configuration.md").read_text()
    command = "python -m supervisor.cli.texts --reference docs/configuration.md"
    assert text == configuration.reference(), f"write it anew: {command}"
