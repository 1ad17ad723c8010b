"""Runs in: the tests, and by hand for the documentation. Sans-IO.

Draws the process table: the parts of docs/process-model.md that must not differ from supervisor/table.py.
`python -m supervisor.drawing` prints them; a test compares them with the page.
"""

from __future__ import annotations

from collections.abc import Callable

from supervisor.table import MIB, ROOT_USER, SUPERVISOR_CALLERS, TABLE, Entry, Table

#: Who connects from outside of the map.
OUTSIDE = {
    "cri": ("kubelet", "bulkheadctl"),
    "storage": ("bulkheadctl",),
    "network": ("bulkheadctl",),
    "stream": ("kubelet",),
    "ops": ("scraper",),
    "nri": ("plugins",),
}


def tree(table: Table = TABLE) -> str:
    """The drawing: every kind below the supervisor, as `ps` would show their titles."""
    titles = [(_title(entry), entry) for entry in table.values()]
    width = max(len(title) for title, _ in titles) + 2
    lines = ["systemd", " └─ bulkhead: supervisor [priv]"]
    for number, (title, entry) in enumerate(titles):
        branch = "└─" if number == len(titles) - 1 else "├─"
        lines.append(f"     {branch} {title:<{width}}{_who(entry)} · {entry.purpose}")
    return "\n".join(lines)


def _title(entry: Entry) -> str:
    return f"bulkhead: {entry.kind}" + ("" if entry.maximum or entry.is_worker else " <id>")


def _who(entry: Entry) -> str:
    if entry.user != ROOT_USER:
        return "own uid, no capabilities"
    if entry.sandbox is None:
        return "root"
    return f"root, {len(entry.sandbox.capabilities)} capabilities"


def matrix(table: Table = TABLE) -> str:
    """Who may call whom, a line per receiver."""
    rows = [f"supervisor <- {_names(SUPERVISOR_CALLERS)}"]
    for entry in table.values():
        callers = [*OUTSIDE.get(entry.kind, ()), *sorted(entry.callers)]
        if callers:
            rows.append(f"{entry.kind} <- {', '.join(callers)}")
    return "\n".join(rows)


def _names(kinds: frozenset[str]) -> str:
    return ", ".join(sorted("bulkheadctl" if kind == "root" else kind for kind in kinds))


def _count(entry: Entry) -> str:
    if entry.minimum == entry.maximum:
        return str(entry.minimum)
    return f"{entry.minimum} to {entry.maximum}"


Column = tuple[str, Callable[[Entry], str]]

_COLUMNS: tuple[Column, ...] = (
    ("kind", lambda entry: entry.kind),
    ("processes", _count),
    ("restart", lambda entry: entry.restart.value),
    (
        "new namespaces",
        lambda entry: ", ".join(sorted(entry.sandbox.namespaces)) if entry.sandbox else "none",
    ),
    ("seccomp", lambda entry: entry.sandbox.seccomp if entry.sandbox else "none"),
    ("Landlock", lambda entry: "yes" if entry.sandbox and entry.sandbox.landlock else "no"),
    ("memory", lambda entry: f"{entry.limits.memory // MIB} MiB" if entry.limits else "no limit"),
    ("tasks", lambda entry: str(entry.limits.pids) if entry.limits else "no limit"),
    ("upgrade", lambda entry: "drain" if entry.drains else entry.exchange.value),
)


def properties(table: Table = TABLE) -> str:
    """The properties of the workers, in Markdown; monitors and inits have none of them."""
    workers = [entry for entry in table.values() if entry.is_worker]
    lines = [
        "| " + " | ".join(name for name, _ in _COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
    ]
    lines += ["| " + " | ".join(cell(entry) for _, cell in _COLUMNS) + " |" for entry in workers]
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join((tree(), matrix(), properties())))
