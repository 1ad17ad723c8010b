"""Runs in: the tests.

Code inside a worker's real sandbox: `inside(kind, function)` forks, enters the process table's entry of that
kind with directories of the test's own, calls the function there and brings its result back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ipc.messages.supervisor import SandboxReport
from supervisor import sandbox
from supervisor.table import TABLE

#: Users that exist nowhere: every kind has its own, storage and network are root.
UIDS = {"cri": 61001, "image": 61002, "stream": 61003, "ops": 61004, "nri": 61005, "storage": 0, "network": 0}


@dataclass
class Host:
    """The directories of one instance, as the supervisor would have made them."""

    base: Path

    @property
    def run_root(self) -> Path:
        return self.base / "run"

    @property
    def paths(self) -> dict[str, str]:
        """The templates of the views."""
        return {
            "root": f"{self.base}/lib",
            "run_root": f"{self.run_root}",
            "bind_directory": f"{self.run_root}/bind",
            "registries_conf": f"{self.base}/registries.conf",
            "registries_conf_dir": f"{self.base}/registries.conf.d",
            "certs_dirs": f"{self.base}/certs.d:{self.base}/certs2.d",
            "auth_file": "",
            "signatures": f"{self.base}/signatures",
            "stream_tls": f"{self.base}/tls",
            "ops_tls": f"{self.base}/ops-tls",
        }


@contextlib.contextmanager
def host() -> Iterator[Host]:
    """Directories in a place of their own, gone afterwards."""
    base = Path(tempfile.mkdtemp(prefix="bh-sandbox-"))
    here = Host(base)
    try:
        for name in ("ipc", "monitors", "cri", "bind"):
            (here.run_root / name).mkdir(parents=True)
        for name in ("cri", "bind"):
            os.chown(here.run_root / name, UIDS["cri"], UIDS["cri"])
        for name in ("cri", "image", "storage", "network", "stream", "nri", "supervisor", "log"):
            (here.run_root / "ipc" / f"{name}.sock").touch()
        (base / "certs.d").mkdir()
        yield here
    finally:
        shutil.rmtree(base)


@dataclass
class Outcome:
    """What happened inside: the report of `enter`, the function's result."""

    report: SandboxReport
    value: Any


def inside(kind: str, function: Callable[[], Any], where: Host) -> Outcome:
    """Run `function` in the sandbox of `kind`; its JSON-able result comes back, its exception is raised."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        _child(kind, function, where, write_fd)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        raw = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert raw, f"the {kind} sandbox ended its process: {status}"
    answer = json.loads(raw)
    assert "error" not in answer, answer["error"]
    return Outcome(msgspec.convert(answer["report"], SandboxReport), answer["value"])


def _child(kind: str, function: Callable[[], Any], where: Host, write_fd: int) -> None:
    """Never returns: whatever happens, it must not run the tests' own cleanup."""
    signal.alarm(30)
    try:
        report = enter(kind, where)
        answer = {"report": msgspec.to_builtins(report), "value": function()}
    except BaseException:  # noqa: BLE001 - told to the parent, and the process ends
        answer = {"error": traceback.format_exc()}
    with os.fdopen(write_fd, "wb") as pipe:
        pipe.write(json.dumps(answer).encode())
    os._exit(0)


def enter(kind: str, where: Host) -> SandboxReport:
    """Enter the sandbox of `kind` for good."""
    entry = TABLE[kind].sandbox
    assert entry is not None
    uid = UIDS[kind]
    return sandbox.enter(entry, sandbox.Identity(uid, uid), where.paths)


def attempt(function: Callable[..., object], *arguments: object) -> str:
    """ "ok", or the name of the errno."""
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"
