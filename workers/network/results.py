"""Runs in: network.

What CNI plugins print, sans I/O: results (converted between the versions of the specification that chains
may mix), errors with their code, and the addresses of a pod. It refuses output that is neither.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from ipc.errors import Code, RemoteError
from workers.network.conflist import VERSIONS, at_least

#: Error codes of the specification (section 2) whose meaning a caller can use.
CODES = {
    11: Code.UNAVAILABLE,  # try again later
    50: Code.UNAVAILABLE,  # STATUS: cannot serve ADD
    51: Code.UNAVAILABLE,  # STATUS: nor may existing pods have their network
}
TEXT_LIMIT = 2048


class PluginError(Exception):
    """A plugin failed or spoke nonsense. `code` is the specification's number, 0 where it gave none."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.text = text
        self.code = code

    def remote(self) -> RemoteError:
        """The error as it is answered to a peer."""
        return RemoteError(CODES.get(self.code, Code.INTERNAL), self.text)


class PluginTimeout(PluginError):
    """A plugin did not end in time and was killed."""

    def remote(self) -> RemoteError:
        """The error as it is answered to a peer."""
        return RemoteError(Code.DEADLINE_EXCEEDED, self.text)


def parse_object(data: bytes, *, what: str) -> dict[str, Any]:
    """Return the JSON object that a plugin printed. Raises PluginError."""
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise PluginError(f"its {what} is not JSON: {_shown(data)}") from None
    if not isinstance(document, dict):
        raise PluginError(f"its {what} is not a JSON object: {_shown(data)}")
    return document


def parse_result(data: bytes, *, version: str) -> dict[str, Any]:
    """Return the result of an ADD, converted to `version`. Raises PluginError."""
    result = parse_object(data, what="result")
    for key, kind in (("interfaces", list), ("ips", list), ("routes", list), ("dns", dict)):
        if result.get(key) is not None and not isinstance(result[key], kind):
            raise PluginError(f'the "{key}" of its result has the wrong type')
    if not all(isinstance(item, dict) for key in ("interfaces", "ips") for item in result.get(key) or []):
        raise PluginError("its result lists something that is no object")
    return convert(result, version)


def convert(result: dict[str, Any], version: str) -> dict[str, Any]:
    """Return a result in the form of `version`; a result that names no version is in it already.

    Up to 0.4.0 each address says of which family it is, from 1.0.0 on it does not. Raises PluginError.
    """
    spoken = result.get("cniVersion") or version
    if spoken not in VERSIONS:
        raise PluginError(f"its result is in CNI version {spoken!r}, which is not supported")
    converted = result | {"cniVersion": version}
    if result.get("ips"):
        with_family = not at_least(version, "1.0.0")
        converted["ips"] = [_address_entry(entry, with_family=with_family) for entry in result["ips"]]
    return converted


def _address_entry(entry: dict[str, Any], *, with_family: bool) -> dict[str, Any]:
    plain = {key: value for key, value in entry.items() if key != "version"}
    if not with_family:
        return plain
    return {"version": "6" if ":" in str(entry.get("address", "")) else "4", **plain}


def addresses(result: dict[str, Any]) -> list[str]:
    """Return the pod's own addresses without prefix length, in the result's order.

    An address belongs to the pod if its interface stands in a sandbox, or if it names no interface.
    Raises PluginError for what is no address.
    """
    interfaces = result.get("interfaces") or []
    return [_plain_address(entry) for entry in result.get("ips") or [] if _in_sandbox(interfaces, entry)]


def _in_sandbox(interfaces: list[Any], entry: dict[str, Any]) -> bool:
    index = entry.get("interface")
    if index is None:
        return True
    if not isinstance(index, int) or not 0 <= index < len(interfaces):
        raise PluginError(f"its result has an address of interface {index!r}, which it does not list")
    return bool(interfaces[index].get("sandbox"))


def _plain_address(entry: dict[str, Any]) -> str:
    address = str(entry.get("address", "")).partition("/")[0]
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except (OSError, ValueError):
        raise PluginError(f"its result has {entry.get('address')!r} for an address") from None
    return address


def parse_failure(exit_code: int, stdout: bytes, stderr: bytes) -> PluginError:
    """Return why a plugin that ended with a code other than 0 failed, from whatever it said."""
    try:
        said = parse_object(stdout, what="error")
    except PluginError:
        said = {}
    message = ": ".join(str(said[key]).strip() for key in ("msg", "details") if said.get(key))
    number = said.get("code", 0)
    if not message:
        message = _shown(stderr) or _shown(stdout) or "it said nothing"
    ending = f"exit code {exit_code}" if exit_code >= 0 else f"killed by signal {-exit_code}"
    shown = f"CNI error {number}" if isinstance(number, int) and number else ending
    return PluginError(f"{message[:TEXT_LIMIT]} ({shown})", number if isinstance(number, int) else 0)


def _shown(data: bytes) -> str:
    text = " ".join(data[-TEXT_LIMIT:].decode("utf-8", "replace").split())
    return "".join(character for character in text if character.isprintable())
