"""Runs in: the supervisor, and `bulkhead config`.

What can be configured: one dataclass per table of the TOML files, each key with its default, its meaning
and its check. Reading and merging files is supervisor/configfile.py; what each worker is told of it is
supervisor/settings.py. Times are seconds. Empty strings and lists mean "derived": see `Config.resolved`.
"""

# ruff: noqa: RUF009 - key() and table() return dataclass fields, which is what defaults are for

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ipc.capabilities import NAMES as CAPABILITIES
from ipc.settings import POD_METRICS
from supervisor.files import find_program

#: A check returns "" or what is wrong with the value, as the end of a sentence.
Check = Callable[[Any], str]

RUN_ROOT = "/run/bulkhead"
LARGEST = 2**53  # what a float still tells apart from its neighbours
LEVELS = ("debug", "info", "warning", "error")
CGROUP_MANAGERS = ("auto", "systemd", "cgroupfs")
RUNTIME_NAMES = ("crun", "runc")


def key(default: Any, doc: str, check: Check | None = None) -> Any:
    """Declare a key: its default, its meaning (one or two lines) and an optional check of its value."""
    metadata = {"doc": doc, "check": check}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def table(cls: type[Any], doc: str) -> Any:
    """Declare a sub-table."""
    return dataclasses.field(default_factory=cls, metadata={"doc": doc, "check": None})


def absolute(value: str) -> str:
    """Check: an absolute path without `..`."""
    if not value.startswith("/"):
        return "must be an absolute path"
    if not value.isprintable():
        return "must not contain control characters"
    return "must not contain '..'" if ".." in value.split("/") else ""


def absolute_or_empty(value: str) -> str:
    """Check: an absolute path, or nothing."""
    return absolute(value) if value else ""


def absolute_list(values: list[str]) -> str:
    """Check: every element is an absolute path."""
    return next((f"has {v!r}: it {absolute(v)}" for v in values if absolute(v)), "")


def ip_address(value: str) -> str:
    """Check: an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return "must be an IP address"
    return ""


def ip_address_or_empty(value: str) -> str:
    """Check: an IP address, or nothing."""
    return ip_address(value) if value else ""


def expression(value: str) -> str:
    """Check: a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        return f"is no regular expression: {error}"
    return ""


def one_of(*words: str) -> Check:
    """Check: one of these words."""
    return lambda value: "" if value in words else f"must be one of {', '.join(words)}"


def at_least(low: float) -> Check:
    """Check: not below `low`, and a number that can be counted with."""
    return lambda value: (
        "must be less" if value > LARGEST else "" if value >= low else f"must be at least {low}"
    )


def between(low: int, high: int) -> Check:
    """Check: in the closed interval."""
    return lambda value: "" if low <= value <= high else f"must be between {low} and {high}"


def matching(pattern: str, what: str) -> Check:
    """Check: every element of the list matches the whole pattern."""
    compiled = re.compile(pattern)
    return lambda values: next(
        (f"has {v!r}, which is not {what}" for v in values if not compiled.fullmatch(v)), ""
    )


def user(value: str | int) -> str:
    """Check: a user's name, a number above 0, or nothing."""
    if isinstance(value, int):
        return "" if 0 < value < 2**32 - 1 else "must be a uid above 0"
    return "" if re.fullmatch(r"|[A-Za-z_][A-Za-z0-9_.-]*\$?", value) else "must be a user name or a number"


def sysctls(values: dict[str, str]) -> str:
    """Check: every key is of a namespace that a pod can have; the kernel knows which values it takes."""
    wrong = next((name for name in values if not _SYSCTL.fullmatch(name)), "")
    return f"has {wrong!r}, which is not of a network or IPC namespace" if wrong else ""


def ulimits(values: list[str]) -> str:
    """Check: every element is name=soft:hard, of a limit that exists, the soft one not above the hard one."""
    return _ULIMIT_FORM(values) or next((f"has {v!r}: {_ulimit(v)}" for v in values if _ulimit(v)), "")


