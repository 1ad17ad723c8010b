"""Runs in: every process.

What each worker is told of the configuration: its own part and no more. The supervisor reads and checks
the files (supervisor/config.py) and makes these; each child keeps only its own after the fork.
Paths are absolute, times are seconds unless the name says otherwise.
"""

from __future__ import annotations

import msgspec

from ipc.messages import Body
from ipc.trust import Trust

#: Groups of CRI's metrics that can be chosen (workers/cri/stats/descriptors.py).
POD_METRICS = (
    "cpu",
    "memory",
    "disk",
    "diskIO",
    "network",
    "hugetlb",
    "process",
    "spec",
    "oom",
    "pressure",
)


class Runtime(Body):
    """One OCI runtime handler (`[runtimes.NAME]`)."""

    name: str
    path: str
    root: str  # the runtime's --root
    args: list[str] = []
    allowed_annotations: list[str] = []


class Common(Body):
    """What every worker knows."""

    root: str  # persistent state
    run_root: str  # state of this boot
    log_level: str = "info"
    #: who is who: uid of a peer (SO_PEERCRED) -> kind. 0 is "root": supervisor, storage, network,
    #: monitors, bulkheadctl.
    uids: dict[int, str] = {}

    def ipc_socket(self, kind: str) -> str:
        """Path of the listening socket of a worker kind."""
        return f"{self.run_root}/ipc/{kind}.sock"

    def monitor_directory(self, container_id: str) -> str:
        """Directory of a container's monitor."""
        return f"{self.run_root}/monitors/{container_id}"


class CriSettings(Common):
    listen: str = ""  # the public path; `bind_directory` is where cri itself binds
    bind_directory: str = ""
    stream_url: str = ""  # what the URLs of Exec, Attach and PortForward begin with
    runtimes: list[Runtime] = []
    default_runtime: str = ""
    cgroup_driver: str = "cgroupfs"
    default_cgroup_parent: str = ""
    pause_image: str = ""
    pinned_images: list[str] = []
    policy_namespaces: list[str] = []  # whose pods have a signature policy of their own
    default_capabilities: list[str] = []
    default_env: list[str] = []
    default_sysctls: dict[str, str] = {}
    default_ulimits: list[str] = []
    apparmor_profile: str = ""
    container_create_timeout: float = 240.0
    pod_setup_timeout: float = 300.0
    stop_timeout: float = 30.0
    pull_idle_timeout: float = 60.0
    parallel_layers: int = 3
    max_message_bytes: int = 80 * 1024 * 1024
    max_connection_age: float = 60.0
    max_requests: int = 256
    pod_metrics: list[str] = []  # groups of CRI's metrics that are told
    nri: bool = False  # there may be plugins
    nri_needed: bool = False  # nothing is made before those that are pre-installed are there
    nri_worker: int = 0  # pid of the worker that runs, 0 for none


class ImageSettings(Common):
    registries_conf: str = "/etc/containers/registries.conf"
    registries_conf_dir: str = "/etc/containers/registries.conf.d"
    certs_dirs: list[str] = msgspec.field(
        default_factory=lambda: ["/etc/containers/certs.d", "/etc/docker/certs.d"]
    )
    auth_file: str = ""
    trust: Trust = Trust()
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    max_manifest_bytes: int = 4 * 1024 * 1024
    max_config_bytes: int = 8 * 1024 * 1024
    retries: int = 5
    idle_exit: float = 60.0


class StorageSettings(Common):
    unpack_max_entries: int = 1_000_000
    unpack_max_bytes: int = 64 * 1024**3
    unpack_max_ratio: int = 1000
    unpack_timeout: float = 3600.0
    unpack_uid: int = 0
    mount_source_timeout: float = 30.0
    cdi_spec_dirs: list[str] = []
    hooks_dirs: list[str] = []


class NetworkSettings(Common):
    conf_dir: str = "/etc/cni/net.d"
    bin_dirs: list[str] = msgspec.field(default_factory=lambda: ["/opt/cni/bin", "/usr/lib/cni"])
    cache_dir: str = ""  # "" = <run_root>/net
    setup_timeout: float = 240.0
    teardown_timeout: float = 60.0
    default_network: str = ""


class MonitorSettings(Common):
    log_buffer: int = 256 * 1024
    cri_gid: int = 0  # group that may connect to ctl.sock
    sealed: list[str] = []  # programs of OCI runtimes that are executed from sealed memory


class StreamSettings(Common):
    tls_cert: str = ""  # PEM, with its chain; "" = no TLS
    tls_key: str = ""
    tls_client_ca: str = ""  # PEM; "" = clients need no certificate
    tls_min_version: str = "1.2"  # or 1.3
    tls_ciphers: list[str] = []  # OpenSSL's names, of TLS 1.2; empty: OpenSSL's choice
    head_timeout: float = 10.0  # for the TLS handshake, and again for the request's head
    creation_timeout: float = 30.0  # for a client to open the streams of its session
    idle_timeout: float = 4 * 3600.0  # of a session on which nothing moves
    stall_timeout: float = 30.0  # of a forwarded connection that takes nothing and so holds up others
    max_connections: int = 1024
    max_streams: int = 256  # of one connection
    idle_exit: float = 60.0


class NriValidator(Body):
    """The default validator of adjustments; see docs/nri.md."""

    enable: bool = False
    reject_oci_hook_adjustment: bool = False
    reject_runtime_default_seccomp_adjustment: bool = False
    reject_unconfined_seccomp_adjustment: bool = False
    reject_custom_seccomp_adjustment: bool = False
    reject_namespace_adjustment: bool = False
    reject_sysctl_adjustment: bool = False
    required_plugins: list[str] = []
    tolerate_missing_annotation: str = ""


class NriSettings(Common):
    plugin_dir: str = ""  # of pre-installed plugins
    plugin_config_dir: str = ""
    registration_timeout: float = 5.0
    request_timeout: float = 2.0
    validator: NriValidator = msgspec.field(default_factory=NriValidator)
    needed: bool = False  # runs always: there are pre-installed plugins, or a validator
    idle_exit: float = 60.0


class OpsSettings(Common):
    listen: str = ""  # Unix socket of HTTP; bound by the supervisor, inherited
    address: str = ""  # of HTTPS, the same
    port: int = 0
    tls_cert: str = ""  # PEM, with its chain
    tls_key: str = ""
    tls_client_ca: str = ""  # PEM; "" = clients need no certificate
    tls_min_version: str = "1.2"  # or 1.3
    tls_ciphers: list[str] = []
    idle_exit: float = 60.0
