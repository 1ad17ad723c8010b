"""Runs in: every process (types only). Owner: stream. Caller: root (bulkheadctl)."""

from __future__ import annotations

from . import Body, Request, request


class StreamInfo(Body):
    sessions: int  # exec, attach and port-forward sessions that are open


@request("stream.info.get", reply=StreamInfo, idempotent=True)
class InfoGet(Request[StreamInfo]):
    """How many sessions there are."""
