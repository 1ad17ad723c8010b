"""Runs in: the tests, as a supervisor of its own: the real one with a table of fake workers.

`python -m tests.support.fake_supervisor` takes the arguments of `bulkhead serve`.
"""

from __future__ import annotations

import dataclasses
import sys

from supervisor import table
from supervisor.cli import bulkhead
from supervisor.sandbox.spec import STORAGE_CAPABILITIES, Sandbox

FAKE = "tests.support.fake_worker"


def fake_table() -> table.Table:
    """storage, cri, image (on demand) and ops (a pool) as in the real table, but open and fake."""
    entries = {
        kind: dataclasses.replace(entry, module=FAKE, sandbox=None, callers=frozenset(), preload=False)
        for kind, entry in table.TABLE.items()
        if kind in {"storage", "cri", "image", "network"}
    }
    # A sandbox that a fake fits in: only its report is looked at.
    loose = Sandbox(landlock=False, no_new_privs=True, capabilities=STORAGE_CAPABILITIES)
    entries["network"] = dataclasses.replace(entries["network"], sandbox=loose)
    entries["image"] = dataclasses.replace(entries["image"], recycle=20)
    entries["monitor"] = dataclasses.replace(table.TABLE["monitor"], module="tests.support.fake_monitor")
    entries["init"] = table.TABLE["init"]
    return entries


if __name__ == "__main__":
    sys.exit(bulkhead.main(["serve", *sys.argv[1:]], table=fake_table()))
