"""Runs in: every process (types only). Owner: the supervisor.

What `cri`, `ops` and `bulkheadctl` may ask the one privileged process: to start and forget monitors and
pod inits, to tell what it knows. Nothing here carries text from a network that it would have to parse.
"""

from __future__ import annotations

from . import Body, Empty, Request, request


class MonitorStarted(Body):
    pid: int


@request("supervisor.monitor.start", reply=MonitorStarted, idempotent=True)
class MonitorStart(Request[MonitorStarted]):
    """Fork the monitor of a container, or return the one that lives.

    The supervisor makes `<run_root>/monitors/<container_id>/` and the monitor has bound `ctl.sock` in it
    and holds `lock` when the reply is sent. FAILED_PRECONDITION if an exit record stands there already.
    """

    container_id: str
    pod_id: str
    cgroup_parent: str = ""


@request("supervisor.monitor.remove", idempotent=True)
class MonitorRemove(Request[Empty]):
    """Remove `<run_root>/monitors/<container_id>/`. FAILED_PRECONDITION while the monitor lives."""

    container_id: str


class MonitorState(Body):
    container_id: str
    alive: bool
    pid: int = 0
    successions: int = 0  # how often its monitor was replaced, as far as this supervisor knows


class MonitorsListed(Body):
    monitors: list[MonitorState]


@request("supervisor.monitor.list", reply=MonitorsListed, idempotent=True)
class MonitorList(Request[MonitorsListed]):
    """Every directory under `<run_root>/monitors/` and whether its lock is held; with an id, that one."""

    container_id: str = ""


class InitStarted(Body):
    pid: int
    pid_namespace: str  # path of the pinned namespace, <run_root>/ns/<pod_id>/pid


@request("supervisor.init.start", reply=InitStarted, idempotent=True)
class InitStart(Request[InitStarted]):
    """Start the built-in init of a pod that shares its PID namespace, and pin that namespace.

    The init is placed in `cgroup_parent` (CRI spelling, as in the pod's config) so that its cost is the
    pod's. With `user_namespace` it belongs to the one that network pinned for the pod: as its root, so that
    containers of the pod can mount /proc.
    """

    pod_id: str
    cgroup_parent: str = ""
    user_namespace: bool = False


@request("supervisor.init.stop", idempotent=True)
class InitStop(Request[Empty]):
    """Kill the pod's init (and with it every process of the namespace), unpin the namespace."""

    pod_id: str


class InitState(Body):
    pod_id: str
    alive: bool
    pid: int = 0


class InitsListed(Body):
    inits: list[InitState]


@request("supervisor.init.list", reply=InitsListed, idempotent=True)
class InitList(Request[InitsListed]):
    """Every pod init the supervisor knows."""


@request("supervisor.parent.note", idempotent=True)
class ParentNote(Request[Empty]):
    """A pod begins: remember what of its cgroup parent is missing, for the OCI runtime will make it.

    `cgroup_parent`: a path below every hierarchy's root. INVALID_ARGUMENT for one that leads elsewhere.
    """

    pod_id: str
    cgroup_parent: str


@request("supervisor.parent.release", idempotent=True)
class ParentRelease(Request[Empty]):
    """A pod has gone: remove what was missing of its parent, once no pod needs it and if it is empty."""

    pod_id: str


class ParentsListed(Body):
    pods: list[str]


@request("supervisor.parent.list", reply=ParentsListed, idempotent=True)
class ParentList(Request[ParentsListed]):
    """Every pod whose parent was noted and not released."""


class RuntimeInfo(Body):
    """What an OCI runtime says of itself (`features`); `known` is False where it has no such command."""

    name: str
    path: str
    version: str = ""
    known: bool = False
    recursive_read_only: bool = False
    idmap: bool = False
    oci_version_max: str = "1.0.2"
    default: bool = False
    user_namespaces: bool = False  # it joins one that is there; ids of mounts are storage's business


class HostInfo(Body):
    cgroup_version: int  # 1 or 2; 1 also for hybrid hosts whose controllers are in v1
    cgroup_driver: str  # "systemd" or "cgroupfs"
    cgroup_controllers: list[str]
    runtimes: list[RuntimeInfo]
    kernel: str
    boot_id: str
    seccomp: bool
    apparmor: bool
    selinux: bool
    swap: bool
    oom_score_floor: int  # the lowest oom_score_adj that this host lets us set
    capabilities: list[str]  # CAP_* that the supervisor itself has: no container can have more
    degraded: list[str]  # what the kernel or the host lacks, a sentence each


@request("supervisor.host.info", reply=HostInfo, idempotent=True)
class HostInfoGet(Request[HostInfo]):
    """Facts of the node that were probed at start."""


