"""Runs in: image. Sans-IO.

Which proxy a request goes through: HTTP_PROXY, HTTPS_PROXY and NO_PROXY of the environment, in capitals or
not, with the meaning that the other programs of a node give them: NO_PROXY has host names (with their
subdomains), addresses, networks in CIDR form, host:port, or "*". Loopback is never proxied.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ipc.errors import precondition


@dataclass(frozen=True)
class Proxies:
    """The proxy of each scheme as the environment names it, "" for none."""

    by_scheme: Mapping[str, str] = field(default_factory=dict)
    exceptions: tuple[str, ...] = ()

    def proxy_for(self, scheme: str, host: str, port: int) -> str:
        """The proxy's URL for a target, "" to go directly.

        Raises RemoteError(FAILED_PRECONDITION) if what the environment names is no proxy that we can use.
        """
        proxy = self.by_scheme.get(scheme, "")
        if not proxy or self._excepted(host.strip("[]").lower(), port):
            return ""
        return _checked(scheme, proxy)

    def _excepted(self, host: str, port: int) -> bool:
        return _is_loopback(host) or any(_covers(entry, host, port) for entry in self.exceptions)


def from_environment(environment: Mapping[str, str]) -> Proxies:
    """Read the variables."""
    by_scheme = {scheme: _value(environment, f"{scheme}_proxy") for scheme in ("http", "https")}
    exceptions = _value(environment, "no_proxy").lower().split(",")
    return Proxies(by_scheme, tuple(entry.strip() for entry in exceptions if entry.strip()))


def _value(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name) or environment.get(name.upper()) or ""


def _checked(scheme: str, proxy: str) -> str:
    url = proxy if "://" in proxy else f"http://{proxy}"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise precondition(f"{scheme.upper()}_PROXY is not of the form http://host:port")
    return url


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _covers(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    address = _address(host)
    if "/" in entry:
        return address is not None and _in_network(entry, address)
    name, wanted_port = _split_port(entry)
    if wanted_port and wanted_port != str(port):
        return False
    if address is not None:
        return _address(name) == address
    bare = name.removeprefix("*").removeprefix(".")
    if name != bare:  # ".example.com": subdomains only
        return host.endswith(f".{bare}")
    return host == bare or host.endswith(f".{bare}")


def _in_network(entry: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    try:
        return address in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def _split_port(entry: str) -> tuple[str, str]:
    if _address(entry) is not None:
        return entry, ""
    name, colon, port = entry.rpartition(":")
    return (name.strip("[]"), port) if colon and port.isdigit() else (entry.strip("[]"), "")
