"""Runs in: `make bench`, or alone as `python -m tests.bench.bench_monitor` (as root).

What a monitor costs, against Debian's conmon and the bare OCI runtime on the same machine in the same run:
log throughput of one container, memory of one among many, ExecSync of `true`.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ipc.messages import monitor as messages
from tests.bench.figures import Figure, at_most, show, timed
from tests.support import machine
from tests.support.monitor_process import MonitorProcess, Wish, busybox_root, monitor, until

RUNTIME = "crun"
LINES = b"x" * 99 + b"\n"
LOG_BYTES = 400 * 1024 * 1024
LOG_ROUNDS = 5
EXEC_ROUNDS = 60
MONITORS = 50
CONMONS = 20
MIB = 1024 * 1024


def _at_least(name: str, ours: float, baseline: float, bound: float) -> Figure:
    ratio = ours / baseline
    shown = (f"{ours:.0f} MiB/s", f"{baseline:.0f} MiB/s", f"{ratio:.2f}")
    return Figure(name, *shown, f"at least {bound}", ratio >= bound)


def _below(name: str, ours: float, conmons: float, bound: float) -> Figure:
    shown = (f"{ours:.2f} MB", f"{conmons:.2f} MB", f"{ours / conmons:.2f}")
    return Figure(name, *shown, f"at most {bound} MB", ours <= bound)


@contextlib.contextmanager
def _root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bhbench-", dir="/tmp") as base:
        yield busybox_root(Path(base) / "rootfs")


# -- log ----------------------------------------------------------------------------------------------


def measure_log() -> list[Figure]:
    """The same container writes the same lines, logged by a monitor and by conmon, in turns."""
    with _root() as root:
        (root / "lines").write_bytes(LINES * (LOG_BYTES // len(LINES)))
        timed_monitor(root)  # brings the lines into the page cache
        ours, theirs = [], []
        for _ in range(LOG_ROUNDS):
            ours.append(timed_monitor(root))
            theirs.append(timed_conmon(root))
    speed = [LOG_BYTES / MIB / statistics.median(times) for times in (ours, theirs)]
    return [_at_least("log throughput, against conmon", speed[0], speed[1], 3)]


@contextlib.contextmanager
def _log_in_memory(process: MonitorProcess) -> Iterator[None]:
    """Log to the machine's tmpfs: the disk is not what is compared."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        process.log_path = Path(directory) / "logs" / "0.log"
        yield


def timed_monitor(root: Path) -> float:
    """Seconds from the container's start to its exit record."""
    with monitor(root, RUNTIME) as process, _log_in_memory(process):
        process.create("cat", "/lines")
        seconds = timed(lambda: _start_and_wait(process))
        _check(process.log_path)
        return seconds


def _start_and_wait(process: MonitorProcess) -> None:
    client = process.client()
    client.call(messages.Start())
    client.call(messages.Wait(), timeout=300)


def timed_conmon(root: Path) -> float:
    """The same with conmon: from the start to its exit file."""
    with conmon(root, "cat", "/lines") as process:
        exits = process.directory / "exits"
        seconds = timed(lambda: _conmon_start_and_wait(process, exits))
        _check(process.log_path)
        return seconds


@contextlib.contextmanager
def conmon(root: Path, *args: str) -> Iterator[MonitorProcess]:
    """A container created by conmon; its pid is that of conmon."""
    with monitor(root, RUNTIME) as process, _log_in_memory(process):
        bundle = _conmon_bundle(process, *args)
        for directory in (process.directory / "exits", process.log_path.parent):
            directory.mkdir(parents=True)
        subprocess.run(_conmon_command(process, bundle), check=True)
        until((bundle / "pid").exists)
        conmon_pid = int((bundle / "conmon.pid").read_text())
        try:
            yield process
        finally:
            subprocess.run([*_bare_runtime(process), "delete", "--force", process.id], check=True)
            until(lambda: not Path(f"/proc/{conmon_pid}").exists())


def _bare_runtime(process: MonitorProcess) -> list[str]:
    return [f"/usr/bin/{RUNTIME}", "--root", str(process.runtime_root)]


def _conmon_command(process: MonitorProcess, bundle: Path) -> list[str]:
    return [
        *("conmon", "-c", process.id, "-u", process.id, "-n", "c", "-r", f"/usr/bin/{RUNTIME}"),
        *("-b", str(bundle), "-p", str(bundle / "pid"), "-P", str(bundle / "conmon.pid")),
        *("-l", f"k8s-file:{process.log_path}", "--exit-dir", str(process.directory / "exits")),
        *("--socket-dir-path", str(process.directory), "--no-sync-log", "--full-attach"),
        *("--runtime-arg", f"--root={process.runtime_root}"),
    ]


