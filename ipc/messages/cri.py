"""Runs in: every process (types only). Owner: cri. Caller: ops (read only)."""

from __future__ import annotations

from . import Body, Request, request


class PullState(Body):
    reference: str
    started_at_ns: int
    bytes_total: int
    bytes_done: int
    layers: int
    layers_done: int


class RpcCount(Body):
    """Counters of one RPC: calls ended, of those failed, seconds spent, and a histogram of seconds."""

    name: str
    total: int
    errors: int
    seconds: float
    buckets: list[int] = []  # cumulative, by RPC_BUCKETS


#: Upper bounds (seconds) of the latency histogram's buckets; the last, +Inf, is `total`.
RPC_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class CriInfo(Body):
    pods: dict[str, int]  # state -> count
    containers: dict[str, int]
    pulls: list[PullState]
    rpcs: list[RpcCount]
    pulls_succeeded: int = 0
    pulls_failed: int = 0


@request("cri.info.get", reply=CriInfo, idempotent=True)
class InfoGet(Request[CriInfo]):
    """Counts for /metrics and /info; never names of secrets, never more than numbers and references."""
