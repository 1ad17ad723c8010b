"""docs/sandbox.md says what the table says, and who reads from a network holds no capability."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from ipc.messages.supervisor import SandboxReport
from supervisor.sandbox import page
from supervisor.sandbox.seccomp import LISTS
from supervisor.table import TABLE, Entry

WORKERS = list(page.WORKERS)
INTERNET = {int(socket.AF_INET), int(socket.AF_INET6)}


def test_the_page_is_as_the_table_is() -> None:
    text = page.PAGE.read_text()
    assert page.renewed(text) == text, "make it anew with python -m supervisor.sandbox.page --write"


@pytest.mark.parametrize("entry", WORKERS, ids=lambda entry: entry.kind)
def test_who_reads_from_a_network_holds_no_capability_and_nobody_else_makes_such_sockets(
    entry: Entry,
) -> None:
    """`network` alone, which runs plugins, may make any socket; what it reads is what plugins print."""
    assert entry.sandbox is not None
    if entry.network:
        assert entry.sandbox.capabilities == frozenset()
    checks = LISTS[entry.sandbox.seccomp].conditional.get("socket", ())
    families = {check[0].value for check in checks}
    assert not families & INTERNET or entry.network
    assert bool(checks) or entry.kind == "network"


@pytest.mark.parametrize("entry", WORKERS, ids=lambda entry: entry.kind)
def test_every_line_of_a_view_and_every_capability_has_its_reason(entry: Entry) -> None:
    assert entry.sandbox is not None
    assert all(bind.why for bind in entry.sandbox.view)
    needed = re.findall(rf"\| {entry.kind} \| `(\w+)` \| \S", page.capabilities())
    assert set(needed) == entry.sandbox.capabilities


def test_a_report_is_told_instead_of_what_is_declared() -> None:
    report = SandboxReport(uid=7, gid=8, capabilities=["CAP_KILL"], namespaces=["net"], seccomp="off")
    told = page.facts(TABLE["cri"], report)
    assert told["user"] == "7:8"
    assert told["capabilities"] == "KILL"
    assert told["new namespaces"] == "net"
    assert told["system calls"] == "off"
    assert told["no_new_privs"] == "not held"
    assert told["Landlock"].startswith("off, not ")
    assert told["limits"] == ""


def test_the_page_names_every_mark_once() -> None:
    text = Path(page.PAGE).read_text()
    assert all(text.count(f"generated: {name} -->") == 1 for name in page.PARTS)