def _conmon_bundle(process: MonitorProcess, *args: str) -> Path:
    bundle = process.directory / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text(json.dumps(process.spec(Wish(list(args)))))
    return bundle


def _conmon_start_and_wait(process: MonitorProcess, exits: Path) -> None:
    subprocess.run([*_bare_runtime(process), "start", process.id], check=True)
    while not (exits / process.id).exists():
        time.sleep(0.001)


def _check(log: Path) -> None:
    expected = LOG_BYTES // len(LINES)
    with log.open("rb") as file:
        lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(MIB), b""))
    assert lines >= expected, (lines, expected)


# -- exec ---------------------------------------------------------------------------------------------


def measure_exec() -> list[Figure]:
    """ExecSync of `true` against the runtime's exec by hand in the same container."""
    with _root() as root, monitor(root, RUNTIME) as process:
        process.run("sleep", "1000")
        client = process.client()
        spec = process.process(["true"])
        bare = [*_bare_runtime(process), "exec", process.id, "true"]
        ours, theirs = [], []
        for _ in range(EXEC_ROUNDS):  # in turns, so that the machine's moods meet both
            ours.append(timed(lambda: client.call(messages.ExecSync(process=spec))))
            theirs.append(timed(lambda: _bare(bare)))
        process.stop(grace_ms=0)
    medians = statistics.median(ours), statistics.median(theirs)
    return [at_most(f"ExecSync of true, against {RUNTIME} exec", *medians, 1.5)]


def _bare(argv: list[str]) -> None:
    pid = os.posix_spawn(argv[0], argv, dict(os.environ))
    assert os.waitpid(pid, 0)[1] == 0


# -- memory -------------------------------------------------------------------------------------------


def measure_memory() -> list[Figure]:
    """Private memory and PSS of a monitor, medians over MONITORS containers that have been used."""
    private, proportional = monitor_memory()
    conmon_private, conmon_pss = conmon_memory()
    return [
        _below(f"monitor, private memory, {MONITORS} containers", private, conmon_private, 0.7),
        _below(f"monitor, PSS, {MONITORS} containers", proportional, conmon_pss, 1.0),
    ]


def monitor_memory() -> tuple[float, float]:
    """Monitors of a small, quiet parent, whose containers have logged and been executed into."""
    with _root() as root, contextlib.ExitStack() as stack:
        processes = [stack.enter_context(monitor(root, RUNTIME)) for _ in range(MONITORS)]
        for process in processes:
            process.run_root = processes[0].run_root
            process.directory = process.run_root / "monitors" / process.id
        stack.enter_context(_parent(processes))
        for process in processes:
            process.sh("echo one; echo two >&2; sleep 1000")
            process.exec("true")
        figures = [memory_of(process.pid) for process in processes]
        for process in processes:
            process.stop(grace_ms=0)
    private, proportional = (statistics.median(column) for column in zip(*figures, strict=True))
    return private, proportional


@contextlib.contextmanager
def _parent(processes: list[MonitorProcess]) -> Iterator[None]:
    """The process whose children the monitors are; ends when they have."""
    command = [sys.executable, "-m", "tests.support.monitor_parent", str(processes[0].run_root)]
    ids = [process.id for process in processes]
    with subprocess.Popen([*command, *ids], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        for process in processes:
            process.adopt(int(parent.stdout.readline()))
        try:
            yield
        finally:
            for process in processes:
                until(lambda process=process: not process.alive())


def conmon_memory() -> tuple[float, float]:
    """Medians of some conmons that keep a sleeping container each."""
    with _root() as root, contextlib.ExitStack() as stack:
        processes = [stack.enter_context(conmon(root, "sleep", "1000")) for _ in range(CONMONS)]
        for process in processes:
            subprocess.run([*_bare_runtime(process), "start", process.id], check=True)
        pids = [(process.directory / "bundle/conmon.pid").read_text() for process in processes]
        figures = [memory_of(int(pid)) for pid in pids]
    private, proportional = (statistics.median(column) for column in zip(*figures, strict=True))
    return private, proportional


def memory_of(pid: int) -> tuple[float, float]:
    """Return private memory and PSS in MB."""
    rollup = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    kib = {name: int(value.split()[0]) for name, value in rollup.items()}
    return (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024, kib["Pss"] / 1024


def measure() -> list[Figure]:
    """Every figure of the monitor."""
    return [*measure_exec(), *measure_memory(), *measure_log()]


if __name__ == "__main__":
    machine.enter()
    show(measure())
