"""Runs in: every process (types only). Owner: cri. Callers: ops (read only), and stream for its sessions."""

from __future__ import annotations

from . import Body, Request, request
from .checking import Finding, Known
from .monitor import SessionOpened


class LayerState(Body):
    digest: str
    bytes_total: int
    bytes_done: int


class PullState(Body):
    reference: str
    started_at_ns: int
    bytes_total: int
    bytes_done: int
    layers: int
    layers_done: int
    parts: list[LayerState] = []


class RpcCount(Body):
    """Counters of one RPC: calls ended, of those failed, seconds spent, and a histogram of seconds."""

    name: str
    total: int
    errors: int
    seconds: float
    buckets: list[int] = []  # cumulative, by RPC_BUCKETS


#: Upper bounds (seconds) of the latency histogram's buckets; the last, +Inf, is `total`.
RPC_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ContainerCount(Body):
    """What happened to a pod's container of that name, all its attempts that are still there together."""

    namespace: str
    pod: str
    container: str
    oom_kills: int = 0
    log_bytes_dropped: int = 0
    log_bytes_unsure: int = 0  # may be missing, at most: monitors died


class CriInfo(Body):
    pods: dict[str, int]  # state -> count
    containers: dict[str, int]
    pulls: list[PullState]
    rpcs: list[RpcCount]
    pulls_succeeded: int = 0
    pulls_failed: int = 0
    pull_failures: dict[str, int] = {}  # by the error's code
    pull_seconds: float = 0.0  # of all that ended
    pulled_bytes: int = 0  # of layers as they came over the network
    layers: dict[str, int] = {}  # "fetched" or "present" -> count
    operations: int = 0  # that change state and are under way
    counts: list[ContainerCount] = []  # containers of which there is nothing to tell are left out
    oom_kills: int = 0  # of all containers there ever were, since this cri began
    log_bytes_dropped: int = 0  # as oom_kills
    log_bytes_unsure: int = 0  # as oom_kills
    events_sent: int = 0
    events_dropped: int = 0
    event_clients: int = 0


@request("cri.info.get", reply=CriInfo, idempotent=True)
class InfoGet(Request[CriInfo]):
    """Counts for /metrics and /info; never names of secrets, never more than numbers and references."""


class ContainerFacts(Body):
    """What is known of a container; no environment, for that may hold secrets."""

    id: str
    name: str
    attempt: int
    state: str
    pod_id: str
    pod_name: str
    pod_namespace: str
    pod_uid: str
    image: str
    image_id: str
    pid: int = 0
    created_at_ns: int = 0
    started_at_ns: int = 0
    finished_at_ns: int = 0
    exit_code: int = 0
    log_path: str = ""
    cgroup: str = ""
    ip_addresses: list[str] = []
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


@request("cri.container.get", reply=ContainerFacts, idempotent=True)
class ContainerGet(Request[ContainerFacts]):
    """One container, by its id or the beginning of it. NOT_FOUND if there is none, or more than one."""

    id: str


# -- sessions of stream -----------------------------------------------------------------------------------


class Redeemed(Body):
    """What a token was given for. `session` names it from now on; it is as secret as the token was."""

    session: str
    pod_id: str
    pod_uid: str = ""  # for texts
    container_id: str = ""  # "" for port-forward
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False
    ports: list[int] = []  # of a port-forward over WebSocket


@request("cri.token.redeem", reply=Redeemed, idempotent=False)
class TokenRedeem(Request[Redeemed]):
    """Use up a token. Nothing starts yet: the client has yet to open its streams.

    NOT_FOUND if it is unknown, used, too old or for another kind.
    """

    token: str
    kind: str  # "exec", "attach", "portforward"


@request("cri.session.open", reply=SessionOpened, idempotent=False)
class SessionOpen(Request[SessionOpened]):
    """Start the exec, attach, or connect to a port of the pod (once for each connection that is forwarded).

    The reply's descriptors are those of monitor.SessionOpened, or one that is named `socket`: connected, for
    port-forward. NOT_FOUND if there is no such session. For port-forward a session is good as long as its
    pod is ready, whatever happens to cri meanwhile.
    """

    session: str
    port: int = 0


# -- checks ------------------------------------------------------------------------------------------------


class StateChecked(Body):
    """Who is supposed to be there, and what is wrong with the state itself."""

    known: Known
    findings: list[Finding] = []


@request("cri.state.check", reply=StateChecked, idempotent=True)
class StateCheck(Request[StateChecked]):
    """Look at the state's file and what stands beside it. With `repair`, mend what can be mended here."""

    repair: bool = False