def _ulimit(text: str) -> str:
    name, _, numbers = text.partition("=")
    soft, _, hard = numbers.partition(":")
    if not hasattr(resource, f"RLIMIT_{name.upper()}"):
        return f"there is no limit {name}"
    return "the soft limit is above the hard one" if _amount(soft) > _amount(hard or soft) else ""


def _amount(text: str) -> int:
    """-1 means no limit, as to setrlimit(2)."""
    return int(text) % 2**64


_CAPABILITY = matching(rf"(CAP_)?({'|'.join(CAPABILITIES)})", "a capability's name")
_SYSCTL = re.compile(r"net[./][\w.*/-]+|kernel[./](shm|msg|sem)\w*|fs[./]mqueue[./]\w+")
_ENV = matching(r"[^=\0]+=[^\0]*", "of the form NAME=VALUE")
_ANNOTATION = matching(
    r"[A-Za-z0-9./_-]*\*|[A-Za-z0-9./_-]+", "an annotation's name, or its beginning and a *"
)
_CIPHER = matching(r"[A-Za-z0-9+!@=_-]+", "a cipher's name as OpenSSL spells it")
_ULIMIT_FORM = matching(r"[a-z]+=(-1|\d+)(:(-1|\d+))?", "of the form name=soft:hard")


@dataclass(frozen=True)
class RuntimeConfig:
    """`[runtimes.NAME]`: one OCI runtime handler."""

    path: str = key("", "Program; empty: NAME is looked up in the usual directories.", absolute_or_empty)
    root: str = key("", "The runtime's --root; empty: <run_root>/runtimes/NAME.", absolute_or_empty)
    args: list[str] = key([], "Global arguments, before the command.")
    allowed_annotations: list[str] = key(
        [], "Annotations of pods and containers that it is told: exact names, or foo/*.", _ANNOTATION
    )


@dataclass(frozen=True)
class CniConfig:
    conf_dir: str = key("/etc/cni/net.d", "Directory of network configurations.", absolute)
    bin_dirs: list[str] = key(
        ["/opt/cni/bin", "/usr/lib/cni"], "Directories of plugins, searched in order.", absolute_list
    )
    default_network: str = key("", "Name of the network to use; empty: the first file in lexical order.")
    cache_dir: str = key("", "Results and records; empty: <run_root>/net.", absolute_or_empty)


@dataclass(frozen=True)
class ImageConfig:
    registries_conf: str = key("/etc/containers/registries.conf", "registries.conf, version 2.", absolute)
    registries_conf_dir: str = key(
        "/etc/containers/registries.conf.d", "Its drop-in directory.", absolute_or_empty
    )
    certs_dirs: list[str] = key(
        ["/etc/containers/certs.d", "/etc/docker/certs.d"],
        "Directories with certificates per registry.",
        absolute_list,
    )
    auth_file: str = key(
        "", "Credentials (docker config.json) used when a request has none.", absolute_or_empty
    )
    policy: str = key(
        "/etc/containers/policy.json",
        "Signature policy (containers-policy.json); without this very file anything may be pulled, "
        "another one must be there.",
        absolute,
    )
    policy_dir: str = key(
        "/etc/bulkhead/policies",
        "NAMESPACE.json: policies for pods of a Kubernetes namespace.",
        absolute_or_empty,
    )
    registries_d: str = key(
        "/etc/containers/registries.d",
        "Where signatures are (containers-registries.d).",
        absolute_or_empty,
    )
    pause_image: str = key("", "Runs as each pod's sandbox container; empty: pods have and need none.")
    pinned_images: list[str] = key([], "Never removed by the kubelet: exact names, foo*, *foo*.")
    max_manifest_bytes: int = key(4 * 1024 * 1024, "Largest manifest that is read.", at_least(4096))
    max_config_bytes: int = key(8 * 1024 * 1024, "Largest image configuration that is read.", at_least(4096))
    retries: int = key(5, "How often a broken download is resumed.", between(0, 100))
    parallel_layers: int = key(3, "Layers of one image that are downloaded at the same time.", between(1, 64))


