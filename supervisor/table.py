"""Runs in: the supervisor.

The process table: one entry per kind of process, and everything that is particular to it. Spawn, restart
policy, sockets, cgroups, status and docs/process-model.md all read it; nothing about a kind of worker stands
anywhere else in the supervisor.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from supervisor.sandbox.spec import (
    DEVICES,
    NAME_SERVICE,
    NETWORK_CAPABILITIES,
    STORAGE_CAPABILITIES,
    TRUST,
    WORKER_LIMITS,
    Bind,
    Sandbox,
)

MIB = 1 << 20
ROOT_USER = "root"


class Restart(enum.StrEnum):
    """What follows a death. All but NEVER go through supervisor/policy.py."""

    ALWAYS = "always"  # at once, then with growing delays
    DEMAND = "on demand"  # with the next connection, after the same delays
    NEVER = "never"


class Exchange(enum.StrEnum):
    """How a worker makes room for its successor when the program is upgraded in place."""

    OVERLAP = "overlap"  # the new one serves, then the old one ends what it has begun
    STANDBY = "standby"  # the new one waits for the old one's end: what they own has one owner
    HANDOVER = "handover"  # as STANDBY, but the old one lets go and then passes on what it is still asked
    RESTART = "restart"  # the old one ends, then the new one starts


@dataclass(frozen=True)
class Limits:
    """cgroup limits of a kind, all its processes together: bytes, tasks, weight (100 is everybody's)."""

    memory: int
    pids: int
    cpu_weight: int = 100


@dataclass(frozen=True)
class Entry:
    """One kind of process.

    `module` has `prepare` and `run` (workers/boot.py). `user` is a key of [users], or root. `minimum` and
    `maximum` count processes; a pool's maximum may be configured ([pools]). `recycle` ends a worker in order
    after so many served requests, 0 never. `network`: whose bytes it reads from a network, ""
    if nobody's. `callers` may connect to `<run_root>/ipc/<kind>.sock`. `extra`
    names further listening sockets (supervisor/sockets.py binds them). `preload`: the module is imported
    before the fork and shared. `without`: modules that cannot be imported in it, however much a library would
    like to. `stop_order`: low numbers are told to stop first. `drains`: what it has begun outlives its being
    told to stop, and the supervisor (supervisor/drains.py). `exchange`: how an upgrade replaces it. Life and
    limits of the rest are in `sandbox` and `limits`; None means those of the supervisor.
    """

    kind: str
    purpose: str
    module: str = ""
    user: str = ROOT_USER
    minimum: int = 1
    maximum: int = 1
    restart: Restart = Restart.ALWAYS
    recycle: int = 0
    network: str = ""
    callers: frozenset[str] = frozenset()
    sandbox: Sandbox | None = None
    limits: Limits | None = None
    extra: tuple[str, ...] = ()
    preload: bool = False
    without: frozenset[str] = frozenset()
    stop_order: int = 0
    drains: bool = False
    exchange: Exchange = Exchange.OVERLAP

    @property
    def on_demand(self) -> bool:
        """True if the first connection starts it."""
        return self.restart is Restart.DEMAND

    @property
    def is_worker(self) -> bool:
        """True for what the supervisor keeps running; nursery, monitors and inits are started by request."""
        return self.restart is not Restart.NEVER


Table = Mapping[str, Entry]


def by_kind(*entries: Entry) -> Table:
    """Return the entries by kind. Raises ValueError if a kind comes twice."""
    table = {entry.kind: entry for entry in entries}
    if len(table) != len(entries):
        raise ValueError("a kind is in the process table twice")
    return table


_LOG = Bind("{run_root}/ipc/log.sock", optional=True, why="a log line after the sink was made anew")

TABLE: Table = by_kind(
    Entry(
        kind="storage",
        purpose="layers, images, root file systems, files of a pod",
        module="workers.storage.main",
        callers=frozenset({"cri"}),
        preload=True,
        sandbox=Sandbox(
            namespaces=frozenset({"net", "ipc", "uts"}),
            seccomp="storage",
            oom_score_adj=-900,
            landlock=False,  # a process in Landlock can no longer mount
            capabilities=STORAGE_CAPABILITIES,
            rlimits={"CORE": 0, "NOFILE": 65536},
        ),
        limits=Limits(memory=2048 * MIB, pids=512),
        stop_order=3,
        exchange=Exchange.STANDBY,
    ),
    Entry(
        kind="network",
        purpose="namespaces, CNI plugins, host ports",
        module="workers.network.main",
        callers=frozenset({"cri"}),
        preload=True,
        sandbox=Sandbox(
            namespaces=frozenset({"ipc"}),
            seccomp="network",
            oom_score_adj=-900,
            landlock=False,  # it mounts namespaces
            capabilities=NETWORK_CAPABILITIES,
            rlimits={"CORE": 0, "NOFILE": 4096},
        ),
        limits=Limits(memory=1024 * MIB, pids=1024),
        stop_order=3,
        exchange=Exchange.STANDBY,
    ),
    Entry(
        kind="cri",
        purpose="gRPC front, state of pods and containers",
        module="workers.cri.main",
        user="cri",
        callers=frozenset({"stream", "ops"}),
        without=frozenset({"ssl"}),  # asyncio takes it if it is there: 2.5 MB, for one without a network
        sandbox=Sandbox(
            namespaces=frozenset({"net", "mnt", "ipc", "uts"}),
            seccomp="cri",
            oom_score_adj=-900,
            view=(
                *DEVICES,
                Bind("{run_root}/ipc", why="the sockets of those it calls"),
                Bind("{run_root}/monitors", why="ctl.sock of monitors, exit records"),
                Bind("{run_root}/cri", writable=True, why="its database"),
                Bind(
                    "{bind_directory}",
                    writable=True,
                    why="where gRPC binds, before the supervisor renames the socket",
                ),
                Bind("/proc", why="network statistics of pods"),
                Bind(
                    "/sys/fs/cgroup",
                    tree=True,
                    why="statistics of containers; cgroup v1 has a mount per controller",
                ),
            ),
            rlimits={**WORKER_LIMITS, "NOFILE": 65536},
        ),
        limits=Limits(memory=1024 * MIB, pids=256, cpu_weight=200),
        stop_order=1,
        exchange=Exchange.HANDOVER,
    ),
    Entry(
        kind="image",
        purpose="registry client",
        network="registries, signature stores",
        module="workers.image.main",
        user="image",
        minimum=0,
        maximum=2,
        restart=Restart.DEMAND,
        recycle=1000,
        callers=frozenset({"cri"}),
        sandbox=Sandbox(
            namespaces=frozenset({"mnt", "ipc", "uts", "cgroup"}),
            seccomp="image",
            tcp=frozenset({"connect"}),
            oom_score_adj=-500,
            view=(
                *DEVICES,
                *NAME_SERVICE,
                *TRUST,
                _LOG,
                Bind("{registries_conf}", optional=True, why="its configuration"),
                Bind("{registries_conf_dir}", optional=True, why="its configuration"),
                Bind("{certs_dirs}", optional=True, why="its configuration"),
                Bind("{auth_file}", optional=True, why="its configuration"),
                Bind(
                    "{signatures}",
                    optional=True,
                    why="signatures in local directories, if the policy needs them",
                ),
            ),
            rlimits=WORKER_LIMITS,
        ),
        limits=Limits(memory=512 * MIB, pids=256),
        stop_order=2,
    ),
    Entry(
        kind="stream",
        purpose="exec, attach, port-forward over HTTP",
        network="kubelets",
        module="workers.stream.main",
        user="stream",
        minimum=0,
        restart=Restart.DEMAND,
        sandbox=Sandbox(
            namespaces=frozenset({"mnt", "ipc", "uts", "cgroup"}),
            seccomp="stream",
            tcp=frozenset({"bind"}),
            oom_score_adj=-500,
            # the directory, not cri.sock: sessions outlive the supervisor, and its successor binds anew
            view=(
                *DEVICES,
                Bind(
                    "{run_root}/ipc", why="cri; sessions outlive the supervisor, whose successor binds anew"
                ),
                Bind("{stream_tls}", optional=True, why="it sees that its TLS files changed"),
            ),
            rlimits={**WORKER_LIMITS, "NOFILE": 16384},
            parent_death_signal=False,
        ),
        limits=Limits(memory=512 * MIB, pids=256),
        extra=("http",),
        stop_order=2,
        drains=True,
    ),
    Entry(
        kind="ops",
        purpose="/metrics, /workers, /info",
        network="scrapers, where `[ops]` listens on TCP",
        module="workers.ops.main",
        user="ops",
        minimum=0,
        restart=Restart.DEMAND,
        sandbox=Sandbox(
            namespaces=frozenset({"net", "mnt", "ipc", "uts"}),
            seccomp="ops",
            oom_score_adj=0,
            view=(
                *DEVICES,
                Bind("{run_root}/ipc/cri.sock", why="the one it may call"),
                Bind("{run_root}/ipc/supervisor.sock", why="the list of workers"),
                _LOG,
                Bind("/proc", why="memory and CPU time of our processes"),
                Bind("{ops_tls}", optional=True, why="it sees that its TLS files changed"),
            ),
            rlimits={**WORKER_LIMITS, "NOFILE": 1024},
        ),
        limits=Limits(memory=256 * MIB, pids=64, cpu_weight=50),
        extra=("http", "https"),  # TCP too comes from outside its empty network namespace
        stop_order=2,
    ),
    Entry(
        kind="nri",
        purpose="node resource plugins",
        module="workers.nri.main",
        user="nri",
        minimum=0,  # one, where plugins are installed or a validator is configured
        restart=Restart.DEMAND,
        callers=frozenset({"cri"}),
        sandbox=Sandbox(
            namespaces=frozenset({"net", "mnt", "ipc", "uts"}),
            seccomp="nri",
            oom_score_adj=-500,
            view=(*DEVICES, _LOG),
            rlimits={**WORKER_LIMITS, "NOFILE": 1024},
        ),
        limits=Limits(memory=1024 * MIB, pids=1024),  # with the plugins that are installed
        extra=("plugins",),
        stop_order=2,
        exchange=Exchange.RESTART,  # installed plugins are its children, and there is one of each
    ),
    Entry(
        kind="nursery",
        purpose="forks monitors and inits and does nothing else, so that they share its pages",
        minimum=0,
        restart=Restart.NEVER,  # but by the next of them that is wanted (supervisor/nursery.py)
    ),
    Entry(
        kind="monitor",
        purpose="one per container: OCI runtime, log, exit record; outlives everybody else",
        module="workers.monitor.main",
        minimum=0,
        maximum=0,
        restart=Restart.NEVER,
        callers=frozenset({"cri"}),
        preload=True,  # hundreds of them share one set of pages
    ),
    Entry(
        kind="init",
        purpose="one per pod with a PID namespace of its own: reaps and waits",
        user="init",
        minimum=0,
        maximum=0,
        restart=Restart.NEVER,
    ),
)

#: Who may ask the supervisor itself, at `<run_root>/ipc/supervisor.sock`.
SUPERVISOR_CALLERS = frozenset({"cri", "ops", "root"})
