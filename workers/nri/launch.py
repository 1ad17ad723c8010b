"""Runs in: nri, in `prepare`, while it is still root: pre-installed plugins are found and started.

A plugin may do anything to any container, so it is root's, and no worker can start it later: the sandbox is
shut then. It lives in nri's cgroup, ends with its connection, and with nri at the latest: the supervisor
kills what a worker leaves behind. Nothing here reads what a plugin says.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from ipc.log import Log

_FILE = re.compile(r"([0-9]{2})-([A-Za-z0-9_.+-]+)")
PLUGIN_FD = 3
MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class Found:
    """An executable in the directory of plugins."""

    index: str
    base: str
    path: str


@dataclass(frozen=True)
class Launched:
    """A plugin that runs; `sock` is our end of its connection."""

    index: str
    base: str
    config: str
    pid: int
    sock: socket.socket


def discover(directory: str, log: Log) -> Iterator[Found]:
    """Yield the executables `NN-name` in order; what is executable and not named so is left out, loudly."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    for name in names:
        path = os.path.join(directory, name)
        if not _executable(path):
            continue
        found = _FILE.fullmatch(name)
        if found is None:
            log.warning("not started: a plugin's file is named NN-name", path=path)
        else:
            yield Found(found[1], found[2], path)


def _executable(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:  # a dangling link
        return False
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def configuration(directory: str, plugin: Found) -> str:
    """The plugin's drop-in: NN-name.conf, else name.conf, else none. Raises OSError, ValueError."""
    for name in (f"{plugin.index}-{plugin.base}.conf", f"{plugin.base}.conf"):
        path = os.path.join(directory, name)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                text = file.read(MAX_CONFIG + 1)
            if len(text) > MAX_CONFIG:
                raise ValueError(f"{path} is longer than {MAX_CONFIG} characters")
            return text
    return ""


def start_all(plugin_dir: str, config_dir: str, log: Log) -> list[Launched]:
    """Start what is installed; one that cannot be started is left out, loudly."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies; how one ended is its connection's word
    started = []
    for plugin in discover(plugin_dir, log):
        try:
            started.append(_start(plugin, configuration(config_dir, plugin)))
        except (OSError, ValueError) as error:
            log.error("plugin cannot be started", path=plugin.path, why=error)
        else:
            log.info("plugin started", path=plugin.path, pid_of=started[-1].pid)
    return started


def _start(plugin: Found, config: str) -> Launched:
    ours, its = socket.socketpair()
    try:
        pid = _spawn(plugin, its.fileno())
    except OSError:
        ours.close()
        raise
    finally:
        its.close()
    return Launched(plugin.index, plugin.base, config, pid, ours)


def _spawn(plugin: Found, fd: int) -> int:
    """The interface's contract: three variables, the connection as descriptor 3, nothing else."""
    environment = {
        "NRI_PLUGIN_NAME": plugin.base,
        "NRI_PLUGIN_IDX": plugin.index,
        "NRI_PLUGIN_SOCKET": str(PLUGIN_FD),
        "PATH": os.environ.get("PATH", os.defpath),
    }
    actions = [
        (os.POSIX_SPAWN_DUP2, fd, PLUGIN_FD),
        (os.POSIX_SPAWN_DUP2, 2, 1),  # what it prints goes where our errors go: to the log
    ]
    return os.posix_spawn(
        plugin.path,
        [plugin.path],
        environment,
        file_actions=actions,
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGPIPE, signal.SIGCHLD],
    )
