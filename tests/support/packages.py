"""Runs in: the tests.

The packages that are tested: built by packaging/build out of this tree, with quick compression, once for a
state of the tree. They lie in .cache/packages/ under a hash of all that goes into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / ".cache/packages"
PATTERN = "?" * 16  # what fingerprints look like; there is one at a time
SOURCES = ("ipc", "supervisor", "workers", "packaging", "docs")
FILES = ("LICENSE", "README.md", "requirements.lock", "pyproject.toml")
#: what is built: kind, build number, and the name's beginning
BUILDS = {"deb1": ("deb", "1"), "deb2": ("deb", "2"), "rpm1": ("rpm", "1"), "rpm2": ("rpm", "2")}
QUICK = {"DPKG_DEB_COMPRESSOR_TYPE": "gzip", "DPKG_DEB_COMPRESSOR_LEVEL": "1", "RPM_PAYLOAD": "w1.gzdio"}


def fingerprint() -> str:
    """Return the hash of everything that packages are made of."""
    digest = hashlib.sha256()
    found = [path for name in SOURCES for path in (REPO / name).rglob("*") if path.is_file()]
    for path in sorted([*found, *(REPO / name for name in FILES)]):
        if path.suffix != ".pyc":
            digest.update(f"{path.relative_to(REPO)} {path.stat().st_mode:o}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def directory() -> Path:
    """Return where the packages of this state are, or will be."""
    return CACHE / fingerprint()


def package(name: str) -> Path:
    """Return a package (a key of BUILDS) that `built` has made."""
    return next(CACHE.glob(f"{PATTERN}/{name}/*"))


def built() -> Path:
    """Build every package that is not there; others that build are waited for. Raises AssertionError."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = directory()
        if not target.exists():
            for old in CACHE.glob(PATTERN):
                shutil.rmtree(old)
            _build(target)
    return target


def _build(target: Path) -> None:
    unfinished = target.with_suffix(".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    for kinds in (("deb1", "rpm1"), ("deb2", "rpm2")):  # two at a time, and never two of one kind
        running = [_start(name, unfinished / name) for name in kinds]
        for process in running:
            output, _ = process.communicate()
            assert process.returncode == 0, output[-4000:]
    unfinished.rename(target)


def _start(name: str, output: Path) -> subprocess.Popen[str]:
    kind, number = BUILDS[name]
    command = [str(REPO / "packaging/build"), kind, number, str(output)]
    environment = {"PATH": os.environ["PATH"], "HOME": "/root", **QUICK}
    return subprocess.Popen(
        command,
        cwd=REPO,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
