"""Runs in: every process (types only). The private socket pair between the supervisor and each worker.

The supervisor pings, stops and reloads; the worker says hello once with its sandbox report, and `cri`
tells where it bound its gRPC socket. Both ends are made before the fork, so nobody else can speak here.
"""

from __future__ import annotations

from . import Body, Empty, Request, request
from .supervisor import InFlight, JobState, SandboxReport


@request("control.worker.hello", idempotent=False)
class Hello(Request[Empty]):
    """Worker -> supervisor, once, after the sandbox is shut and before the first accept."""

    report: SandboxReport


@request("control.socket.bound", idempotent=False)
class SocketBound(Request[Empty]):
    """`cri` -> supervisor: my gRPC socket stands at this path; rename it into its public place."""

    path: str


@request("control.worker.drain", idempotent=True)
class Drain(Request[Empty]):
    """Worker -> supervisor: I accept no more and end with what I have begun; start another if one is needed.

    FAILED_PRECONDITION if the process table does not let this kind.
    """


@request("control.worker.begin", idempotent=True)
class Begin(Request[Empty]):
    """Supervisor -> worker that stands by: the one before you has let go of what you own. Open it, serve."""


@request("control.worker.handover", idempotent=True)
class HandOver(Request[Empty]):
    """Supervisor -> `cri`: your successor stands by, with its gRPC socket at this path. The answer says that
    the state is let go; from then on you only finish what you can and pass on what you are asked."""

    path: str


class Health(Body):
    requests: list[InFlight] = []
    doing: str = ""
    counters: dict[str, int] = {}
    jobs: list[JobState] = []  # of its children


@request("control.worker.ping", reply=Health, idempotent=True)
class Ping(Request[Health]):
    """Supervisor -> worker: answer from your loop, with what you are serving."""


@request("control.worker.stop", idempotent=True)
class Stop(Request[Empty]):
    """Supervisor -> worker: accept no more, finish or cancel what runs within `grace_ms`, exit 0."""

    grace_ms: int = 5000


@request("control.worker.reload", idempotent=True)
class Reload(Request[Empty]):
    """Supervisor -> worker: the configuration changed; here is your part of it (msgpack of your Settings)."""

    settings: bytes
