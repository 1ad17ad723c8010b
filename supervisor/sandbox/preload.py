"""Runs in: every worker, just before its sandbox shuts.

What libraries would load from files long after the files are out of sight: modules that Python's own
libraries import inside functions, the C library's helper for ending threads, its name service modules. What a
worker's own libraries import late, its prepare() has to import.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import sys

#: Loaded already -> what it will import at its first use.
_LATE = {
    "sys": ("traceback", "linecache", "encodings.ascii", "encodings.latin_1"),
    "socket": ("array",),
    "datetime": ("_strptime",),
    "asyncio": ("concurrent.futures.thread",),
    "grpc": ("grpc._utilities",),
}
#: What a look-up of a host name imports.
_RESOLVER = ("encodings.idna", "stringprep", "unicodedata")


def late_imports() -> None:
    """Import what the modules that are loaded would import in the middle of their work."""
    for module in [late for loaded, names in _LATE.items() if loaded in sys.modules for late in names]:
        importlib.import_module(module)


def threads() -> None:
    """pthread_exit loads libgcc_s at its first call and aborts the process if it is not there."""
    _load("libgcc_s.so.1")


def resolver() -> None:
    """Everything that socket.getaddrinfo needs besides its configuration files."""
    for module in _RESOLVER:
        importlib.import_module(module)
    for service in host_services(_switch_configuration()):
        _load(f"libnss_{service}.so.2")


def _switch_configuration() -> str:
    try:
        with open("/etc/nsswitch.conf", encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:  # the C library then asks files and dns, both built in
        return ""


def host_services(text: str) -> list[str]:
    """The services on the hosts line of an nsswitch.conf, without their [reactions]."""
    for line in text.splitlines():
        name, _, services = line.partition("#")[0].partition(":")
        if name.strip() == "hosts":
            return re.sub(r"\[[^]]*\]", " ", services).split()
    return []


def _load(library: str) -> None:
    """Keep a library loaded. One that is not installed would not be found later either."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(library)