@dataclass(frozen=True)
class StorageConfig:
    unpack_max_entries: int = key(1_000_000, "Most entries of one layer.", at_least(1))
    unpack_max_bytes: int = key(64 * 1024**3, "Most bytes of one unpacked layer.", at_least(1))
    unpack_max_ratio: int = key(1000, "Most unpacked bytes per compressed byte (over 1 MiB).", at_least(1))
    unpack_uid: int = key(
        0, "User that unpacks; 0: root with the few capabilities unpacking needs.", at_least(0)
    )


@dataclass(frozen=True)
class PoolsConfig:
    image: int = key(2, "Most image workers at a time.", between(1, 64))
    stream: int = key(1, "Most stream workers at a time.", between(1, 64))


@dataclass(frozen=True)
class UsersConfig:
    cri: str | int = key("", "Empty: bulkhead-cri if there is such a user, else uid 64101.", user)
    image: str | int = key("", "Empty: bulkhead-image, else uid 64102.", user)
    stream: str | int = key("", "Empty: bulkhead-stream, else uid 64103.", user)
    ops: str | int = key("", "Empty: bulkhead-ops, else uid 64104.", user)
    init: str | int = key("", "Of pod inits. Empty: bulkhead-init, else uid 64105.", user)
    nri: str | int = key("", "Empty: bulkhead-nri, else uid 64106.", user)


@dataclass(frozen=True)
class TimeoutsConfig:
    container_create: float = key(240.0, "The OCI runtime's create.", at_least(1))
    container_stop: float = key(30.0, "How long a killed container may take to end.", at_least(0))
    pod_setup: float = key(300.0, "RunPodSandbox as a whole.", at_least(1))
    network_setup: float = key(240.0, "CNI ADD of all plugins.", at_least(1))
    network_teardown: float = key(60.0, "CNI DEL of all plugins.", at_least(1))
    mount_source: float = key(30.0, "Looking at a host path that a container mounts.", at_least(1))
    pull_idle: float = key(60.0, "A pull without progress.", at_least(1))
    unpack: float = key(3600.0, "Unpacking one layer.", at_least(1))
    registry_connect: float = key(10.0, "Connecting to a registry.", at_least(0.1))
    registry_read: float = key(30.0, "Waiting for bytes of a registry.", at_least(0.1))
    idle_exit: float = key(60.0, "An on-demand worker without work.", at_least(0.1))
    worker_start: float = key(60.0, "From fork to a worker's hello.", at_least(0.1))
    worker_stop: float = key(5.0, "Grace of a worker that is told to stop.", at_least(0))
    worker_answer: float = key(20.0, "A worker that answers no ping for so long is killed.", at_least(0.2))
    ping: float = key(5.0, "Between health pings.", at_least(0.1))
    slow: float = key(10.0, "Longer requests are logged with their stage; 0: never.", at_least(0))


@dataclass(frozen=True)
class RestartConfig:
    max_delay: float = key(30.0, "Longest wait before a worker is started again.", at_least(1))
    reset_after: float = key(300.0, "Ready for so long, a worker's past is forgotten.", at_least(0))
    failed_deaths: int = key(5, "So many deaths within failed_window mean FAILED.", at_least(2))
    failed_window: float = key(60.0, "See failed_deaths.", at_least(1))
    slow_retry: float = key(60.0, "Between tries of a FAILED worker.", at_least(1))