class InFlight(Body):
    """One request that a worker is serving: its type, its age, and what it is doing now."""

    type: str
    age_ms: int
    peer: str = ""
    doing: str = ""


class SandboxReport(Body):
    """What holds in a process after its sandbox shut: made there, checked by the supervisor."""

    uid: int
    gid: int
    groups: list[int] = []
    capabilities: list[str] = []  # effective, permitted, inheritable or ambient
    bounding: list[str] = []
    namespaces: list[str] = []  # new ones: "net", "mnt", "ipc", "uts", "cgroup"
    no_new_privs: bool = False
    seccomp: str = "off"  # or the name of the list
    landlock: int = 0  # ABI version in force, 0 = off
    rlimits: dict[str, int] = {}  # hard limits by name, without RLIMIT_
    oom_score_adj: int = 0
    degraded: list[str] = []  # "what: why", a sentence each


class JobState(Body):
    """What a child of a worker is doing. `killed`: in vain so far, it hangs in the kernel."""

    name: str
    pid: int
    doing: str = ""  # more of it than its name: a path, a plugin
    age_ms: int = 0  # that it is at that
    killed: bool = False


class WorkerState(Body):
    kind: str  # as in the process table; "supervisor" and "monitor" too
    name: str  # kind, or "monitor <id>"
    #: starting, ready, stopping, idle (on demand, none runs), backoff, failed; draining (it accepts no more
    #: and ends with its last session); ended (monitors and inits)
    state: str
    pid: int = 0
    started_at_ns: int = 0  # wall clock, for people
    restarts: int = 0
    uid: int = 0
    requests: list[InFlight] = []
    last_death: str = ""  # "signal 9 (SIGKILL) at 2026-01-01T00:00:00Z after 12 s"
    last_ping_ms: int = -1  # age of the last answered health ping
    doing: str = ""
    sandbox: SandboxReport | None = None
    queued: int = 0  # requests that it has taken and that wait for others to end
    release: str = ""  # what it was started from, as `bulkhead version --build` says it
    lagged: int = 0  # clients that the kind has let go, since they did not keep up with what they asked for
    jobs: list[JobState] = []  # of its children


class ConfigReloaded(Body):
    """What a reload did: keys with another value, keys that take a restart; or faults, and then nothing."""

    changed: list[str] = []
    refused: list[str] = []
    faults: list[str] = []


@request("supervisor.config.reload", reply=ConfigReloaded, idempotent=True)
class ConfigReload(Request[ConfigReloaded]):
    """Read the configuration anew, as SIGHUP does (bulkheadctl only)."""


class UpgradeState(Body):
    """An upgrade in place. `phase`: "none", "trial" (is the program that is installed now able to?),
    "exchange" (it runs; the workers are exchanged one after the other), "done", "failed" (see `faults`: what
    still runs is that of before)."""

    serial: int = 0  # counts the upgrades of this instance
    phase: str = "none"
    before: str = ""  # which build ran
    after: str = ""  # which build runs now
    exchanged: list[str] = []  # kinds of worker, in their order
    faults: list[str] = []


@request("supervisor.upgrade.begin", reply=UpgradeState, idempotent=True)
class UpgradeBegin(Request[UpgradeState]):
    """Execute the program that is installed now in place, and exchange the workers (`bulkhead upgrade` only).

    Answered when the trial is over and the program is about to be executed. FAILED_PRECONDITION says what
    speaks against it, and nothing has happened then. Asked again while one goes on, it is that one.
    """


@request("supervisor.upgrade.get", reply=UpgradeState, idempotent=True)
class UpgradeGet(Request[UpgradeState]):
    """How far the last upgrade is."""


class ConfigText(Body):
    text: str  # TOML


@request("supervisor.config.get", reply=ConfigText, idempotent=True)
class ConfigGet(Request[ConfigText]):
    """The configuration in force. There are no secrets in it, only names of files that have some."""


class WorkerStacks(Body):
    lines: list[str]


@request("supervisor.worker.dump", reply=WorkerStacks, idempotent=True)
class WorkerDump(Request[WorkerStacks]):
    """Where every thread of one kind's workers is just now (bulkheadctl only)."""

    kind: str


class WorkersListed(Body):
    workers: list[WorkerState]


@request("supervisor.worker.list", reply=WorkersListed, idempotent=True)
class WorkerList(Request[WorkersListed]):
    """Every process of the map, the supervisor first, monitors last. Memory and CPU are read by the asker."""


@request("supervisor.worker.restart", idempotent=False)
class WorkerRestart(Request[Empty]):
    """End one kind's workers in order and start them anew (bulkheadctl only)."""

    kind: str
