"""Runs in: the supervisor.

What each worker is told of the configuration: its own part and no more. It owns the derivation of
ipc.settings.* from Config, and of who runs as whom.
"""

from __future__ import annotations

import dataclasses
import os
import pwd
from collections.abc import Callable, Mapping
from typing import Any

from ipc import settings
from ipc.trust import Trust
from supervisor.cgroup import instance_name
from supervisor.config import Config, OpsConfig, StreamConfig, UsersConfig
from supervisor.configfile import ConfigError
from supervisor.sandbox.spec import Identity
from supervisor.table import ROOT_USER, Table

#: Users when there are none of the name bulkhead-<kind>: it runs from a clone with nothing set up.
FIXED_UIDS = {"cri": 64101, "image": 64102, "stream": 64103, "ops": 64104, "init": 64105, "nri": 64106}
ROOT = Identity(0, 0)
ANYTHING = Trust()  # may be pulled


def identities(users: UsersConfig, table: Table) -> dict[str, Identity]:
    """Return who every kind of the table runs as. Raises ConfigError if two kinds would be the same user."""
    found = {entry.kind: _identity(entry.user, users) for entry in table.values()}
    by_uid: dict[int, str] = {}
    for kind, identity in found.items():
        if identity.uid and by_uid.setdefault(identity.uid, kind) != kind:
            raise ConfigError(
                f"[users] {by_uid[identity.uid]} and {kind} are the same user (uid {identity.uid}): "
                "who asks is told by the uid, so all must differ"
            )
    return found


def _identity(name: str, users: UsersConfig) -> Identity:
    if name == ROOT_USER:
        return ROOT
    wanted: str | int = getattr(users, name, "")
    if isinstance(wanted, int):
        return _by_uid(wanted)
    try:
        entry = pwd.getpwnam(wanted or f"bulkhead-{name}")
    except KeyError:
        if wanted or name not in FIXED_UIDS:
            raise ConfigError(f"[users] {name}: there is no user {wanted or name!r}") from None
        return Identity(FIXED_UIDS[name], FIXED_UIDS[name])
    if entry.pw_uid == 0:
        raise ConfigError(f"[users] {name}: {entry.pw_name} is root")
    return Identity(entry.pw_uid, entry.pw_gid)


def _by_uid(uid: int) -> Identity:
    try:
        return Identity(uid, pwd.getpwuid(uid).pw_gid)
    except KeyError:
        return Identity(uid, uid)


def uids(who: Mapping[str, Identity]) -> dict[int, str]:
    """Return uid -> kind, for SO_PEERCRED. Root is not in it: ipc.table names it."""
    return {identity.uid: kind for kind, identity in who.items() if identity.uid}


def bind_directory(config: Config) -> str:
    """Return the directory where cri binds its socket, beside the public path, on the same file system."""
    directory, name = os.path.split(config.listen)
    return os.path.join(directory, f".{name}.bind")


def sandbox_paths(config: Config, trust: Trust = ANYTHING) -> dict[str, str]:
    """Return the values of the templates in supervisor/sandbox/spec.py."""
    return {
        "root": config.root,
        "run_root": config.run_root,
        "bind_directory": bind_directory(config),
        "registries_conf": config.image.registries_conf,
        "registries_conf_dir": config.image.registries_conf_dir,
        "certs_dirs": ":".join(config.image.certs_dirs),
        "auth_file": config.image.auth_file,
        "signatures": ":".join(trust.directories()),
        "stream_tls": ":".join(tls_directories(config.stream)),
        "ops_tls": ":".join(tls_directories(config.ops)),
    }


def tls_directories(served: StreamConfig | OpsConfig) -> list[str]:
    """Where the files of a server's TLS are, and where those lie that they point at: whoever sees these
    directories sees a file change."""
    files = [path for path in (served.tls_cert, served.tls_key, served.tls_client_ca) if path]
    return sorted({os.path.dirname(path) for file in files for path in (file, os.path.realpath(file))})


