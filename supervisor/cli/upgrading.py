"""Runs in: the command line `bulkhead upgrade`.

Asks the running supervisor to execute the program that is installed now, waits until its workers are
exchanged, and says what came of it.
"""

from __future__ import annotations

import sys
import time

from ipc.blocking import Client
from ipc.errors import Code, RemoteError
from ipc.messages.supervisor import UpgradeBegin, UpgradeGet, UpgradeState
from supervisor.upgrade import UNSUPPORTED

DONE, FAILED, RESTART_HELPS = 0, 1, 3
ANSWER_TIMEOUT = 60.0
LOOK_AGAIN = 0.1


def upgrade(run_root: str, timeout: float) -> int:
    """Upgrade the instance; return the exit code."""
    path = f"{run_root}/ipc/supervisor.sock"
    until = time.monotonic() + timeout
    try:
        with Client(path, timeout=ANSWER_TIMEOUT) as client:
            begun = client.call(UpgradeBegin())
        state = _await_end(path, begun, until)
    except RemoteError as error:
        print(f"bulkhead: {error.text}", file=sys.stderr)
        unknown = error.code in {Code.UNIMPLEMENTED, Code.UNAVAILABLE} or error.reason == UNSUPPORTED
        return RESTART_HELPS if unknown else FAILED
    for fault in state.faults:
        print(f"bulkhead: {fault}", file=sys.stderr)
    if state.phase == "failed":
        return FAILED
    print(f"bulkhead: {state.before} is {state.after} now, without a restart")
    return DONE


def _await_end(path: str, begun: UpgradeState, until: float) -> UpgradeState:
    """Ask until it is over. Raises RemoteError, also when the time is."""
    state = begun
    while state.phase in {"trial", "exchange"}:
        if time.monotonic() > until:
            raise RemoteError(Code.DEADLINE_EXCEEDED, "the upgrade goes on; see `bulkheadctl workers`")
        time.sleep(LOOK_AGAIN)
        with Client(path, timeout=ANSWER_TIMEOUT) as client:
            state = client.call(UpgradeGet())
        if state.serial < begun.serial:
            raise RemoteError(Code.INTERNAL, "the supervisor ended during the upgrade and was started anew")
    return state
