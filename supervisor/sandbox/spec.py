"""Runs in: the supervisor (as part of the process table), and every worker between fork and its first job.

What a sandbox is made of, as data: `supervisor/table.py` holds one `Sandbox` per kind, `enter` applies it
and `report` reads back what holds. This module only declares; it touches no kernel.

Paths are templates over the `paths` mapping that `enter` is given, so that several instances with
directories of their own share one table. Keys in use: `root`, `run_root`, `bind_directory`,
`registries_conf`, `registries_conf_dir`, `certs_dirs`, `auth_file`, `signatures`, `stream_tls`, `ops_tls`. A
value may name several paths, separated by ":": the entry then stands for each. An empty value drops the
entry.

The entries that the table is made of (see docs/sandbox.md for the reason of every line):

    from supervisor.sandbox.spec import DEVICES, NAME_SERVICE, TRUST, WORKER_LIMITS, Bind, Sandbox

    CRI = Sandbox(
        namespaces={"net", "mnt", "ipc", "uts"}, seccomp="cri", oom_score_adj=-900,
        view=(*DEVICES, Bind("{run_root}/ipc"), Bind("{run_root}/monitors"),
              Bind("{run_root}/cri", writable=True), Bind("{bind_directory}", writable=True),
              Bind("/proc"), Bind("/sys/fs/cgroup", tree=True)),
        rlimits={**WORKER_LIMITS, "NOFILE": 65536})
    IMAGE = Sandbox(
        namespaces={"mnt", "ipc", "uts", "cgroup"}, seccomp="image", tcp={"connect"}, oom_score_adj=-500,
        view=(*DEVICES, *NAME_SERVICE, *TRUST, Bind("{run_root}/ipc/log.sock", optional=True),
              Bind("{registries_conf}", optional=True), Bind("{registries_conf_dir}", optional=True),
              Bind("{certs_dirs}", optional=True), Bind("{auth_file}", optional=True),
              Bind("{signatures}", optional=True)),
        rlimits=WORKER_LIMITS)
    STREAM = Sandbox(
        namespaces={"mnt", "ipc", "uts", "cgroup"}, seccomp="stream", tcp={"bind"}, oom_score_adj=-500,
        view=(*DEVICES, Bind("{run_root}/ipc"), Bind("{stream_tls}", optional=True)),
        rlimits={**WORKER_LIMITS, "NOFILE": 16384}, parent_death_signal=False)
    OPS = Sandbox(
        namespaces={"net", "mnt", "ipc", "uts"}, seccomp="ops", oom_score_adj=0,
        view=(*DEVICES, Bind("{run_root}/ipc/cri.sock"), Bind("{run_root}/ipc/supervisor.sock"),
              Bind("{run_root}/ipc/log.sock", optional=True), Bind("/proc"),
              Bind("{ops_tls}", optional=True)),
        rlimits={**WORKER_LIMITS, "NOFILE": 1024})
    STORAGE = Sandbox(
        namespaces={"net", "ipc", "uts"}, seccomp="storage", oom_score_adj=-900, landlock=False,
        capabilities=STORAGE_CAPABILITIES, rlimits={"CORE": 0, "NOFILE": 65536})
    NETWORK = Sandbox(
        namespaces={"ipc"}, seccomp="network", oom_score_adj=-900, landlock=False,
        capabilities=NETWORK_CAPABILITIES, rlimits={"CORE": 0, "NOFILE": 4096})
    MONITOR = None  # nothing that a container would inherit
    INIT = None     # a pod's init goes its own way: empty root, no capabilities (supervisor/podinit)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bind:
    """One path of the host in a worker's mount view, seen at the same place, and its Landlock rule.

    `tree` takes the mounts below it along (cgroup v1 has one per controller); everything else is bound
    alone, so that no mount of the host is kept alive by a worker. `optional` paths may be absent;
    the absence of any other is an error. `why` is for docs/sandbox.md.
    """

    path: str
    writable: bool = False
    tree: bool = False
    optional: bool = False
    why: str = ""


@dataclass(frozen=True)
class Identity:
    """Who the worker is after the drop."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sandbox:
    """Everything that holds a worker in; the defaults are the strictest.

    `namespaces`: new ones out of "net", "mnt", "ipc", "uts", "cgroup". `view`: the paths of a root of its
    own, only with "mnt"; without it the host's mounts are seen. `landlock`: rules for the same paths, and
    `tcp`, out of "bind" and "connect", what they leave open of it.
    `capabilities`: kept, as bounding set too, without the CAP_ prefix. `seccomp`: name of a list in
    supervisor/sandbox/seccomp.py, "" = none. `rlimits`: soft and hard limit by name, without RLIMIT_.
    `oom_score_adj`: None leaves it as it is. `parent_death_signal`: SIGKILL when the supervisor dies.
    """

    namespaces: Collection[str] = frozenset()
    view: tuple[Bind, ...] = ()
    capabilities: frozenset[str] = frozenset()
    seccomp: str = ""
    landlock: bool = True
    tcp: Collection[str] = frozenset()
    no_new_privs: bool = True
    rlimits: Mapping[str, int] = field(default_factory=dict)
    oom_score_adj: int | None = None
    parent_death_signal: bool = True

    def __post_init__(self) -> None:
        if self.view and "mnt" not in self.namespaces:
            raise ValueError("a mount view needs a mount namespace of its own")