@dataclass(frozen=True)
class OpsConfig:
    listen: str = key(
        "", "Unix socket of /metrics, /workers, /info; empty: <run_root>/ops.sock.", absolute_or_empty
    )
    address: str = key(
        "", "IP address where the same is served with TLS; empty: nowhere.", ip_address_or_empty
    )
    port: int = key(9537, "Its TCP port.", between(1, 65535))
    tls_cert: str = key("", "Certificate with its chain, PEM; address needs it.", absolute_or_empty)
    tls_key: str = key("", "Its key, PEM; empty: it is in the certificate's file.", absolute_or_empty)
    tls_client_ca: str = key(
        "",
        "Authority of clients' certificates, PEM; empty: none are asked for, and only /metrics, /healthz and "
        "/readyz are answered.",
        absolute_or_empty,
    )
    tls_min_version: str = key("1.2", "1.2 or 1.3.", one_of("1.2", "1.3"))
    tls_ciphers: list[str] = key([], "Of TLS 1.2, OpenSSL's names; empty: OpenSSL's choice.", _CIPHER)


@dataclass(frozen=True)
class StreamConfig:
    address: str = key("127.0.0.1", "IP address where exec, attach and port-forward are served.", ip_address)
    port: int = key(0, "TCP port; 0: any that is free.", between(0, 65535))
    tls_cert: str = key("", "Certificate with its chain, PEM; empty: no TLS.", absolute_or_empty)
    tls_key: str = key("", "Its key, PEM; empty: it is in the certificate's file.", absolute_or_empty)
    tls_client_ca: str = key(
        "", "Authority of clients' certificates, PEM; empty: they need none.", absolute_or_empty
    )
    tls_min_version: str = key("1.2", "1.2 or 1.3.", one_of("1.2", "1.3"))
    tls_ciphers: list[str] = key([], "Of TLS 1.2, OpenSSL's names; empty: OpenSSL's choice.", _CIPHER)
    head_timeout: float = key(10.0, "For a TLS handshake, and again for a request.", at_least(0.1))
    creation_timeout: float = key(30.0, "For a client to open the streams of its session.", at_least(0.1))
    idle_timeout: float = key(4 * 3600.0, "A session on which nothing moves is ended.", at_least(1))
    stall_timeout: float = key(
        30.0, "A forwarded connection that takes nothing while others wait for it is ended.", at_least(0.1)
    )
    max_connections: int = key(1024, "Connections served at a time.", between(1, 8192))
    max_streams: int = key(256, "Streams of one connection.", between(8, 65536))


@dataclass(frozen=True)
class ContainersConfig:
    default_capabilities: list[str] = key(
        [
            "CHOWN",
            "DAC_OVERRIDE",
            "FSETID",
            "FOWNER",
            "SETGID",
            "SETUID",
            "SETPCAP",
            "NET_BIND_SERVICE",
            "KILL",
        ],
        "Capabilities of a container that asks for no others.",
        _CAPABILITY,
    )
    default_env: list[str] = key([], "NAME=VALUE; image and pod override it.", _ENV)
    default_sysctls: dict[str, str] = key(
        {}, "For pods that have the sysctl's namespace to themselves.", sysctls
    )
    default_ulimits: list[str] = key([], 'Such as "nofile=1024:2048".', ulimits)
    apparmor_profile: str = key("bulkhead-default", "AppArmor profile that RuntimeDefault means.")
    cdi_spec_dirs: list[str] = key(
        ["/etc/cdi", "/var/run/cdi"], "Directories of CDI specifications; later ones override.", absolute_list
    )
    hooks_dirs: list[str] = key(
        ["/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d"],
        "Directories of OCI hooks (oci-hooks(5)); later ones override.",
        absolute_list,
    )
    cgroup_parent: str = key(
        "", "Parent of pods that name none; empty: a group of this instance.", absolute_or_empty
    )


@dataclass(frozen=True)
class GrpcConfig:
    max_message_bytes: int = key(
        80 * 1024 * 1024, "Largest gRPC message, both ways.", at_least(4 * 1024 * 1024)
    )
    max_requests: int = key(256, "CRI requests served at a time.", between(8, 65536))
    max_connection_age: float = key(
        60.0,
        "Seconds until a client is asked to connect anew, which it does without an error; a cri that was "
        "replaced by an upgrade in place stays for so long.",
        between(1, 3600),
    )


