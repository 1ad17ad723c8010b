"""A virtual machine that does not end by itself is ended, and nothing of it is left."""

from __future__ import annotations

import glob
from pathlib import Path

from tests.support import vm


def _machines() -> set[str]:
    found = set()
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            words = Path(path).read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"linux.uml"):
            found.add(path)
    return found


def test_a_machine_past_its_time_is_gone(tmp_path: Path) -> None:
    machines, files = _machines(), set(glob.glob("/dev/shm/bh-vm-*") + glob.glob("/tmp/bh-vm-*"))
    outcome = vm.run("sleep 1000", tmp_path, 3)
    assert outcome.exit_code is None
    assert 3 <= outcome.seconds < 13
    assert _machines() <= machines
    assert set(glob.glob("/dev/shm/bh-vm-*") + glob.glob("/tmp/bh-vm-*")) <= files
