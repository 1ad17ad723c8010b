"""Runs in: the tests, bulkheadctl, and by hand for the documentation. Sans-IO but for `--write`.

What each worker is left with, told from the process table: the parts of docs/sandbox.md between its marks,
and what `bulkheadctl workers --sandbox` prints, with what a worker has reported instead of what is declared.
`python -m supervisor.sandbox.page` prints the parts, `--write` puts them into the page.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

from ipc.messages.supervisor import SandboxReport
from ipc.seccomp import Policy
from supervisor.sandbox.seccomp import LISTS
from supervisor.sandbox.spec import NETWORK_NEEDS, STORAGE_NEEDS, Bind, Sandbox
from supervisor.table import MIB, ROOT_USER, TABLE, Entry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sandbox.md"
WORKERS = tuple(entry for entry in TABLE.values() if entry.sandbox is not None)
_FAMILIES: dict[int, str] = {socket.AF_UNIX: "Unix", socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}

Report = SandboxReport | None
Fact = Callable[[Entry, Sandbox, Report], str]


def facts(entry: Entry, report: Report = None) -> dict[str, str]:
    """What holds a worker, in words: as it has reported, else as the table declares."""
    assert entry.sandbox is not None
    return {name: fact(entry, entry.sandbox, report) for name, fact in _FACTS.items()}


# -- the facts --------------------------------------------------------------------------------------------


def _user(entry: Entry, _sandbox: Sandbox, report: Report) -> str:
    if report is not None:
        return f"{report.uid}:{report.gid}"
    return ROOT_USER if entry.user == ROOT_USER else "own"


def _capabilities(_entry: Entry, sandbox: Sandbox, report: Report) -> str:
    kept = sandbox.capabilities if report is None else report.capabilities
    return ", ".join(sorted(name.removeprefix("CAP_") for name in kept)) or "none"


def _namespaces(_entry: Entry, sandbox: Sandbox, report: Report) -> str:
    return ", ".join(sorted(sandbox.namespaces if report is None else report.namespaces)) or "none"


def _network(_entry: Entry, sandbox: Sandbox, report: Report) -> str:
    new = sandbox.namespaces if report is None else report.namespaces
    return "an empty one" if "net" in new else "the host's"


def _landlock(_entry: Entry, sandbox: Sandbox, report: Report) -> str:
    if not sandbox.landlock:
        return "no"
    tcp = " and ".join(sorted(sandbox.tcp))
    held = "" if report is None else f"ABI {report.landlock}: " if report.landlock else "off, not "
    return f"{held}{'paths of the view' if sandbox.view else 'no path'}, {f'TCP {tcp}' if tcp else 'no TCP'}"


def _calls(_entry: Entry, sandbox: Sandbox, report: Report) -> str:
    if report is not None and report.seccomp != sandbox.seccomp:
        return report.seccomp
    policy = LISTS[sandbox.seccomp]
    if policy.open_list:
        return f"all but {len(policy.denied)}"
    return f"{len(policy.allowed)}, and {len(policy.conditional)} with certain arguments"


def _sockets(_entry: Entry, sandbox: Sandbox, _report: Report) -> str:
    checks = LISTS[sandbox.seccomp].conditional.get("socket")
    if checks is None:
        return "any"
    words = [_FAMILIES.get(check[0].value, "route netlink") for check in checks]
    return ", ".join(words)


def _passes(policy: Policy, *names: str) -> bool:
    if policy.open_list:
        return any(name not in policy.denied for name in names)
    return any(name in policy.allowed for name in names)


def _children(_entry: Entry, sandbox: Sandbox, _report: Report) -> str:
    policy = LISTS[sandbox.seccomp]
    found = [word for word, names in _CHILDREN.items() if _passes(policy, *names)]
    return ", ".join(found) or "neither"


_CHILDREN = {"fork": ("fork", "vfork", "clone"), "execute": ("execve", "execveat")}


def _limits(_entry: Entry, sandbox: Sandbox, report: Report) -> str:
    limits = sandbox.rlimits if report is None else report.rlimits
    return ", ".join(f"{name} {limits[name]}" for name in sorted(limits))


def _group(entry: Entry, _sandbox: Sandbox, _report: Report) -> str:
    assert entry.limits is not None
    return f"{entry.limits.memory // MIB} MiB, {entry.limits.pids} tasks, weight {entry.limits.cpu_weight}"


def _oom(_entry: Entry, sandbox: Sandbox, report: Report) -> str:
    return str(sandbox.oom_score_adj if report is None else report.oom_score_adj)


def _no_new_privileges(_entry: Entry, sandbox: Sandbox, report: Report) -> str:
    return "held" if (sandbox.no_new_privs if report is None else report.no_new_privs) else "not held"


_FACTS: dict[str, Fact] = {
    "user": _user,
    "reads from a network": lambda entry, _sandbox, _report: entry.network or "nothing",
    "capabilities": _capabilities,
    "network namespace": _network,
    "new namespaces": _namespaces,
    "mounts": lambda _entry, sandbox, _report: "a view" if sandbox.view else "the host's",
    "Landlock": _landlock,
    "system calls": _calls,
    "sockets it can make": _sockets,
    "fork, execute": _children,
    "no_new_privs": _no_new_privileges,
    "limits": _limits,
    "OOM score": _oom,
    "cgroup of the kind": _group,
    "dies with the supervisor": lambda _entry, sandbox, _report: (
        "yes" if sandbox.parent_death_signal else "unless it has sessions"
    ),
}


# -- the parts of the page ----------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, *rows]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:]])


def who() -> str:
    """Every fact of every worker."""
    told = {entry.kind: facts(entry) for entry in WORKERS}
    rows = [[name, *(told[kind][name] for kind in told)] for name in _FACTS]
    return _table(["", *told], rows)


def views() -> str:
    """Every path of every view."""
    users: dict[Bind, list[str]] = {}
    for entry in WORKERS:
        assert entry.sandbox is not None
        for bind in entry.sandbox.view:
            users.setdefault(bind, []).append(entry.kind)
    rows = [[_path(bind), ", ".join(kinds), bind.why] for bind, kinds in users.items()]
    return _table(["path", "who", "why"], rows)


def _path(bind: Bind) -> str:
    notes = [
        *(["writable"] if bind.writable else []),
        *(["with the mounts below it"] if bind.tree else []),
        *(["if it is there"] if bind.optional else []),
    ]
    path = bind.path.replace("{", "<").replace("}", ">")
    return f"`{path}`" + (f" ({', '.join(notes)})" if notes else "")


def capabilities() -> str:
    """What storage and network need theirs for."""
    rows = [
        [kind, f"`{name}`", why]
        for kind, needs in (("storage", STORAGE_NEEDS), ("network", NETWORK_NEEDS))
        for name, why in needs.items()
    ]
    return _table(["worker", "capability", "for"], rows)


def calls() -> str:
    """Every system call of every list."""
    rows = []
    for policy in LISTS.values():
        named = policy.denied if policy.open_list else policy.allowed
        rows.append([policy.name, "all but these" if policy.open_list else "these", _names(named)])
        rows.append([policy.name, "with certain arguments", _names(frozenset(policy.conditional))])
    return _table(["list", "passes", "calls"], rows)


def _names(names: frozenset[str]) -> str:
    return " ".join(sorted(names))


PARTS: dict[str, Callable[[], str]] = {
    "who": who,
    "views": views,
    "capabilities": capabilities,
    "calls": calls,
}


def marked(name: str, text: str) -> str:
    """A part with its marks."""
    return f"<!-- generated: {name} -->\n{text}\n<!-- end: {name} -->"


def renewed(page: str) -> str:
    """The page with all its parts made anew. Raises ValueError if a mark is missing."""
    for name, part in PARTS.items():
        begin, end = page.index(f"<!-- generated: {name} -->"), f"<!-- end: {name} -->"
        page = page[:begin] + marked(name, part()) + page[page.index(end) + len(end) :]
    return page


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(renewed(PAGE.read_text()))
    else:
        print("\n\n".join(part() for part in PARTS.values()))