@dataclass(frozen=True)
class MetricsConfig:
    pod_metrics: list[str] = key(
        list(POD_METRICS),
        f"What kubelets get of CRI's metrics, besides when a container was seen: {', '.join(POD_METRICS)}.",
        matching("|".join(POD_METRICS), f"one of {', '.join(POD_METRICS)}"),
    )


@dataclass(frozen=True)
class MonitorConfig:
    log_buffer: int = key(256 * 1024, "Bytes of output a monitor buffers per container.", at_least(4096))


@dataclass(frozen=True)
class NriValidatorConfig:
    enable: bool = key(False, "Refuse adjustments by the keys below; NRI's worker then runs always.")
    reject_oci_hook_adjustment: bool = key(False, "Plugins must not add OCI hooks.")
    reject_runtime_default_seccomp_adjustment: bool = key(
        False, "They must not change the policy of containers with the default one."
    )
    reject_unconfined_seccomp_adjustment: bool = key(False, "Nor of containers without one.")
    reject_custom_seccomp_adjustment: bool = key(False, "Nor of containers with one of their own.")
    reject_namespace_adjustment: bool = key(False, "They must not change namespaces.")
    reject_sysctl_adjustment: bool = key(False, "They must not change sysctls.")
    required_plugins: list[str] = key([], "Without these no container is created.")
    tolerate_missing_annotation: str = key(
        "", "Annotation of pods that do without required plugins; empty: there is none."
    )


@dataclass(frozen=True)
class NriConfig:
    enable: bool = key(True, "Let plugins connect; without any there is no process.")
    listen: str = key(
        "",
        "Socket of plugins; empty: /var/run/nri/nri.sock, or <run_root>/nri.sock beside another run_root.",
        absolute_or_empty,
    )
    disable_connections: bool = key(False, "Only plugins that are installed: there is no socket.")
    plugin_dir: str = key("/opt/nri/plugins", "Plugins that are started: NN-name, in order.", absolute)
    plugin_config_dir: str = key("/etc/nri/conf.d", "NN-name.conf or name.conf of each.", absolute)
    registration_timeout: float = key(5.0, "For a plugin to register, and to be synchronized.", at_least(0.1))
    request_timeout: float = key(2.0, "For a plugin to answer; then it is disconnected.", at_least(0.1))
    default_validator: NriValidatorConfig = table(NriValidatorConfig, "What plugins must not adjust.")


