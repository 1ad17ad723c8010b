"""Runs in: `make test`, before the tests, for these have no network (`python -m tests.support.vm_image`).

Builds the root file system of the virtual machines out of tests/vm/recipe/: Debian's packages by mmdebstrap,
the modules of the user-mode-linux kernel, a few files; then an ext4 image of it. The image is kept in
.cache/vm/ under a hash of all that went into it, and built again when any of that has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "tests/vm/recipe"
CACHE = REPO / ".cache/vm"
MODULES = Path("/usr/lib/uml/modules")
SIZE = "2G"  # of a sparse file, a quarter of it in use
#: Files of packages that no test reads.
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


def words(name: str) -> list[str]:
    """Return the lines of one of the recipe's lists."""
    return (RECIPE / name).read_text().split()


def suite() -> str:
    """Return the Debian release of this machine: the environment's Python must be in the image too."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise SystemExit("vm image: /etc/os-release names no release of Debian")


def kernel_release() -> str:
    """Return the release of the user-mode-linux kernel that is installed."""
    releases = sorted(entry.name for entry in MODULES.iterdir()) if MODULES.is_dir() else []
    if not releases:
        raise SystemExit("vm image: package user-mode-linux is not installed (make system-vm)")
    return releases[-1]


def fingerprint() -> str:
    """Return the hash of everything that the image is made of."""
    digest = hashlib.sha256(f"{suite()} {kernel_release()} {SIZE}".encode())
    digest.update(Path(__file__).read_bytes())
    for path in sorted(path for path in RECIPE.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(RECIPE)} {path.stat().st_mode:o}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def path() -> Path:
    """Return where the image is, or will be."""
    return CACHE / f"{fingerprint()}.ext4"


def ensure() -> Path:
    """Build the image unless it is there; return its path. Others that build it are waited for."""
    image = path()
    with _lock():
        if not image.exists():
            for old in CACHE.glob("*.ext4"):
                old.unlink()
            _build(image)
    return image


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(image: Path) -> None:
    began = time.monotonic()
    print(f"building the root file system of the virtual machines ({suite()})", flush=True)
    # Package scripts fsync a lot: memory is quicker, where there is enough.
    with tempfile.TemporaryDirectory(prefix="bh-rootfs-", dir=scratch(1 << 30)) as directory:
        root = Path(directory) / "root"
        _bootstrap(root)
        _add_modules(root)
        _add_files(root)
        _pack(root, image)
    print(f"built in {time.monotonic() - began:.0f} s: {image.relative_to(REPO)}", flush=True)


def scratch(room: int) -> str | None:
    """Return a directory in memory with that much room, None for the usual one."""
    with contextlib.suppress(OSError):
        facts = os.statvfs("/dev/shm")
        if facts.f_bavail * facts.f_frsize > room and not facts.f_flag & (os.ST_NOEXEC | os.ST_NODEV):
            return "/dev/shm"
    return None


def _run(*command: str | Path) -> None:
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace")[-4000:])
        raise SystemExit(f"vm image: {command[0]} failed")


def _bootstrap(root: Path) -> None:
    _run(
        *("mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(words('packages'))}"),
        *("--dpkgopt=force-unsafe-io", '--aptopt=Acquire::Languages "none"'),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED),
        *(suite(), root),
    )
    # The kernel has no nf_tables for IPv4.
    _run("chroot", root, "update-alternatives", "--set", "iptables", "/usr/sbin/iptables-legacy")
    _run("chroot", root, "update-alternatives", "--set", "ip6tables", "/usr/sbin/ip6tables-legacy")


def _add_modules(root: Path) -> None:
    release = kernel_release()
    source, target = MODULES / release, root / "lib/modules" / release
    target.mkdir(parents=True)
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(source / index, target / index)
    for directory in words("kernel-modules"):
        shutil.copytree(source / "kernel" / directory, target / "kernel" / directory)
    _run("chroot", root, "depmod", release)


def _add_files(root: Path) -> None:
    shutil.copytree(RECIPE / "files", root, dirs_exist_ok=True)
    for unit in words("masked-units"):
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    (root / "etc/machine-id").write_text(hashlib.md5(b"bulkhead", usedforsecurity=False).hexdigest() + "\n")


def _pack(root: Path, image: Path) -> None:
    unfinished = image.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    # No journal: the disk of a test is thrown away with it.
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", root, unfinished, SIZE)
    unfinished.rename(image)


if __name__ == "__main__":
    ensure()
