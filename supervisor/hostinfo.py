"""Runs in: the supervisor.

Facts of the node, probed once at start: kernel, cgroups, security modules, what the supervisor itself may do,
and what each OCI runtime says of itself. Runtimes are asked by short-lived programs, started without waiting:
until all have answered or were killed, `HostProbe.when_done` holds the question.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from typing import Any

from ipc.capabilities import NAMES, effective
from ipc.log import Log
from ipc.loop import Loop
from ipc.messages.supervisor import HostInfo, RuntimeInfo
from supervisor.cgroup import Hierarchies
from supervisor.config import Config, RuntimeConfig, crun_refuses_host
from supervisor.files import find_program
from supervisor.reaper import Reaper
from supervisor.spawn import spawn_program

PROGRAM_TIMEOUT = 5.0
OUTPUT_LIMIT = 256 * 1024
#: Keys of the configuration that the probe looks at.
PROBED = frozenset({"runtimes", "default_runtime", "containers.apparmor_profile"})
#: Runtimes whose every release since 1.0 joins a user namespace by its path, and whose older ones have no
#: `features` to say so.
JOINS_USER_NAMESPACES = re.compile(r"(?:crun|runc) version (?:[1-9]\d*)\.")
#: Likewise those that make a mount read-only with all below it ("rro"), if the kernel has mount_setattr.
RECURSIVE_READ_ONLY = re.compile(r"crun version (?:1\.(?:[4-9]|\d\d+)|[2-9]|\d\d+)\b")
MOUNT_SETATTR_SINCE = (5, 12)
APPARMOR_DEFAULT = "bulkhead-default"
APPARMOR_PROFILES = "/sys/kernel/security/apparmor/profiles"
#: Where our profile is: installed, or in a clone.
APPARMOR_FILES = (
    f"/etc/apparmor.d/{APPARMOR_DEFAULT}",
    os.path.join(os.path.dirname(os.path.dirname(__file__)), "packaging/common/apparmor", APPARMOR_DEFAULT),
)
OCI_VERSION_OLD = "1.0.2"  # what a runtime without `features` is known to take


class Program:
    """A short-lived program: its output is collected, it is killed when it takes too long."""

    def __init__(
        self,
        loop: Loop,
        reaper: Reaper,
        argv: list[str],
        done: Callable[[int, bytes], object],
        timeout: float = PROGRAM_TIMEOUT,
    ) -> None:
        self._loop = loop
        self._done = done
        self._output = bytearray()
        self._read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.pid = spawn_program(argv, write_fd)
        except OSError:
            os.close(self._read_fd)
            raise
        finally:
            os.close(write_fd)
        loop.add_reader(self._read_fd, self._readable)
        self._timer = loop.call_later(timeout, lambda: os.kill(self.pid, signal.SIGKILL))
        reaper.watch(self.pid, self._ended)

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            piece = os.read(self._read_fd, 65536)
            if piece and len(self._output) < OUTPUT_LIMIT:
                self._output += piece
            elif not piece:
                self._loop.remove_reader(self._read_fd)

    def _ended(self, code: int) -> None:
        self._timer.cancel()
        self._readable()
        self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)
        self._done(code, bytes(self._output))


class HostProbe:
    """Asks the runtimes, then knows a HostInfo."""

    def __init__(
        self,
        loop: Loop,
        reaper: Reaper,
        log: Log,
        *,
        config: Config,
        hierarchies: Hierarchies,
        degraded: list[str],
    ) -> None:
        self._loop = loop
        self._reaper = reaper
        self._log = log
        self._waiting: list[Callable[[HostInfo], object]] = []
        self._open = 0
        self._versions: dict[str, str] = {}  # what --version printed
        self._features: dict[str, Mapping[str, Any]] = {}
        self._config = config
        self._hierarchies = hierarchies
        self._degraded = degraded
        self._outdated = False
        self._info = static_info(config, hierarchies, degraded)

    def start(self) -> None:
        """Start every program."""
        for name, runtime in self._config.runtimes.items():
            self._ask(runtime, "--version", functools.partial(self._version, name))
            self._ask(runtime, "features", functools.partial(self._feature, name))
        if self._info.apparmor:
            self._load_profile()
        self._maybe_done()

    def restart(self, config: Config) -> None:
        """What is probed (PROBED) is configured otherwise: ask anew, when who is asked now has answered."""
        self._config, self._outdated = config, True
        if not self._open:
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._outdated = False
        self._versions.clear()
        self._features.clear()
        self._info = static_info(self._config, self._hierarchies, self._degraded)
        self.start()

    def _load_profile(self) -> None:
        """Give the kernel our AppArmor profile, unless it has it or another one is configured."""
        name = self._config.containers.apparmor_profile
        command = apparmor_command(name, _read(APPARMOR_PROFILES))
        if command:
            self._run(command, functools.partial(self._profile_loaded, name))

    def _profile_loaded(self, name: str, code: int, output: bytes) -> None:
        if code:
            why = output.decode("utf-8", "replace").strip()[:200]
            self._info.degraded.append(f"the AppArmor profile {name} cannot be loaded: {why or code}")

    def when_done(self, callback: Callable[[HostInfo], object]) -> None:
        """Call back with the facts, now or when the last program has ended."""
        if self._open:
            self._waiting.append(callback)
        else:
            callback(self._info)

    def _ask(self, runtime: RuntimeConfig, word: str, done: Callable[[int, bytes], object]) -> None:
        self._run([runtime.path, *runtime.args, word], done)

    def _run(self, argv: list[str], done: Callable[[int, bytes], object]) -> None:
        def ended(code: int, output: bytes) -> None:
            self._open -= 1
            done(code, output)
            self._maybe_done()

        try:
            Program(self._loop, self._reaper, argv, ended)
            self._open += 1
        except OSError as error:
            self._log.warning("program cannot be run", path=argv[0], why=error.strerror)

    def _version(self, name: str, code: int, output: bytes) -> None:
        if code == 0:
            self._versions[name] = output.decode("utf-8", "replace")

    def _feature(self, name: str, code: int, output: bytes) -> None:
        with contextlib.suppress(ValueError):
            parsed = json.loads(output) if code == 0 else None
            if isinstance(parsed, dict):
                self._features[name] = parsed

    def _maybe_done(self) -> None:
        if self._open:
            return
        if self._outdated:
            return self._begin_anew()
        self._info.runtimes = [
            runtime_info(self._config, name, self._versions.get(name, ""), self._features.get(name))
            for name in self._config.runtimes
        ]
        self._info.degraded += [
            f"runtime {r.name}: {r.path} does not run" for r in self._info.runtimes if not r.version
        ]
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback(self._info)


def apparmor_command(name: str, profiles: str) -> list[str]:
    """What loads the AppArmor profile, [] where there is nothing to do or nothing to do it with.

    `profiles` is the kernel's list. A profile of another name is its administrator's to load.
    """
    if name != APPARMOR_DEFAULT or any(line.startswith(f"{name} (") for line in profiles.splitlines()):
        return []
    parser = find_program("apparmor_parser")
    file = next((path for path in APPARMOR_FILES if os.path.isfile(path)), "")
    return [parser, "--replace", "--skip-cache", file] if parser and file else []


def version_of(output: str) -> str:
    """Return the version in the first line of a runtime's --version."""
    found = re.search(r"\d+\.\d+[^\s,]*", output.split("\n", 1)[0])
    return found[0] if found else ""


