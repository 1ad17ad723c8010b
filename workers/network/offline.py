"""Runs in: `bulkhead check` and `bulkhead wipe`, which hold the instance's locks: no network worker lives.

Network without a socket, for as long as it takes to look, or to mend what was found.
"""

from __future__ import annotations

from ipc.messages.checking import Finding, Known
from ipc.settings import NetworkSettings
from workers.network import check
from workers.network.main import State, boot_id


def inspect(settings: NetworkSettings, known: Known, *, deep: bool) -> list[Finding]:
    """What is wrong; nothing is changed. There is nothing deeper to look at. Raises OSError."""
    del deep
    state = State(settings, boot_id())
    return check.inspect(state.current_places(), state.selection().network, known)


def mend(settings: NetworkSettings, known: Known, findings: list[Finding]) -> list[Finding]:
    """Mend what was found; each finding says what has become of it. Raises OSError."""
    state = State(settings, boot_id())
    return check.mend(state.current_places(), state.selection().network, known, findings)
