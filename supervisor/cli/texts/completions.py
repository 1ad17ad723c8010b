"""Runs in: the build of packages, and tests.

Completions for bash, zsh and fish: commands, their flags, the values of those flags that have a fixed set,
and pods, containers and images, which the program is asked for. Everything else is completed as a file's
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from supervisor.cli.texts.commands import Command, Option, Program


def bash(program: Program) -> str:
    """A completion file for bash."""
    function = f"_{program.name}"
    names = " | ".join(name for command in program.commands for name in command.names)
    lines = [
        f"# Completion of {program.name} for bash; written from its command line.",
        f"{function}() {{",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} command= word words=",
        "    # names of images have colons, at which bash breaks words",
        "    declare -F _get_comp_words_by_ref >/dev/null && _get_comp_words_by_ref -n : cur prev",
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        f"        case $word in {names})",
        "            command=$word",
        "            break",
        "            ;;",
        "        esac",
        "    done",
        "    case $command:$prev in",
        *_bash_values(program),
        "    *)",
        "        case $command in",
        *_bash_words(program),
        "        esac",
        "        ;;",
        "    esac",
        '    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")',
        '    declare -F __ltrim_colon_completions >/dev/null && __ltrim_colon_completions "$cur"',
        "}",
        f"complete -o default -F {function} {program.name}",
    ]
    return "\n".join(lines) + "\n"


def _bash_values(program: Program) -> Iterator[str]:
    for command in (program.top, *program.commands):
        for option in command.options:
            if option.flags and option.choices:
                patterns = " | ".join(f"{name}:{flag}" for name in command.names for flag in option.flags)
                yield f'    {patterns}) words="{" ".join(option.choices)}" ;;'
            elif option.flags and option.offered:
                patterns = " | ".join(f"{name}:{flag}" for name in command.names for flag in option.flags)
                yield f"    {patterns}) words={_bash_asked(program, option.offered)} ;;"


def _bash_words(program: Program) -> Iterator[str]:
    top = [*_flags(program.top), *(command.name for command in program.commands)]
    yield f'        "") words="{" ".join(top)}" ;;'
    for command in program.commands:
        asked = [option.offered for option in command.options if option.is_argument and option.offered]
        yield f"        {' | '.join(command.names)})"
        yield f'            words="{" ".join(_words(command))}"'
        if asked:
            yield f'            [[ $cur == -* ]] || words+=" "{_bash_asked(program, asked[0])}'
        yield "            ;;"


def _bash_asked(program: Program, what: str) -> str:
    """The first words of what the program lists."""
    return f'"$({program.name} complete {what} 2>/dev/null | cut -f 1)"'


def _flags(command: Command) -> list[str]:
    return [flag for option in command.options for flag in option.flags]


def _words(command: Command) -> list[str]:
    places = [choice for option in command.options if option.is_argument for choice in option.choices]
    return [*_flags(command), *places]


def zsh(program: Program) -> str:
    """A completion file for zsh."""
    lines = [
        f"#compdef {program.name}",
        f"# Completion of {program.name} for zsh; written from its command line.",
        *_zsh_asked(program),
        f"_{program.name}() {{",
        "    local state line",
        "    local -a commands=(",
        *(f"        {_zsh_command(command)}" for command in program.commands),
        "    )",
        "    _arguments -C \\",
        *(f"        {_zsh_option(option)} \\" for option in program.top.options),
        "        '1:command:->command' '*::argument:->argument'",
        "    case $state in",
        "    command) _describe command commands ;;",
        "    argument)",
        "        case $line[1] in",
        *(line for command in program.commands for line in _zsh_case(command)),
        "        esac",
        "        ;;",
        "    esac",
        "}",
        f'_{program.name} "$@"',
    ]
    return "\n".join(lines) + "\n"


def _zsh_asked(program: Program) -> list[str]:
    """A function that asks the program and describes what it lists."""
    if not any(option.offered for command in program.commands for option in command.options):
        return []
    return [
        f"_{program.name}_asked() {{",
        "    local -a words meanings",
        "    local word meaning",
        "    while IFS=$'\\t' read -r word meaning; do",
        '        words+=("$word") meanings+=("$word  -- $meaning")',
        f'    done < <({program.name} complete "$1" 2>/dev/null)',
        "    compadd -d meanings -a words",
        "}",
    ]


def _quoted(text: str) -> str:
    return text.replace("'", "'\\''").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")


def _zsh_command(command: Command) -> str:
    return f"'{command.name}:{_quoted(command.help)}'"


def _zsh_case(command: Command) -> Iterator[str]:
    yield f"        {'|'.join(command.names)})"
    yield "            _arguments \\"
    for option in command.options:
        yield f"                {_zsh_option(option)} \\"
    yield "                ;;"


def _zsh_option(option: Option) -> str:
    asked = f"_bulkheadctl_asked {option.offered}" if option.offered else "_files"
    values = f"({' '.join(option.choices)})" if option.choices else asked
    if option.is_argument:
        star = "*" if option.repeated else ""
        return f"'{star}:{_quoted(option.value.lower())}:{values}'"
    value = f":{_quoted(option.value.lower())}:{values}" if option.value else ""
    text = f"'[{_quoted(option.help)}]{value}'"
    if len(option.flags) == 1:
        return f"{option.flags[0]}{text}"
    return f"'({' '.join(option.flags)})'{{{','.join(option.flags)}}}{text}"


def fish(program: Program) -> str:
    """A completion file for fish."""
    lines = [f"# Completion of {program.name} for fish; written from its command line."]
    lines += [_fish_option(program.name, "__fish_use_subcommand", option) for option in _named(program.top)]
    for command in program.commands:
        help_ = _fish_quoted(command.help)
        lines.append(f"complete -c {program.name} -n __fish_use_subcommand -a {command.name} -d {help_}")
        condition = f"'__fish_seen_subcommand_from {' '.join(command.names)}'"
        lines += [_fish_option(program.name, condition, option) for option in command.options]
    return "\n".join(line for line in lines if line) + "\n"


def _named(command: Command) -> list[Option]:
    return [option for option in command.options if option.flags]


def _fish_option(program: str, condition: str, option: Option) -> str:
    words = f" -x -a '{_fish_words(program, option)}'" if _fish_words(program, option) else ""
    if option.is_argument:
        return f"complete -c {program} -n {condition}{words}" if words else ""
    words = words or (" -r" if option.value else "")
    spellings = "".join(
        f" -l {flag[2:]}" if flag.startswith("--") else f" -s {flag[1:]}" for flag in option.flags
    )
    return f"complete -c {program} -n {condition}{spellings}{words} -d {_fish_quoted(option.help)}"


def _fish_words(program: str, option: Option) -> str:
    asked = f"({program} complete {option.offered} 2>/dev/null)" if option.offered else ""
    return " ".join(option.choices) or asked


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


#: file name extension -> writer
SHELLS: Mapping[str, Callable[[Program], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
