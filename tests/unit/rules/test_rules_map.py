"""The rules that keep the process map legible (docs/process-model.md, "Rules of the tree")."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("ipc", "supervisor", "workers")
GENERATED = re.compile(r"_pb2(_grpc)?\.py$")

#: Third-party modules that each part of the tree may import.
LIBRARIES: dict[str, set[str]] = {
    "ipc": {"msgspec", "google", "grpc", "grpc_tools", "wsproto", "yaml"},
    "supervisor": {"msgspec", "setproctitle", "daemon"},
    "supervisor.cli": {"msgspec", "yaml", "psutil", "grpc", "google", "rich", "daemon", "wsproto"},
    "workers.cri": {"msgspec", "grpc", "google"},
    "workers.image": {"msgspec", "setproctitle", "urllib3"},
    "workers.storage": {"msgspec", "setproctitle", "zstandard", "yaml"},
    "workers.network": {"msgspec"},
    "workers.monitor": {"msgspec"},
    "workers.stream": {"msgspec", "h11", "wsproto"},
    "workers.ops": {"msgspec", "prometheus_client"},
    "workers.nri": {"msgspec", "google"},
    "workers": {"msgspec"},
}

#: What the supervisor must never load, for it is single-threaded and parses nothing from a network.
FORBIDDEN_IN_SUPERVISOR = {
    "grpc", "asyncio", "ssl", "http", "urllib3", "threading", "concurrent", "multiprocessing", "queue",
}  # fmt: skip
CLIENT = re.compile(r"supervisor/cli/bulkheadctl|supervisor/cli/ctl")

#: The files that may fork, and those that may use ctypes or change identity.
MAY_FORK = {
    "supervisor/spawn.py", "supervisor/podinit.py", "workers/jobs.py", "workers/monitor/keeper.py",
    "workers/monitor/runtime.py", "workers/network/plugin.py", "workers/nri/launch.py",
    "workers/image/verifier.py",
}  # fmt: skip
MAY_CTYPES = {"ipc/kernel.py", "ipc/confine.py"}
MAY_SETID = {"ipc/confine.py", "supervisor/podinit.py"}
SETID = {"setuid", "setgid", "setresuid", "setresgid", "setreuid", "setregid", "setgroups", "initgroups"}
FORKS = {"fork", "bare_fork", "forkpty", "posix_spawn", "posix_spawnp"}

#: Files over 600 lines and the reason.
LONG: dict[str, str] = {}


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if not GENERATED.search(path.name):
                yield path


SOURCES = list(sources())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def owner(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return (
        "workers"
        if parts[0] == "workers" and len(parts) == 2
        else ".".join(parts[: 1 + (parts[0] == "workers")])
    )


def attributes(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_imports_only_what_its_place_allows(path: Path) -> None:
    mine = owner(path)
    for name in imports(path):
        top = name.split(".")[0]
        if top in PACKAGES:
            assert may_import(mine, name), f"{name_of(path)} imports {name}"
        elif top not in sys.stdlib_module_names:
            allowed = LIBRARIES["supervisor.cli" if "supervisor/cli/" in name_of(path) else mine]
            assert top in allowed, f"{name_of(path)} imports {top}"


def may_import(mine: str, name: str) -> bool:
    if name.split(".", maxsplit=1)[0] == "ipc" or name == "workers":
        return True
    if name.startswith(("workers.boot", "workers.jobs")):
        return mine.startswith("workers")
    return name == mine or name.startswith(mine + ".")


@pytest.mark.parametrize("path", [p for p in SOURCES if owner(p) == "supervisor"], ids=name_of)
def test_the_supervisor_never_imports_threads_grpc_or_a_network_library(path: Path) -> None:
    if CLIENT.search(str(path)):
        return
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & FORBIDDEN_IN_SUPERVISOR


def test_the_running_supervisor_has_loaded_none_of_them() -> None:
    code = (
        "import sys, supervisor.__main__, importlib\n"
        "from supervisor.cli.bulkhead import parser\n"
        "parser().parse_args(['serve'])\n"
        "from supervisor import server, table\n"
        "[importlib.import_module(e.module) for e in table.TABLE.values() if e.preload]\n"
        "import workers.boot\n"
        "print(' '.join(sorted(sys.modules)))"
    )
    import subprocess

    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    loaded = {name.split(".")[0] for name in out}
    assert not loaded & FORBIDDEN_IN_SUPERVISOR
    # Every process has what the supervisor has: these are for its commands alone, and megabytes.
    assert not loaded & {"google", "rich", "yaml", "zstandard", "shutil", "bz2", "lzma"}


@pytest.mark.parametrize("kind", ["cri"])
def test_a_worker_loads_without_what_its_entry_forbids(kind: str) -> None:
    code = (
        "import sys, importlib\n"
        "from supervisor import spawn, table\n"
        f"entry = table.TABLE[{kind!r}]\n"
        "spawn.do_without(entry.without)\n"
        "importlib.import_module(entry.module)\n"
        "assert entry.without\n"
        "print(' '.join(name for name, module in sys.modules.items() if module is not None))"
    )
    import subprocess

    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "grpc.aio" in out
    assert not {"ssl", "_ssl", "_hashlib"} & set(out), "OpenSSL is loaded"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_fork_ctypes_and_set_id_stand_only_where_they_belong(path: Path) -> None:
    name = name_of(path)
    sandbox = name.startswith("supervisor/sandbox/")
    used = {attribute for module, attribute in attributes(path) if module == "os"}
    assert not used & FORKS or name in MAY_FORK
    assert not used & SETID or name in MAY_SETID or sandbox
    assert "ctypes" not in imports(path) or name in MAY_CTYPES or sandbox


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_where_it_runs(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{name_of(path)} has no docstring"
    assert docstring.startswith("Runs in:"), f"{name_of(path)} does not begin with 'Runs in:'"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_over_600_lines_without_a_reason(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600 or name_of(path) in LONG


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if name_of(p).startswith("workers/") and p.name != "main.py"], ids=name_of
)
def test_tables_of_handlers_stand_only_in_main(path: Path) -> None:
    if name_of(path) == "workers/boot.py":
        return  # the control channel, the same for all
    called = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
    assert "Handler" not in called


def test_every_request_is_answered_in_its_owners_table_and_nowhere_else() -> None:
    for owner_name in ("cri", "image", "storage", "network", "monitor", "stream", "nri"):
        module = importlib.import_module(f"ipc.messages.{owner_name}")
        text = (ROOT / "workers" / owner_name / "main.py").read_text()
        requests = {
            name
            for name, cls in vars(module).items()
            if isinstance(cls, type) and getattr(cls, "NAME", "").startswith(f"{owner_name}.")
        }
        rows = set(re.findall(r"Handler\(\s*(?:\w+\.)?(\w+),", text))
        assert rows == requests, owner_name