def stream_url(config: Config, port: int) -> str:
    """What URLs of streaming begin with; the kubelet is on this machine, so a wildcard means loopback."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.stream.address, config.stream.address)
    host = f"[{address}]" if ":" in address else address
    return f"{'https' if config.stream.tls_cert else 'http'}://{host}:{port}"


class Derivation:
    """Makes the settings of each kind.

    `stream_port`: what the stream server's listener is bound to. `nri_worker`: the pid of the nri worker that
    is ready, 0 for none, since cri calls nobody who is not there. `trust`: what may be pulled.
    """

    def __init__(
        self,
        config: Config,
        who: Mapping[str, Identity],
        stream_port: int = 0,
        nri_worker: int = 0,
        trust: Trust = ANYTHING,
    ) -> None:
        self._config = config
        self._who = who
        self._stream_port = stream_port or config.stream.port
        self._nri_worker = nri_worker
        self._trust = trust
        self._makers: dict[str, Callable[[], settings.Common]] = {
            "cri": self._cri,
            "image": self._image,
            "storage": self._storage,
            "network": self._network,
            "monitor": self._monitor,
            "stream": self._stream,
            "ops": self._ops,
            "nri": self._nri,
        }

    def of(self, kind: str) -> settings.Common:
        """Return the settings of a kind; what every worker knows, for a kind without settings of its own."""
        maker = self._makers.get(kind)
        return settings.Common(**self._common()) if maker is None else maker()

    def _common(self) -> dict[str, Any]:
        return {
            "root": self._config.root,
            "run_root": self._config.run_root,
            "log_level": self._config.log_level,
            "uids": uids(self._who),
        }

    def _cri(self) -> settings.CriSettings:
        config = self._config
        return settings.CriSettings(
            **self._common(),
            listen=config.listen,
            bind_directory=bind_directory(config),
            stream_url=stream_url(config, self._stream_port),
            runtimes=[
                settings.Runtime(
                    name=name,
                    path=runtime.path,
                    root=runtime.root,
                    args=runtime.args,
                    allowed_annotations=runtime.allowed_annotations,
                )
                for name, runtime in config.runtimes.items()
            ],
            default_runtime=config.default_runtime,
            cgroup_driver=config.cgroup_manager,
            default_cgroup_parent=default_cgroup_parent(config),
            pause_image=config.image.pause_image,
            pinned_images=config.image.pinned_images,
            policy_namespaces=sorted(self._trust.namespaces),
            default_capabilities=config.containers.default_capabilities,
            default_env=config.containers.default_env,
            default_sysctls=config.containers.default_sysctls,
            default_ulimits=config.containers.default_ulimits,
            apparmor_profile=config.containers.apparmor_profile,
            container_create_timeout=config.timeouts.container_create,
            pod_setup_timeout=config.timeouts.pod_setup,
            stop_timeout=config.timeouts.container_stop,
            pull_idle_timeout=config.timeouts.pull_idle,
            parallel_layers=config.image.parallel_layers,
            max_message_bytes=config.grpc.max_message_bytes,
            max_requests=config.grpc.max_requests,
            max_connection_age=config.grpc.max_connection_age,
            pod_metrics=config.metrics.pod_metrics,
            nri=config.nri.enable,
            nri_needed=nri_needed(config),
            nri_worker=self._nri_worker,
        )

    def _image(self) -> settings.ImageSettings:
        image, timeouts = self._config.image, self._config.timeouts
        return settings.ImageSettings(
            **self._common(),
            registries_conf=image.registries_conf,
            registries_conf_dir=image.registries_conf_dir,
            certs_dirs=image.certs_dirs,
            auth_file=image.auth_file,
            trust=self._trust,
            connect_timeout=timeouts.registry_connect,
            read_timeout=timeouts.registry_read,
            max_manifest_bytes=image.max_manifest_bytes,
            max_config_bytes=image.max_config_bytes,
            retries=image.retries,
            idle_exit=timeouts.idle_exit,
        )

    def _storage(self) -> settings.StorageSettings:
        storage, timeouts = self._config.storage, self._config.timeouts
        return settings.StorageSettings(
            **self._common(),
            unpack_max_entries=storage.unpack_max_entries,
            unpack_max_bytes=storage.unpack_max_bytes,
            unpack_max_ratio=storage.unpack_max_ratio,
            unpack_timeout=timeouts.unpack,
            unpack_uid=storage.unpack_uid,
            mount_source_timeout=timeouts.mount_source,
            cdi_spec_dirs=self._config.containers.cdi_spec_dirs,
            hooks_dirs=self._config.containers.hooks_dirs,
        )

    def _network(self) -> settings.NetworkSettings:
        cni, timeouts = self._config.cni, self._config.timeouts
        return settings.NetworkSettings(
            **self._common(),
            conf_dir=cni.conf_dir,
            bin_dirs=cni.bin_dirs,
            cache_dir=cni.cache_dir,
            setup_timeout=timeouts.network_setup,
            teardown_timeout=timeouts.network_teardown,
            default_network=cni.default_network,
        )

    def _monitor(self) -> settings.MonitorSettings:
        cri_gid = self._who["cri"].gid if "cri" in self._who else 0
        paths = [runtime.path for runtime in self._config.runtimes.values()]
        crun = [path for path in paths if os.path.basename(path) == "crun"]
        return settings.MonitorSettings(
            **self._common(), log_buffer=self._config.monitor.log_buffer, cri_gid=cri_gid, sealed=crun
        )

    def _stream(self) -> settings.StreamSettings:
        stream = self._config.stream
        return settings.StreamSettings(
            **self._common(),
            tls_cert=stream.tls_cert,
            tls_key=stream.tls_key,
            tls_client_ca=stream.tls_client_ca,
            tls_min_version=stream.tls_min_version,
            tls_ciphers=stream.tls_ciphers,
            head_timeout=stream.head_timeout,
            creation_timeout=stream.creation_timeout,
            idle_timeout=stream.idle_timeout,
            stall_timeout=stream.stall_timeout,
            max_connections=stream.max_connections,
            max_streams=stream.max_streams,
            idle_exit=self._config.timeouts.idle_exit,
        )

    def _ops(self) -> settings.OpsSettings:
        return settings.OpsSettings(
            **self._common(),
            **dataclasses.asdict(self._config.ops),
            idle_exit=self._config.timeouts.idle_exit,
        )

    def _nri(self) -> settings.NriSettings:
        nri = self._config.nri
        return settings.NriSettings(
            **self._common(),
            plugin_dir=nri.plugin_dir,
            plugin_config_dir=nri.plugin_config_dir,
            registration_timeout=nri.registration_timeout,
            request_timeout=nri.request_timeout,
            validator=settings.NriValidator(**dataclasses.asdict(nri.default_validator)),
            needed=nri_needed(self._config),
            idle_exit=self._config.timeouts.idle_exit,
        )


def nri_needed(config: Config) -> bool:
    """Whether the nri worker runs even though no plugin has connected."""
    nri = config.nri
    return bool(nri.enable and (nri.default_validator.enable or _any_program(nri.plugin_dir)))


def _any_program(directory: str) -> bool:
    try:
        paths = [os.path.join(directory, name) for name in os.listdir(directory)]
    except OSError:
        return False
    return any(os.path.isfile(path) and os.access(path, os.X_OK) for path in paths)


def default_cgroup_parent(config: Config) -> str:
    """Return the parent of pods that name none, in the spelling of the cgroup manager."""
    if config.containers.cgroup_parent:
        return config.containers.cgroup_parent
    instance = instance_name(config.run_root)
    # A slice's dashes are levels: instances become children of bulkhead.slice.
    return f"{instance}.slice" if config.cgroup_manager == "systemd" else f"/{instance}.pods"
