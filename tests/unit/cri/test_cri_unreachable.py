"""What could not be asked of a monitor says why: the container has ended, or the runtime is at fault."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ipc.errors import Code, RemoteError, unavailable
from ipc.messages.monitor import ExitRecord
from workers.cri.containers import Containers

RECORD = ExitRecord(container_id="c", exit_code=0)


@pytest.mark.parametrize(
    ("record", "error", "code"),
    [
        (RECORD, unavailable("cannot reach ctl.sock"), Code.FAILED_PRECONDITION),
        (None, unavailable("cannot reach ctl.sock"), Code.UNAVAILABLE),
        (RECORD, RemoteError(Code.DEADLINE_EXCEEDED, "late"), Code.DEADLINE_EXCEEDED),
    ],
)
def test_a_monitor_that_cannot_be_reached_is_told_for_what_it_is(
    record: ExitRecord | None, error: RemoteError, code: Code
) -> None:
    containers: Any = Containers.__new__(Containers)
    containers._watcher = SimpleNamespace(read_record=lambda _id: record)
    assert containers.why_unreachable(SimpleNamespace(id="c"), error).code is code