@dataclass(frozen=True)
class Config:
    """Everything. Made by configfile.load, complete and checked."""

    root: str = key("/var/lib/bulkhead", "Persistent state: images, layers, writable layers.", absolute)
    run_root: str = key(RUN_ROOT, "State of this boot: sockets, pods, monitors.", absolute)
    listen: str = key("", "The CRI socket; empty: <run_root>/bulkhead.sock.", absolute_or_empty)
    log_level: str = key("info", "debug, info, warning or error.", one_of(*LEVELS))
    log_format: str = key(
        "text", "text (to the journal with its fields, where there is one) or json.", one_of("text", "json")
    )
    log_filter: str = key(
        "", "Regular expression: only lines in which it is found are logged; empty: all.", expression
    )
    cgroup_manager: str = key(
        "auto", "systemd, cgroupfs, or auto: systemd where it is PID 1.", one_of(*CGROUP_MANAGERS)
    )
    default_runtime: str = key(
        "", "Name in [runtimes]; empty: crun if it is there and works on this host, else runc."
    )
    runtimes: dict[str, RuntimeConfig] = key({}, "OCI runtimes by handler name; crun and runc need no entry.")
    cni: CniConfig = table(CniConfig, "Pod networks.")
    image: ImageConfig = table(ImageConfig, "Registries and pulls.")
    storage: StorageConfig = table(StorageConfig, "Limits against hostile layers.")
    containers: ContainersConfig = table(ContainersConfig, "What containers get by default.")
    grpc: GrpcConfig = table(GrpcConfig, "The CRI server.")
    metrics: MetricsConfig = table(MetricsConfig, "ListPodSandboxMetrics.")
    monitor: MonitorConfig = table(MonitorConfig, "The process that each container has.")
    pools: PoolsConfig = table(PoolsConfig, "Sizes of worker pools.")
    users: UsersConfig = table(UsersConfig, "Who the workers are: a name or a number each, all different.")
    timeouts: TimeoutsConfig = table(TimeoutsConfig, "All in seconds.")
    restart: RestartConfig = table(RestartConfig, "When workers die.")
    ops: OpsConfig = table(OpsConfig, "Metrics and inspection.")
    stream: StreamConfig = table(StreamConfig, "The server of exec, attach and port-forward.")
    nri: NriConfig = table(NriConfig, "Node resource plugins (NRI).")

    def resolved(self) -> Config:
        """Return the configuration with every derived value filled in."""
        runtimes = _resolved_runtimes(self)
        return dataclasses.replace(
            self,
            listen=self.listen or f"{self.run_root}/bulkhead.sock",
            cgroup_manager=_cgroup_manager(self.cgroup_manager),
            runtimes=runtimes,
            default_runtime=self.default_runtime or _default_runtime(runtimes),
            cni=dataclasses.replace(self.cni, cache_dir=self.cni.cache_dir or f"{self.run_root}/net"),
            ops=dataclasses.replace(self.ops, listen=self.ops.listen or f"{self.run_root}/ops.sock"),
            nri=dataclasses.replace(self.nri, listen=self.nri.listen or _plugin_socket(self.run_root)),
        )


def _plugin_socket(run_root: str) -> str:
    """Where plugins look for it; an instance beside the usual one has a socket of its own."""
    return "/var/run/nri/nri.sock" if run_root == RUN_ROOT else f"{run_root}/nri.sock"


def _default_runtime(runtimes: dict[str, RuntimeConfig]) -> str:
    """crun if it is there and this host suits it, else runc, else the first that is configured."""
    names = [name for name in runtimes if name != "crun" or not crun_refuses_host()]
    return next(iter(names or runtimes), "")


def crun_refuses_host() -> bool:
    """Say whether this is a hybrid host whose cgroup2 mount holds controllers.

    crun refuses to work there ("cgroups in hybrid mode not supported", libcrun/cgroup.c).
    """
    with open("/proc/self/mounts", encoding="utf-8") as file:
        mounts = [line.split() for line in file]
    if not any(fields[2] == "cgroup" and "memory" in fields[3].split(",") for fields in mounts):
        return False
    for controllers in (f"{fields[1]}/cgroup.controllers" for fields in mounts if fields[2] == "cgroup2"):
        with contextlib.suppress(OSError), open(controllers, encoding="ascii") as file:
            if file.read().split():
                return True
    return False


def _cgroup_manager(value: str) -> str:
    if value != "auto":
        return value
    return "systemd" if os.path.isdir("/run/systemd/system") else "cgroupfs"


def _resolved_runtimes(config: Config) -> dict[str, RuntimeConfig]:
    """crun first, then runc, if they are there; then what is configured. A configured one always stays."""
    found: dict[str, RuntimeConfig] = {}
    for name in dict.fromkeys((*RUNTIME_NAMES, *config.runtimes)):
        entry = config.runtimes.get(name, RuntimeConfig())
        path = entry.path or find_program(name)
        if not path and name not in config.runtimes:
            continue
        root = entry.root or f"{config.run_root}/runtimes/{name}"
        found[name] = RuntimeConfig(
            path=path or f"/usr/bin/{name}",
            root=root,
            args=list(entry.args),
            allowed_annotations=list(entry.allowed_annotations),
        )
    return found
