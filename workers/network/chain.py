"""Runs in: children of network.

The operations of the CNI specification on a whole list of plugins: ADD in order, each with the result
before it; DEL and CHECK with the result that was recorded; STATUS, GC and VERSION (section 4, and section 2
for the environment). It owns nothing: what is recorded is its callers' business.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from workers.network import plugin
from workers.network.conflist import Network, at_least, plugin_config
from workers.network.records import Record
from workers.network.results import PluginError, PluginTimeout, parse_failure, parse_object, parse_result

#: Both spellings of the specification's texts.
_VALID_ATTACHMENTS = ("cni.dev/valid-attachments", "cni.dev/attachments")


class Chain:
    """A network's plugins, run before a deadline (monotonic clock), holding a pod's lock."""

    def __init__(
        self, network: Network, bin_dirs: Sequence[str], *, deadline: float, lock_fd: int = -1
    ) -> None:
        self.network = network
        self._bin_dirs = bin_dirs
        self._deadline = deadline
        self._lock_fd = lock_fd

    def negotiated(self) -> Network:
        """Return the network bound to the newest version that the list and all its plugins know.

        Plugins are asked only where the list leaves a choice. Raises PluginError.
        """
        if len(self.network.versions) == 1:
            return self.network
        for kind in dict.fromkeys(entry["type"] for entry in self.network.plugins):
            self.network = self.network.at(*self.versions_of(kind))
            if not self.network.versions:
                raise PluginError(f'CNI plugin "{kind}" knows none of the versions of its list')
        return self.network.at(self.network.version)

    def versions_of(self, kind: str) -> list[str]:
        """Return the versions of the specification that a plugin says it knows. Raises PluginError."""
        config = msgspec.json.encode({"cniVersion": self.network.version})
        with _naming(kind, "VERSION", self.network.name):
            answer = parse_object(self._run(kind, "VERSION", config, {}), what="answer")
            versions = answer.get("supportedVersions", [])
            if not isinstance(versions, list) or not versions:
                raise PluginError("it does not say which versions it supports")
        return [version for version in versions if isinstance(version, str)]

    def path_of(self, kind: str) -> str:
        """Return the path of a plugin's program. Raises PluginError."""
        with _naming(kind, "look-up", self.network.name):
            return plugin.find(kind, self._bin_dirs)

    def add(self, record: Record) -> dict[str, Any]:
        """ADD; return the last result. Raises PluginError, and then DEL is due."""
        result: dict[str, Any] | None = None
        for entry in self.network.plugins:
            data = self._run_for(record, entry, "ADD", previous=result)
            with _naming(entry["type"], "ADD", self.network.name):
                result = parse_result(data, version=self.network.version)
        assert result is not None
        return result

    def delete(self, record: Record, *, netns_gone: bool) -> None:
        """DEL in reverse with the recorded result; with no namespace if that is gone. Raises PluginError."""
        previous = record.result if at_least(self.network.version, "0.4.0") else None
        for entry in reversed(self.network.plugins):
            self._run_for(record, entry, "DEL", previous=previous, netns_gone=netns_gone)

    def check(self, record: Record) -> None:
        """CHECK in order, unless the list or its version has no CHECK. Raises PluginError."""
        if self.network.disable_check or not at_least(self.network.version, "0.4.0"):
            return
        for entry in self.network.plugins:
            self._run_for(record, entry, "CHECK", previous=record.result)

    def status(self) -> None:
        """STATUS of each plugin where the version has it. Raises PluginError."""
        if at_least(self.network.version, "1.1.0"):
            for entry in self.network.plugins:
                config = plugin_config(self.network, entry)
                with _naming(entry["type"], "STATUS", self.network.name):
                    self._run(entry["type"], "STATUS", config, {})

    def collect(self, attachments: Iterable[tuple[str, str]]) -> list[PluginError]:
        """GC with the attachments (container id, interface) that are valid; a failure stops nothing."""
        valid = [{"containerID": pod_id, "ifname": ifname} for pod_id, ifname in attachments]
        extra = dict.fromkeys(_VALID_ATTACHMENTS, valid)
        failures = []
        for entry in self.network.plugins:
            try:
                with _naming(entry["type"], "GC", self.network.name):
                    self._run(entry["type"], "GC", plugin_config(self.network, entry, extra=extra), {})
            except PluginError as error:
                failures.append(error)
        return failures

    def _run_for(
        self,
        record: Record,
        entry: Mapping[str, Any],
        command: str,
        *,
        previous: Mapping[str, Any] | None,
        netns_gone: bool = False,
    ) -> bytes:
        config = plugin_config(self.network, entry, runtime_config=record.runtime_config, previous=previous)
        environment = {
            "CNI_CONTAINERID": record.pod_id,
            "CNI_NETNS": "" if netns_gone else record.namespaces["net"],
            "CNI_IFNAME": record.ifname,
            "CNI_ARGS": record.args,
        }
        with _naming(entry["type"], command, self.network.name):
            return self._run(entry["type"], command, config, environment)

    def _run(self, kind: str, command: str, config: bytes, environment: Mapping[str, str]) -> bytes:
        path = plugin.find(kind, self._bin_dirs)
        if time.monotonic() >= self._deadline:
            raise PluginTimeout("no time was left to start it")
        names = {"CNI_COMMAND": command, "CNI_PATH": ":".join(self._bin_dirs), **environment}
        output = plugin.run(path, names, config, deadline=self._deadline, lock_fd=self._lock_fd)
        if output.code != 0:
            raise parse_failure(output.code, output.stdout, output.stderr)
        return output.stdout


class _naming(contextlib.AbstractContextManager[None]):
    """Puts before an error's text which plugin failed at what."""

    def __init__(self, kind: str, command: str, network: str) -> None:
        self._prefix = f'CNI plugin "{kind}", {command}, network "{network}": '

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, PluginError):
            raise type(error)(self._prefix + error.text, error.code) from None
