"""Runs in: `bulkhead info`.

What this host can and cannot do for containers, and what to do about it: one small question per line of the
answer, asked of files, of the kernel and of the programs that are configured. It needs no running daemon and
changes nothing.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ipc.capabilities import NAMES, effective
from supervisor import cgroup, trust
from supervisor.config import Config, RuntimeConfig, crun_refuses_host
from supervisor.configfile import ConfigError
from supervisor.files import find_program
from supervisor.hostinfo import version_of
from supervisor.sandbox import landlock

OLDEST_KERNEL = (5, 13)
PROGRAM_TIMEOUT = 10.0


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, limited (something is missing that not every pod needs) or missing."""

    subject: str
    state: str
    what: str
    advice: str = ""


def findings(config: Config) -> list[Finding]:
    """Ask everything."""
    return [finding for question in QUESTIONS for finding in question(config)]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _run(*command: str) -> str | None:
    """What a program printed, None if it failed or took too long."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=PROGRAM_TIMEOUT,
            text=True,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _kernel(_config: Config) -> Iterator[Finding]:
    release = os.uname().release
    numbers = tuple(int(part) for part in release.split("-")[0].split("+")[0].split(".")[:2])
    old = numbers < OLDEST_KERNEL
    advice = "5.13 or later has everything that is used; what is missing is named below" if old else ""
    yield Finding("kernel", "limited" if old else "ok", f"Linux {release} {os.uname().machine}", advice)


def _cgroups(config: Config) -> Iterator[Finding]:
    found = cgroup.detect()
    wanted = {"cpu", "memory", "pids"}
    missing = sorted(wanted - set(found.controllers) - ({"cpu"} if "cpuacct" in found.controllers else set()))
    what = f"version {found.version}, controllers {' '.join(found.controllers) or 'none'}"
    if missing:
        advice = (
            f"limits of {', '.join(missing)} cannot be set: enable them (kernel parameters cgroup_enable=...)"
        )
        yield Finding("cgroups", "missing" if "memory" in missing else "limited", what, advice)
    else:
        yield Finding("cgroups", "ok", what)
    if found.version == 1:
        yield Finding(
            "cgroup version",
            "limited",
            "1 is outdated; kubelets refuse it unless told otherwise",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    systemd = os.path.isdir("/run/systemd/system")
    wrong = config.cgroup_manager == "systemd" and not systemd
    advice = 'set cgroup_manager = "cgroupfs"' if wrong else "the kubelet's cgroupDriver must be the same"
    yield Finding("cgroup driver", "missing" if wrong else "ok", config.cgroup_manager, advice)


def _privileges(_config: Config) -> Iterator[Finding]:
    if os.geteuid() != 0:
        yield Finding(
            "privileges", "limited", "not asked as root", "ask again as root: the answers are better"
        )
        return
    missing = [f"CAP_{name}" for name in NAMES if name not in effective()]
    if not missing:
        yield Finding("privileges", "ok", "root with every capability")
        return
    advice = "containers cannot have what is missing"
    if "CAP_SYS_RESOURCE" in missing:
        advice += "; hard limits cannot be raised, OOM scores not lowered"
    yield Finding("privileges", "limited", f"root without {', '.join(missing)}", advice)


def _file_systems(config: Config) -> Iterator[Finding]:
    known = {line.split()[-1] for line in _read("/proc/filesystems").splitlines()}
    if "overlay" in known:
        yield Finding("overlayfs", "ok", "the kernel has it")
    else:
        loadable = _run("modprobe", "--dry-run", "overlay") is not None
        state = "ok" if loadable else "missing"
        yield Finding("overlayfs", state, "a module" if loadable else "not there", "modprobe overlay")
    place = config.root
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    facts = os.statvfs(place)
    free = facts.f_bavail * facts.f_frsize / 2**30
    full = free < 5
    yield Finding(
        "disk",
        "limited" if full else "ok",
        f"{free:.1f} GiB free for {config.root}",
        "the kubelet begins to remove images at 85 % use" if full else "",
    )
    quota = any(option in _mount_options(place) for option in ("prjquota", "pquota"))
    yield Finding(
        "project quotas",
        "ok" if quota else "limited",
        "on" if quota else "off: what a pod writes is measured, not limited",
        "" if quota else "ext4 or xfs mounted with prjquota, if pods' writes are to be limited by the kernel",
    )


def _mount_options(path: str) -> set[str]:
    best: tuple[int, set[str]] = (-1, set())
    for line in _read("/proc/self/mountinfo").splitlines():
        fields = line.split()
        where = fields[4].rstrip("/")
        if (path == where or path.startswith(f"{where}/")) and len(where) > best[0]:
            best = (len(where), {*fields[5].split(","), *fields[-1].split(",")})
    return best[1]


def _security(_config: Config) -> Iterator[Finding]:
    seccomp = "Seccomp:" in _read("/proc/self/status")
    yield Finding("seccomp", "ok" if seccomp else "missing", "on" if seccomp else "the kernel has none")
    apparmor = _read("/sys/module/apparmor/parameters/enabled").strip() == "Y"
    if apparmor:
        parser = find_program("apparmor_parser")
        advice = "" if parser else "install the package apparmor, so that profiles can be loaded"
        yield Finding("AppArmor", "ok" if parser else "limited", "on", advice)
    selinux = _read("/sys/fs/selinux/enforce").strip()
    if selinux:
        yield Finding("SELinux", "ok", "enforcing" if selinux == "1" else "permissive")
    if not apparmor and not selinux:
        yield Finding(
            "AppArmor, SELinux",
            "limited",
            "neither",
            "pods that name a profile are refused; others run without",
        )
    version = landlock.abi()
    text = f"ABI {version}" if version else "off"
    yield Finding("Landlock", "ok" if version else "limited", text, "" if version else _NO_LANDLOCK)
    most = int(_read("/proc/sys/user/max_user_namespaces").strip() or 0)
    yield Finding(
        "user namespaces",
        "ok" if most else "limited",
        f"up to {most}" if most else "off",
        "" if most else "sysctl user.max_user_namespaces=65536, for pods with hostUsers: false",
    )


_NO_LANDLOCK = "workers are shut in by everything else; add landlock to the kernel parameter lsm="


def _runtimes(config: Config) -> Iterator[Finding]:
    for name, runtime in config.runtimes.items():
        output = _run(runtime.path, *runtime.args, "--version")
        if output is None:
            yield Finding(f"runtime {name}", "missing", f"{runtime.path} does not run", f"install {name}")
            continue
        default = ", the default" if name == config.default_runtime else ""
        yield Finding(
            f"runtime {name}", "ok", f"{version_of(output)} at {runtime.path}{default}{_features(runtime)}"
        )
    if "crun" in config.runtimes and crun_refuses_host():
        yield Finding("crun", "limited", "refuses hybrid hosts with controllers in version 2", "runc is used")


def _features(runtime: RuntimeConfig) -> str:
    output = _run(runtime.path, *runtime.args, "features")
    try:
        linux = json.loads(output or "{}").get("linux", {})
    except ValueError:
        return ""
    named = {
        "idmapped mounts": linux.get("mountExtensions", {}).get("idmap", {}).get("enabled"),
        "user namespaces": "user" in linux.get("namespaces", []),
        "cgroup v2": linux.get("cgroup", {}).get("v2"),
    }
    found = [name for name, there in named.items() if there]
    return f"; {', '.join(found)}" if found else ""


def _networks(config: Config) -> Iterator[Finding]:
    for directory in config.cni.bin_dirs:
        plugins = len(glob.glob(f"{directory}/*"))
        if plugins:
            yield Finding("CNI plugins", "ok", f"{plugins} in {directory}")
            break
    else:
        directories = " or ".join(config.cni.bin_dirs)
        yield Finding(
            "CNI plugins", "missing", f"none in {directories}", "install containernetworking-plugins"
        )
    files = [
        path for kind in ("conflist", "conf", "json") for path in glob.glob(f"{config.cni.conf_dir}/*.{kind}")
    ]
    yield Finding(
        "CNI network",
        "ok" if files else "limited",
        os.path.basename(sorted(files)[0]) if files else f"none in {config.cni.conf_dir}",
        "" if files else "pods with a network of their own wait for one: install a network plugin",
    )
    filters = [name for name in ("nft", "iptables") if find_program(name)]
    advice = "" if filters else "install iptables or nftables, for host ports and masquerading"
    yield Finding("packet filter", "ok" if filters else "limited", " ".join(filters) or "none", advice)
    forward = _read("/proc/sys/net/ipv4/ip_forward").strip() == "1"
    yield Finding(
        "forwarding",
        "ok" if forward else "limited",
        "on" if forward else "off",
        "" if forward else "sysctl net.ipv4.ip_forward=1, unless the network plugin does it",
    )


def _policy(config: Config) -> Iterator[Finding]:
    try:
        found = trust.load(config.image)
    except ConfigError as error:
        yield Finding("image policy", "missing", str(error), "the service does not start with it")
        return
    if found.policy is None and not found.namespaces:
        text = f"no {config.image.policy}"
        yield Finding("image policy", "ok", f"{text}: images need no signature")
        return
    lacking = trust.unsupported(found)
    needs = [name for name, program in (("OpenPGP", found.gpgv), ("sigstore", found.openssl)) if program]
    what = f"{config.image.policy}: {' and '.join(needs) or 'no'} signatures"
    spaces = f"; {len(found.namespaces)} namespaces with their own" if found.namespaces else ""
    yield Finding("image policy", "limited" if lacking else "ok", what + spaces, "; ".join(lacking))


def _extras(_config: Config) -> Iterator[Finding]:
    criu = find_program("criu")
    works = _run(criu, "check") is not None if criu else False
    text = "works" if works else "there, but `criu check` fails" if criu else "not installed"
    yield Finding(
        "CRIU", "ok" if works else "limited", text, "" if works else "for checkpoints of containers only"
    )
    swap = len(_read("/proc/swaps").splitlines()) > 1
    yield Finding(
        "swap", "limited" if swap else "ok", "on" if swap else "off",
        "the kubelet's failSwapOn must be false" if swap else "",
    )  # fmt: skip
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", "ok", python)


QUESTIONS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    _kernel,
    _privileges,
    _cgroups,
    _file_systems,
    _security,
    _runtimes,
    _networks,
    _policy,
    _extras,
)
