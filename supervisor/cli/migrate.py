"""Runs in: `bulkhead migrate`.

Makes a configuration of ours out of another runtime's: reads its files by its own rules, carries over what
has a counterpart here, and lists what has none with a word on why, or on what to do instead. Sans-IO but
for reading.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from supervisor.configfile import KeyPath, find_line, merge
from supervisor.configtext import literal
from supervisor.trust import DEFAULT_POLICY

HEAD = "# Made by `bulkhead migrate` out of {files}. What is not here has Bulkhead's default.\n"
SUFFIXES = {"s": 1.0, "m": 60.0, "h": 3600.0, "ms": 0.001}


class MigrationError(Exception):
    """The other runtime's configuration cannot be read; the text is a sentence."""


@dataclass(frozen=True)
class Foreign:
    """Another runtime's configuration: its tables, and the files they were read from, in order."""

    data: Mapping[str, Any]
    files: list[tuple[str, str]]

    def place(self, path: KeyPath) -> str:
        """file:line of a key, as near as it can be found."""
        for name, text in reversed(self.files):
            table: Any = tomllib.loads(text)
            for part in path:
                table = table.get(part) if isinstance(table, dict) else None
            if table is not None:
                return f"{name}:{find_line(text, path)}"
        return self.files[-1][0]


@dataclass
class Migration:
    """What came of it: `text` is ours, `left` has a sentence for each key that is not in it."""

    text: str = ""
    left: list[str] = field(default_factory=list)


def read_crio(main: str, directory: str | None) -> Foreign:
    """Read crio.conf and its drop-ins, in lexical order and below directories too; later files win.

    Raises MigrationError.
    """
    drop_ins = directory or f"{main}.d"
    paths = [main] if os.path.exists(main) else []
    for current, directories, names in os.walk(drop_ins):
        directories.sort()
        paths += [os.path.join(current, name) for name in names]
    paths[1 if paths[:1] == [main] else 0 :] = sorted(path for path in paths if path != main)
    if not paths:
        raise MigrationError(f"there is neither {main} nor anything in {drop_ins}")
    data: dict[str, Any] = {}
    files = []
    for path in paths:
        text = _text(path)
        files.append((path, text))
        merge(data, _parsed(path, text))
    return Foreign(data, files)


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise MigrationError(f"{path}: cannot be read: {error}") from error


