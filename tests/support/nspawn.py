"""Runs in: the tests.

A container with a systemd of its own (systemd-nspawn, cgroup v2 without controllers), up in a second: for
what packages and the service manager do. It boots the root file system of tests/support/vm_image.py below a
writable layer in memory, sees the project read-only at its own path and a directory of the test's as
/share, and runs /share/payload with the project as working directory. It has no network but loopback. All
of it stands in a mount and a PID namespace and in a cgroup, which are gone afterwards.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support import vm_image
from tests.support.vm import Outcome

MACHINE = "bulkhead-test"

UNIT = """[Unit]
Description=Payload of a test
Requires=basic.target dbus.socket
After=basic.target dbus.socket

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'cd "$REPO" && sh /share/payload; echo $? >/share/exit-code'
ExecStopPost=/bin/systemctl --force --force poweroff
Environment=REPO={repo}
StandardOutput=file:/share/console
StandardError=file:/share/console
"""

#: The tests hide this hierarchy from their own daemons (tests/support/machine.py).
SEE_UNIFIED = """
if [ "$(stat -f -c %T /sys/fs/cgroup/unified)" != cgroup2fs ]; then
    umount /sys/fs/cgroup/unified 2>/dev/null || true
    mount -t cgroup2 none /sys/fs/cgroup/unified
fi
"""

#: In a mount namespace of its own: $1 is the image, $2 a directory for mounts, the rest the command.
MOUNTS = f"""
set -e
image=$1 work=$2 group=$3
shift 3
{SEE_UNIFIED}
mkdir /sys/fs/cgroup/unified/$group
echo $$ >/sys/fs/cgroup/unified/$group/cgroup.procs
cd "$work"
mkdir lower layer root
mount -o loop,ro "$image" lower
mount -t tmpfs -o mode=755 none layer
mkdir layer/upper layer/work
mount -t overlay -o "lowerdir=$work/lower,upperdir=$work/layer/upper,workdir=$work/layer/work" none root
mount -t tmpfs none root/var/lib  # for what Bulkhead mounts: no overlay stands upon an overlay
cp -a lower/var/lib/. root/var/lib
cp unit root/etc/systemd/system/payload.service
exec "$@"
"""

REMOVAL = f"""
{SEE_UNIFIED}
for try in $(seq 100); do
    find /sys/fs/cgroup/unified/$1 /sys/fs/cgroup/systemd/$1 -depth -type d -exec rmdir {{}} + 2>/dev/null
    [ -e /sys/fs/cgroup/unified/$1 ] || [ -e /sys/fs/cgroup/systemd/$1 ] || exit 0
    sleep 0.1
done
exit 1
"""


def run(payload: str, share: Path, seconds: float) -> Outcome:
    """Boot, run the payload (a shell script), wait at most so many seconds for the end."""
    image = vm_image.path()
    assert image.exists(), f"{image} is missing: make vm-image builds it (tests have no network)"
    (share / "payload").write_text(payload)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bh-nspawn-") as directory:
        text = _boot(Path(directory), image, share, seconds)
    taken = time.monotonic() - began
    ended, console = share / "exit-code", share / "console"
    if console.exists():
        text += console.read_text(errors="replace")
    return Outcome(int(ended.read_text()) if ended.exists() else None, taken, text)


def _boot(directory: Path, image: Path, share: Path, seconds: float) -> str:
    (directory / "unit").write_text(UNIT.format(repo=vm_image.REPO))
    name = f"{MACHINE}-{os.getpid()}"
    nspawn = [
        *("systemd-nspawn", "--quiet", f"--directory={directory}/root", f"--machine={name}", "--boot"),
        *("--capability=all", "--private-network", "--register=no", "--keep-unit", "--console=pipe"),
        *("--tmpfs=/var/tmp", "--bind=/dev/fuse", f"--bind-ro={vm_image.REPO}", f"--bind={share}:/share"),
        *("systemd.unit=payload.service", "systemd.show_status=false", "systemd.log_target=null"),
    ]
    environment = {
        "PATH": os.environ["PATH"],
        "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
        "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1",
        "SYSTEMD_SECCOMP": "0",
    }
    mounts = ["sh", "-c", MOUNTS, "sh", str(image), str(directory), name]
    spaces = [*("setpriv", "--pdeathsig", "KILL"), *("unshare", "--mount", "--propagation", "private")]
    spaces += ["--pid", "--mount-proc", "--fork", "--kill-child", "--"]
    try:
        done = subprocess.run(
            [*spaces, *mounts, *nspawn],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
        return done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as expired:
        return (expired.stdout or b"").decode(errors="replace")
    finally:
        _remove_groups(name)


def _remove_groups(name: str) -> None:
    """Remove the machine's groups from both hierarchies, as soon as its last process is gone."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", REMOVAL, "sh", name]
    subprocess.run(command, timeout=30, check=True)