def runtime_info(config: Config, name: str, version: str, features: Mapping[str, Any] | None) -> RuntimeInfo:
    """Make a RuntimeInfo of what the runtime printed (OCI runtime-spec, features.md).

    A release without `features` is taken to have what its version is known for, and nothing else.
    """
    info = RuntimeInfo(
        name=name,
        path=config.runtimes[name].path,
        version=version_of(version),
        default=name == config.default_runtime,
        known=features is not None,
        oci_version_max=OCI_VERSION_OLD,
        user_namespaces=JOINS_USER_NAMESPACES.match(version) is not None,
        recursive_read_only=features is None and makes_read_only_recursively(version, os.uname().release),
    )
    if features is not None:
        options = features.get("mountOptions")
        info.recursive_read_only = isinstance(options, list) and "rro" in options
        info.idmap = _dig(features, "linux", "mountExtensions", "idmap", "enabled") is True
        known = _dig(features, "linux", "namespaces")
        info.user_namespaces = info.user_namespaces or (isinstance(known, list) and "user" in known)
        newest = features.get("ociVersionMax")
        info.oci_version_max = newest if isinstance(newest, str) else OCI_VERSION_OLD
    return info


def makes_read_only_recursively(version: str, kernel: str) -> bool:
    """Whether a runtime that has no `features` honours "rro", by its --version and the kernel's release."""
    numbers = re.match(r"(\d+)\.(\d+)", kernel)
    new_enough = numbers is not None and (int(numbers[1]), int(numbers[2])) >= MOUNT_SETATTR_SINCE
    return new_enough and RECURSIVE_READ_ONLY.match(version) is not None


def _dig(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def static_info(config: Config, hierarchies: Hierarchies, degraded: list[str]) -> HostInfo:
    """Everything that files can tell."""
    capabilities = [name for name in NAMES if name in effective()]
    info = HostInfo(
        cgroup_version=hierarchies.version,
        cgroup_driver=config.cgroup_manager,
        cgroup_controllers=list(hierarchies.controllers),
        runtimes=[],
        kernel=os.uname().release,
        boot_id=boot_id(),
        seccomp="Seccomp:" in _read("/proc/self/status"),
        apparmor=_read("/sys/module/apparmor/parameters/enabled").strip() == "Y",
        selinux=os.path.exists("/sys/fs/selinux/enforce"),
        swap=len(_read("/proc/swaps").splitlines()) > 1,
        oom_score_floor=oom_score_floor(capabilities),
        capabilities=[f"CAP_{name}" for name in capabilities],
        degraded=list(degraded),
    )
    if "crun" in config.runtimes and crun_refuses_host():
        info.degraded.append(
            "crun refuses hybrid hosts whose cgroup2 mount has controllers: "
            f"{config.default_runtime} is the default runtime"
        )
    if "SYS_RESOURCE" not in capabilities:
        info.degraded.append(
            "CAP_SYS_RESOURCE is missing: hard limits cannot be raised, OOM scores not lowered "
            f"below {info.oom_score_floor}"
        )
    return info


def oom_score_floor(capabilities: list[str]) -> int:
    """Without CAP_SYS_RESOURCE a score below the lowest ever set (here: our own) is refused."""
    if "SYS_RESOURCE" in capabilities:
        return -1000
    own = _read("/proc/self/oom_score_adj").strip()
    return int(own) if own else 0


def boot_id() -> str:
    """The kernel's name for this boot."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""