def _parsed(path: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MigrationError(f"{path}: not TOML: {error}") from error


#: A conversion returns the value of our key; it raises ValueError with the end of a sentence if it cannot.
Convert = Callable[[Any], Any]


def same(value: Any) -> Any:
    """As it stands there."""
    return value


def seconds(value: Any) -> float:
    """A number of seconds, or Go's notation of one unit. Raises ValueError."""
    if isinstance(value, int | float):
        return float(value)
    number = str(value).rstrip("hms")
    unit = str(value)[len(number) :]
    if unit not in SUFFIXES or not number.replace(".", "", 1).isdigit():
        raise ValueError(f"is {value!r}, which is no time that can be carried over")
    return float(number) * SUFFIXES[unit]


def pairs(value: list[str]) -> dict[str, str]:
    """name=value, each. Raises ValueError."""
    if any("=" not in item for item in value):
        raise ValueError("has an element without a value")
    return dict(item.split("=", 1) for item in value)


def level(value: str) -> str:
    """The nearest of our four levels. Raises ValueError."""
    known = {"trace": "debug", "debug": "debug", "info": "info", "warn": "warning", "warning": "warning"}
    found = {**known, "error": "error", "fatal": "error", "panic": "error"}.get(value)
    if found is None:
        raise ValueError(f"is {value!r}, which is no level")
    return found


def version(value: str) -> str:
    """VersionTLS12 as 1.2. Raises ValueError."""
    found = {"VersionTLS12": "1.2", "VersionTLS13": "1.3"}.get(value)
    if found is None:
        raise ValueError(f"is {value!r}: only TLS 1.2 and 1.3 are spoken")
    return found


def policy(value: str) -> str:
    """None named is that of the host."""
    return value or DEFAULT_POLICY


#: crio's key -> our key, and how the value changes
CRIO: Mapping[str, tuple[str, Convert]] = {
    "crio.runtime.default_runtime": ("default_runtime", same),
    "crio.runtime.cgroup_manager": ("cgroup_manager", same),
    "crio.runtime.log_level": ("log_level", level),
    "crio.runtime.default_capabilities": ("containers.default_capabilities", same),
    "crio.runtime.default_env": ("containers.default_env", same),
    "crio.runtime.default_sysctls": ("containers.default_sysctls", pairs),
    "crio.runtime.default_ulimits": ("containers.default_ulimits", same),
    "crio.runtime.cdi_spec_dirs": ("containers.cdi_spec_dirs", same),
    "crio.runtime.hooks_dir": ("containers.hooks_dirs", same),
    "crio.runtime.ctr_stop_timeout": ("timeouts.container_stop", seconds),
    "crio.image.pause_image": ("image.pause_image", same),
    "crio.image.pinned_images": ("image.pinned_images", same),
    "crio.image.global_auth_file": ("image.auth_file", same),
    "crio.image.signature_policy": ("image.policy", policy),
    "crio.image.signature_policy_dir": ("image.policy_dir", same),
    "crio.network.cni_default_network": ("cni.default_network", same),
    "crio.network.network_dir": ("cni.conf_dir", str),
    "crio.network.plugin_dirs": ("cni.bin_dirs", same),
    "crio.api.grpc_max_recv_msg_size": ("grpc.max_message_bytes", int),
    "crio.api.stream_address": ("stream.address", same),
    "crio.api.stream_port": ("stream.port", int),
    "crio.api.stream_tls_cert": ("stream.tls_cert", same),
    "crio.api.stream_tls_key": ("stream.tls_key", same),
    "crio.api.stream_tls_ca": ("stream.tls_client_ca", same),
    "crio.api.stream_idle_timeout": ("stream.idle_timeout", seconds),
    "crio.api.tls_min_version": ("stream.tls_min_version", version),
}
OF_A_RUNTIME: Mapping[str, str] = {
    "runtime_path": "path",
    "runtime_root": "root",
    "allowed_annotations": "allowed_annotations",
}
#: What to do about keys without a counterpart; a prefix stands for all below it.
ADVICE: Mapping[str, str] = {
    "crio.root": "images are pulled anew into `root`; containers of CRI-O are not taken over",
    "crio.runroot": "see `run_root`",
    "crio.storage_driver": "images are kept on overlayfs",
    "crio.storage_option": "images are kept on overlayfs",
    "crio.imagestore": "images and containers share `root`",
    "crio.log_dir": "the kubelet names the directory of logs",
    "crio.version_file": "a run root of an earlier boot is recognised by itself",
    "crio.clean_shutdown_file": "what a power cut left is found at start",
    "crio.internal_": "what a power cut left is found at start",
    "crio.api.listen": "give the kubelet `listen`",
    "crio.api.grpc_max_send_msg_size": "`grpc.max_message_bytes` is for both ways",
    "crio.api.stream_enable_tls": "TLS is spoken when `stream.tls_cert` names a certificate",
    "crio.runtime.conmon": "every container has a monitor of Bulkhead's own",
    "crio.runtime.pids_limit": "the kubelet sets it (podPidsLimit)",
    "crio.runtime.log_size_max": "the kubelet rotates logs (containerLogMaxSize)",
    "crio.runtime.selinux": "labels are set where the kernel has SELinux",
    "crio.runtime.drop_infra_ctr": "pods have no sandbox container unless `image.pause_image` names one",
    "crio.runtime.pinns_path": "the worker `network` pins namespaces",
    "crio.runtime.namespaces_dir": "namespaces are pinned below `run_root`",
    "crio.image.insecure_registries": "use registries.conf, which is read too",
    "crio.metrics": "metrics are served at `ops.listen`",
    "crio.nri": "see docs/coming-from-crio.md",
    "crio.tracing": "slow requests are in the log, with the stage they are in",
}


def from_crio(foreign: Foreign) -> Migration:
    """Convert what has a counterpart."""
    migration = Migration()
    ours: dict[str, Any] = {}
    for path, value in _leaves(foreign.data):
        dotted = ".".join(path)
        try:
            if not _runtime(ours, path, value) and not _plain(ours, dotted, value):
                migration.left.append(f"{foreign.place(path)}: {dotted} has no counterpart{_advice(dotted)}")
        except ValueError as error:
            migration.left.append(f"{foreign.place(path)}: {dotted} {error}")
    files = ", ".join(name for name, _ in foreign.files)
    migration.text = HEAD.format(files=files) + _toml(ours)
    return migration


def _leaves(table: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _runtime(ours: dict[str, Any], path: KeyPath, value: Any) -> bool:
    """`[crio.runtime.runtimes.NAME]`. True if the key was carried over, or says what holds here anyway."""
    if path[:3] != ("crio", "runtime", "runtimes") or len(path) != 5:
        return False
    if path[4] == "runtime_type" and value in ("", "oci"):
        return True
    name = OF_A_RUNTIME.get(path[4])
    if name is None:
        return False
    if value:  # empty means a default there as here
        ours.setdefault("runtimes", {}).setdefault(path[3], {})[name] = value
    return True


def _plain(ours: dict[str, Any], dotted: str, value: Any) -> bool:
    if dotted not in CRIO:
        return False
    target, convert = CRIO[dotted]
    if value not in ("", []):
        table, _, name = target.rpartition(".")
        (ours.setdefault(table, {}) if table else ours)[name] = convert(value)
    return True


def _advice(dotted: str) -> str:
    found = [text for prefix, text in ADVICE.items() if dotted.startswith(prefix)]
    return f": {found[0]}" if found else ""


def _toml(ours: Mapping[str, Any]) -> str:
    top = [f"{name} = {literal(value)}" for name, value in ours.items() if name not in _tables(ours)]
    lines = ["", *top] if top else []
    for name in _tables(ours):
        if name == "runtimes":
            for runtime, keys in ours[name].items():
                lines += ["", f"[runtimes.{runtime}]", *(f"{k} = {literal(v)}" for k, v in keys.items())]
        else:
            lines += ["", f"[{name}]", *(f"{k} = {literal(v)}" for k, v in ours[name].items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def _tables(ours: Mapping[str, Any]) -> list[str]:
    return [name for name, value in ours.items() if isinstance(value, dict)]