#: What Python and its libraries may open at any time.
DEVICES = (
    Bind("/dev/null", writable=True, why="Python and its libraries"),
    Bind("/dev/urandom", why="gRPC, OpenSSL"),
)

#: What getaddrinfo reads. Bound as they are at the start of the worker.
NAME_SERVICE = tuple(
    Bind(path, optional=True, why="host names")
    for path in (
        "/etc/resolv.conf",
        "/etc/hosts",
        "/etc/nsswitch.conf",
        "/etc/gai.conf",
        "/etc/host.conf",
        "/etc/services",
        "/etc/protocols",
    )
)

#: Certificate authorities, where the distributions keep them (Debian, Fedora and RHEL, SUSE, Alpine).
TRUST = tuple(
    Bind(path, optional=True, why="certificate authorities")
    for path in (
        "/etc/ssl/certs",
        "/etc/ssl/openssl.cnf",
        "/etc/ssl/ca-bundle.pem",
        "/etc/ssl/cert.pem",
        "/usr/lib/ssl",
        "/usr/share/ca-certificates",
        "/usr/local/share/ca-certificates",
        "/etc/pki/tls/certs",
        "/etc/pki/tls/cert.pem",
        "/etc/pki/tls/openssl.cnf",
        "/etc/pki/ca-trust/extracted",
        "/etc/crypto-policies",
        "/usr/share/crypto-policies",
        "/var/lib/ca-certificates",
        "/usr/share/pki/trust",
    )
)

#: Limits of a worker that never forks: no core files (they would hold credentials), few tasks, no queues.
WORKER_LIMITS: Mapping[str, int] = {
    "CORE": 0,
    "NOFILE": 4096,
    "NPROC": 512,
    "MEMLOCK": 0,
    "MSGQUEUE": 0,
    "FSIZE": 4 << 30,
}

#: Storage stays root, without what root is feared for: no NET_*, SYS_MODULE, SYS_PTRACE, SYS_RAWIO, SYS_BOOT.
#: An overlay mount keeps the capabilities of the process that mounted it: what a container copies up, it
#: copies up with these.
STORAGE_NEEDS: Mapping[str, str] = {
    "SYS_ADMIN": "mount overlayfs, trusted.overlay.* attributes, mount namespaces of unpack children",
    "SYS_CHROOT": "children enter a layer or an image root",
    "CHOWN": "numeric owners out of archives",
    "DAC_OVERRIDE": "directories that an image made unwritable for their owner",
    "FOWNER": "chmod and utimes on files of other owners",
    "FSETID": "setgid bits survive chown",
    "MKNOD": "device nodes and overlay whiteouts",
    "SETFCAP": "file capabilities out of archives",
    "SETUID": "children drop to unpack_uid",
    "SETGID": "children drop to unpack_uid",
    "SETPCAP": "children empty their own bounding set",
    "KILL": "end a child that dropped to another uid",
}
STORAGE_CAPABILITIES = frozenset(STORAGE_NEEDS)

#: Network stays root for what CNI plugins, children of it, need; tried with the reference plugins.
NETWORK_NEEDS: Mapping[str, str] = {
    "NET_ADMIN": "links, addresses, routes, netfilter, sysctls of a namespace",
    "NET_RAW": "iptables-legacy talks through a raw socket; address announcements",
    "SYS_ADMIN": "setns, pin namespaces with bind mounts",
    "DAC_OVERRIDE": "the tuning plugin makes its directory 0600, which then only this can enter",
    "SETUID": "mappings of a pod's user namespace",
    "SETGID": "mappings of a pod's user namespace",
}
NETWORK_CAPABILITIES = frozenset(NETWORK_NEEDS)
