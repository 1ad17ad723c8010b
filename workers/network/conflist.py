"""Runs in: network.

CNI network configuration, sans I/O: bytes of a `.conflist`, `.conf` or `.json` file in, a checked `Network`
out, and from that the configuration that one plugin is given on its standard input (CNI specification,
sections 1 and 3). It refuses what a plugin could not be run with and says why in a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ipc.messages import Body

#: Versions of the specification that can be spoken, the oldest first.
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*\Z")
_INTERNAL = "cni.dev/"  # keys of this prefix are the runtime's (section 1)


class ConfigError(Exception):
    """A configuration file that cannot be used; the text says why."""


class Network(Body):
    """A checked network configuration list. `versions` are those it may be run with, the newest first."""

    name: str
    versions: list[str]
    plugins: list[dict[str, Any]]
    disable_check: bool = False
    disable_gc: bool = False
    path: str = ""

    def at(self, *versions: str) -> Network:
        """The same network with those of its versions that are given."""
        return msgspec.structs.replace(self, versions=[v for v in self.versions if v in versions])

    @property
    def version(self) -> str:
        """The newest version that both this list and we know."""
        return self.versions[0]


def at_least(version: str, floor: str) -> bool:
    """Whether `version` is `floor` or newer; both are of VERSIONS."""
    return VERSIONS.index(version) >= VERSIONS.index(floor)


def parse(data: bytes, *, path: str) -> Network:
    """Return the network that a file describes; a file of one plugin becomes a list of one.

    Raises ConfigError.
    """
    document = _object(data)
    if "plugins" not in document and not path.endswith(".conflist"):
        document = _wrapped(document)
    return Network(
        name=_network_name(document),
        versions=_versions(document),
        plugins=_plugins(document),
        disable_check=_flag(document, "disableCheck"),
        disable_gc=_flag(document, "disableGC"),
        path=path,
    )


def _object(data: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError("not a JSON object")
    return document


def _wrapped(plugin: dict[str, Any]) -> dict[str, Any]:
    keys = ("cniVersion", "cniVersions", "name")
    return {key: plugin[key] for key in keys if key in plugin} | {"plugins": [plugin]}


def _network_name(document: Mapping[str, Any]) -> str:
    name = document.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError('"name" is missing')
    if not _NAME.match(name):
        raise ConfigError(f'"name" {name!r} is not made of letters, digits, "_", "." and "-"')
    return name


def _versions(document: Mapping[str, Any]) -> list[str]:
    named = [document[key] for key in ("cniVersion",) if key in document]
    more = document.get("cniVersions", [])
    named += more if isinstance(more, list) else [more]
    if not all(isinstance(version, str) for version in named):
        raise ConfigError('"cniVersion" is not a string')
    if not named:
        raise ConfigError('"cniVersion" is missing')
    known = [version for version in reversed(VERSIONS) if version in named]
    if not known:
        raise ConfigError(f"CNI version {', '.join(named)} is not supported (known: {', '.join(VERSIONS)})")
    return known


def _plugins(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    plugins = document.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        raise ConfigError('"plugins" is not a list with at least one plugin')
    for number, plugin in enumerate(plugins):
        _check_plugin(number, plugin)
    return plugins


def _check_plugin(number: int, plugin: object) -> None:
    if not isinstance(plugin, dict):
        raise ConfigError(f"plugin {number} is not a JSON object")
    kind = plugin.get("type")
    if not isinstance(kind, str) or not kind:
        raise ConfigError(f'plugin {number} has no "type"')
    if not _NAME.match(kind):
        raise ConfigError(f'plugin {number}: "type" {kind!r} is not the name of a program')
    capabilities = plugin.get("capabilities", {})
    if not isinstance(capabilities, dict) or not all(isinstance(on, bool) for on in capabilities.values()):
        raise ConfigError(f'plugin {number} ({kind}): "capabilities" does not say true or false of each')


def _flag(document: Mapping[str, Any], key: str) -> bool:
    # Written as a string in some files of the field; the specification names both spellings.
    value = document.get(key, False)
    if isinstance(value, str) and value.lower() in {"true", "false"}:
        value = value.lower() == "true"
    if not isinstance(value, bool):
        raise ConfigError(f'"{key}" is neither true nor false')
    return value


def plugin_config(
    network: Network,
    plugin: Mapping[str, Any],
    *,
    runtime_config: Mapping[str, Any] | None = None,
    previous: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """Return what a plugin reads: its own keys, the list's name and version, and what this run adds.

    `runtime_config` holds values for every capability that the runtime has; the plugin gets those it
    declared. `previous` is the result before it in the chain.
    """
    wanted = {name for name, on in plugin.get("capabilities", {}).items() if on}
    config = {key: value for key, value in plugin.items() if not _is_ours(key)}
    config |= {"cniVersion": network.version, "name": network.name}
    given = {key: value for key, value in (runtime_config or {}).items() if key in wanted}
    if given:
        config["runtimeConfig"] = given
    if previous is not None:
        config["prevResult"] = previous
    return msgspec.json.encode(config | dict(extra or {}))


def _is_ours(key: str) -> bool:
    return key.startswith(_INTERNAL) or key in {"capabilities", "runtimeConfig", "prevResult", "cniVersions"}
