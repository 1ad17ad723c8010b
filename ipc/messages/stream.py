"""Runs in: every process (types only).

Owner: stream; caller: root (bulkheadctl). What stream asks of cri to get its sessions stands in cri.py.
"""

from __future__ import annotations

from . import Body, Request, request


class SessionState(Body):
    """One session, for operators."""

    kind: str  # "exec", "attach", "portforward"
    transport: str  # "spdy", "websocket"
    protocol: str  # the subprotocol, "" for none
    pod_id: str
    container_id: str
    age_ms: int
    idle_ms: int
    bytes_in: int  # of the connection: from the client, and to it
    bytes_out: int


class StreamInfo(Body):
    sessions: int  # exec, attach and port-forward sessions that are open
    table: list[SessionState] = []
    connections: int = 0  # those that ask, and those of sessions


@request("stream.info.get", reply=StreamInfo, idempotent=True)
class InfoGet(Request[StreamInfo]):
    """Which sessions there are."""
