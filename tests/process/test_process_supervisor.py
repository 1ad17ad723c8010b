"""The supervisor as a process, with fake workers that fail to order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc import kernel
from ipc.blocking import Client
from ipc.errors import Code, RemoteError
from ipc.messages import Request, monitor, storage
from ipc.messages import supervisor as messages
from tests.support.leaks import mounts
from tests.support.supervisor_process import CONFIG, REPOSITORY, Instance, eventually, running

POD, CONTAINER = "p" * 12, "c" * 12
TEST_PARENT = f"bulkhead-test-pod-{os.getpid()}"


@pytest.fixture
def instance() -> Iterator[Instance]:
    with running() as made:
        yield made


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_is_replaced_at_once_and_its_callers_only_wait(instance: Instance) -> None:
    first = instance.served_by("storage")
    with instance.client("storage") as client:
        client.call(storage.FsInfoGet())
        os.kill(first, signal.SIGKILL)
        before = time.monotonic()
        assert client.call(storage.FsInfoGet()).used_bytes != first
        assert time.monotonic() - before < 1.0
    row = instance.worker("storage")
    assert row.restarts == 1
    assert row.last_death.startswith("signal 9 (SIGKILL) at ")
    assert "SIGKILL" in (instance.run_root / "tally/storage").read_text()


def test_a_worker_that_others_kill_again_and_again_is_replaced_at_once_every_time() -> None:
    with running(CONFIG + "failed_deaths = 2\n") as instance:
        for _ in range(3):
            serving = instance.served_by("storage")
            time.sleep(1.0)
            os.kill(serving, signal.SIGKILL)
            before = time.monotonic()
            assert instance.served_by("storage") != serving
            assert time.monotonic() - before < 1.0
        assert (instance.worker("storage").state, instance.worker("storage").restarts) == ("ready", 3)


def test_a_crash_loop_becomes_failed_and_the_supervisor_and_the_others_go_on() -> None:
    with running(CONFIG.replace("slow_retry = 30.0", "max_delay = 1.0\nfailed_deaths = 3")) as instance:
        instance.fault("network", "crash")
        os.kill(instance.worker("network").pid, signal.SIGKILL)
        eventually(lambda: instance.worker("network").state == "failed")
        assert any("failed: network" in n for n in drain(instance))
        assert instance.served_by("storage")
        instance.fault("network", "")
        with instance.client() as client:
            client.call(messages.WorkerRestart(kind="network"))
        eventually(lambda: instance.worker("network").state == "ready")


def drain(instance: Instance) -> list[str]:
    instance.signal(signal.SIGHUP)
    instance.await_notice("READY=1")
    return instance.notified


def test_a_worker_whose_sandbox_is_not_as_declared_is_killed_and_its_kind_failed(instance: Instance) -> None:
    instance.fault("network", "lie")
    os.kill(instance.worker("network").pid, signal.SIGKILL)
    eventually(lambda: instance.worker("network").state == "failed")
    assert 'msg="sandbox is not as the table says"' in instance.log()
    assert 'fault="uid: not as declared"' in instance.log()


def test_a_worker_that_answers_no_pings_shows_its_stack_and_is_replaced(instance: Instance) -> None:
    instance.fault("storage", "hang")
    with instance.client() as client:
        client.call(messages.WorkerRestart(kind="storage"))
    eventually(lambda: instance.worker("storage").state == "ready")
    hung = instance.worker("storage").pid
    with Client(f"{instance.run_root}/ipc/storage.sock", timeout=0.2) as client, pytest.raises(RemoteError):
        client.call(storage.FsInfoGet())
    instance.fault("storage", "")
    eventually(lambda: instance.worker("storage").pid not in {0, hung})
    instance.await_log("Fatal Python error: Aborted")
    assert "it answers no pings" in (instance.run_root / "tally/storage").read_text()


def test_a_worker_that_says_no_hello_is_killed(instance: Instance) -> None:
    instance.fault("storage", "mute")
    os.kill(instance.worker("storage").pid, signal.SIGKILL)
    instance.await_log("it did not say hello in time")
    instance.fault("storage", "")
    eventually(lambda: instance.worker("storage").state == "ready")


def test_an_exception_of_a_worker_is_logged_with_its_stack(instance: Instance) -> None:
    instance.fault("storage", "bug")
    os.kill(instance.worker("storage").pid, signal.SIGKILL)
    instance.await_log("a bug that the test ordered")
    assert "fake_worker.py" in instance.log()
    instance.fault("storage", "")


def test_an_on_demand_worker_starts_with_the_first_connection_and_ends_when_idle(instance: Instance) -> None:
    assert instance.worker("image").state == "idle"
    first = instance.served_by("image")
    assert alive(first)
    eventually(lambda: instance.worker("image").state == "idle")
    second = instance.served_by("image")
    assert second != first
    assert instance.worker("image").restarts == 0


def test_a_connection_that_waits_while_a_pool_is_stuck_gets_a_second_worker(instance: Instance) -> None:
    first = instance.served_by("image")
    os.kill(first, signal.SIGSTOP)
    assert instance.served_by("image") != first
    os.kill(first, signal.SIGKILL)


def test_a_worker_that_has_served_enough_is_recycled_in_order(instance: Instance) -> None:
    first = instance.served_by("image")
    with instance.client("image") as client:
        for _ in range(25):
            client.call(storage.FsInfoGet())
    eventually(lambda: instance.served_by("image") != first)
    row = instance.worker("image")
    assert (row.restarts, row.last_death) == (0, "")
    assert 'msg="worker recycled" kind=image' in instance.log()


def test_log_lines_bear_the_senders_pid_and_a_flood_is_bounded(instance: Instance) -> None:
    instance.fault("image", "flood")
    pid = instance.served_by("image")
    instance.await_log(f'worker=image msg="fake worker runs" fault=flood pid={pid}')
    assert instance.log().count("msg=flood") < 8000


def test_standard_error_of_a_worker_is_logged(instance: Instance) -> None:
    instance.fault("image", "stderr")
    instance.served_by("image")
    instance.await_log('worker=image msg="standard error" line="something for standard error"')


def test_what_a_worker_leaves_behind_in_its_group_is_killed(instance: Instance) -> None:
    instance.fault("storage", "fork")
    with instance.client() as client:
        client.call(messages.WorkerRestart(kind="storage"))
    eventually(lambda: instance.worker("storage").state == "ready")
    instance.fault("storage", "")
    os.kill(instance.worker("storage").pid, signal.SIGKILL)
    instance.await_log('msg="leftover killed"')


def test_a_worker_that_does_not_stop_is_killed_after_its_grace(instance: Instance) -> None:
    instance.fault("storage", "slow-stop")
    with instance.client() as client:
        client.call(messages.WorkerRestart(kind="storage"))
        eventually(lambda: instance.worker("storage").state == "ready")
        instance.fault("storage", "")
        client.call(messages.WorkerRestart(kind="storage"))
    eventually(lambda: instance.worker("storage").state == "ready")


def test_no_child_has_a_descriptor_it_was_not_given(instance: Instance) -> None:
    pid = instance.worker("storage").pid
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    kinds = sorted(link.split(":")[0] for link in links if link != f"/proc/{pid}/statm")  # of ipc/heap.py
    # /dev/null twice, standard error, listener, control, log, and the worker's own loop with its wake-up pair
    assert kinds == ["/dev/null", "/dev/null", "anon_inode", *["pipe"] * 3, *["socket"] * 3]


def test_every_child_has_its_title_and_stands_in_its_group(instance: Instance) -> None:
    pid = instance.worker("storage").pid
    assert Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0") == "bulkhead: storage"
    assert Path(f"/proc/{instance.pid}/cmdline").read_text().rstrip("\0") == "bulkhead: supervisor [priv]"
    assert "/storage\n" in Path(f"/proc/{pid}/cgroup").read_text()


def test_the_cri_socket_is_renamed_into_place_and_again_after_cri_died(instance: Instance) -> None:
    public = instance.run_root / "bulkhead.sock"
    before = public.stat()
    assert (before.st_uid, before.st_mode & 0o777) == (0, 0o660)
    os.kill(instance.worker("cri").pid, signal.SIGKILL)
    eventually(lambda: public.stat().st_ino != before.st_ino, timeout=2.0)


def test_killing_the_supervisor_ends_its_workers_but_no_monitor_and_no_init() -> None:
    with running() as instance:
        with instance.client() as client:
            pid = client.call(messages.MonitorStart(container_id=CONTAINER, pod_id=POD)).pid
            init = client.call(messages.InitStart(pod_id=POD)).pid
        workers = [row.pid for row in instance.workers() if row.kind in {"storage", "network", "cri"}]
        instance.kill()
        eventually(lambda: not any(alive(worker) for worker in workers))
        assert alive(pid)
        assert alive(init)
        instance.start()
        with instance.client() as client:
            (state,) = client.call(messages.MonitorList()).monitors
            assert (state.container_id, state.alive, state.pid) == (CONTAINER, True, pid)
            assert client.call(messages.MonitorStart(container_id=CONTAINER, pod_id=POD)).pid == pid
            assert client.call(messages.InitStart(pod_id=POD)).pid == init
            end_monitor(instance, client)
            client.call(messages.InitStop(pod_id=POD))
        assert not alive(init)


def test_a_nursery_that_dies_is_replaced_by_the_next_that_is_asked_and_no_monitor_minds(
    instance: Instance,
) -> None:
    def nursery() -> int:
        return next(row.pid for row in instance.workers() if row.kind == "nursery")

    other = "b" * len(CONTAINER)
    assert all(row.kind != "nursery" for row in instance.workers())
    with instance.client() as client:
        first = client.call(messages.MonitorStart(container_id=CONTAINER, pod_id=POD)).pid
        before = nursery()
        os.kill(before, signal.SIGSTOP)
        os.kill(before, signal.SIGKILL)  # the request comes before its end is known, or after
        second = client.call(messages.MonitorStart(container_id=other, pod_id=POD)).pid
        assert alive(first)
        assert alive(second)
        assert nursery() != before
        for container in (CONTAINER, other):
            end_monitor(instance, client, container)


def end_monitor(instance: Instance, client: Client, container: str = CONTAINER) -> None:
    with Client(f"{instance.run_root}/monitors/{container}/ctl.sock", timeout=5) as own:
        own.call(monitor.Delete())
    request = messages.MonitorList(container_id=container)
    eventually(lambda: not client.call(request).monitors[0].alive)
    client.call(messages.MonitorRemove(container_id=container))


def test_a_monitor_that_has_died_is_not_removed_before_its_successor_has_done_its_part(
    instance: Instance,
) -> None:
    """A child of it holds its lock for a moment longer; when that goes there is no successor yet."""
    directory = f"{instance.run_root}/monitors/{CONTAINER}"
    removal = messages.MonitorRemove(container_id=CONTAINER)
    with instance.client() as client:
        pid = client.call(messages.MonitorStart(container_id=CONTAINER, pod_id=POD)).pid
        lock = os.stat(f"{directory}/lock")
        fds = (int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        lock_fd = next(fd for fd in fds if os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), lock))
        pidfd = os.pidfd_open(pid)
        ours = kernel.pidfd_getfd(pidfd, lock_fd)
        os.close(pidfd)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RemoteError, match="lives"):
            client.call(removal)
        eventually(lambda: not alive(pid))
        os.close(ours)
        with pytest.raises(RemoteError, match=r"no successor yet|lives"):
            client.call(removal)
        eventually(lambda: client.call(messages.MonitorList(container_id=CONTAINER)).monitors[0].alive)
        end_monitor(instance, client)


def test_a_monitor_is_there_when_the_answer_comes_and_has_nothing_it_was_not_given(
    instance: Instance,
) -> None:
    with instance.client() as client:
        pid = client.call(messages.MonitorStart(container_id=CONTAINER, pod_id=POD)).pid
        with Client(f"{instance.run_root}/monitors/{CONTAINER}/ctl.sock", timeout=5) as own:
            state = own.call(monitor.StateGet())
        assert (state.container_id, state.monitor_pid) == (f"{CONTAINER}/{POD}", pid)
        words = [word.split(":", 1)[1] for word in state.status.split()]
        names = sorted(word.split(":")[0] for word in words if not word.startswith("/proc"))
        names = [name for name in names if not name.endswith("/cgroup.procs")]  # until its first hand
        lock = f"{instance.run_root}/monitors/{CONTAINER}/lock"
        assert [name for name in names if name != "anon_inode"] == sorted(
            ["/dev/null", "/dev/null", "/dev/null", lock, *["socket"] * (len(names) - 5)]
        )
        assert Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0") == f"bulkhead: monitor {CONTAINER}"
        eventually(lambda: ".monitors\n" in Path(f"/proc/{pid}/cgroup").read_text())
        with pytest.raises(RemoteError) as caught:
            client.call(messages.MonitorRemove(container_id=CONTAINER))
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert client.call(messages.MonitorStart(container_id=CONTAINER, pod_id=POD)).pid == pid
        with Client(f"{instance.run_root}/monitors/{CONTAINER}/ctl.sock", timeout=5) as own:
            own.call(monitor.Delete())
        eventually(lambda: not client.call(messages.MonitorList()).monitors[0].alive)
        with pytest.raises(RemoteError):
            client.call(messages.MonitorStart(container_id=CONTAINER, pod_id=POD))
        client.call(messages.MonitorRemove(container_id=CONTAINER))
        client.call(messages.MonitorRemove(container_id=CONTAINER))
        assert client.call(messages.MonitorList()).monitors == []


@pytest.mark.parametrize("bad", ["", "..", "a/b", ".hidden", "x" * 200])
def test_an_id_that_is_no_file_name_is_refused(instance: Instance, bad: str) -> None:
    requests: list[Request[Any]] = [
        messages.MonitorStart(container_id=bad, pod_id=POD),
        messages.MonitorRemove(container_id=bad),
        messages.InitStart(pod_id=bad),
        messages.InitStop(pod_id=bad),
    ]
    with instance.client() as client:
        for request in requests:
            with pytest.raises(RemoteError) as caught:
                client.call(request)
            assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_pod_init_is_process_one_reaps_and_dies_with_its_pin(instance: Instance) -> None:
    with instance.client() as client:
        started = client.call(messages.InitStart(pod_id=POD, cgroup_parent=f"/{TEST_PARENT}"))
        assert client.call(messages.InitStart(pod_id=POD)).pid == started.pid
        assert os.stat(started.pid_namespace).st_ino == os.stat(f"/proc/{started.pid}/ns/pid").st_ino
        orphan_in(started.pid_namespace)
        own_status = Path(f"/proc/{started.pid}/status")
        eventually(lambda: "Seccomp:\t2" in own_status.read_text())  # it confines itself after the answer
        status = own_status.read_text()
        assert f"NSpid:\t{started.pid}\t1\n" in status
        assert "Uid:\t64105\t64105\t64105\t64105" in status
        assert "CapEff:\t0000000000000000" in status
        assert "CapBnd:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        assert os.listdir(f"/proc/{started.pid}/root") == []
        assert len(os.listdir(f"/proc/{started.pid}/fd")) == 4
        assert f"/{TEST_PARENT}/bulkhead-init-" in Path(f"/proc/{started.pid}/cgroup").read_text()
        eventually(lambda: children_of(started.pid) == [])
        sleeper = sleeper_in(started.pid_namespace)
        client.call(messages.InitStop(pod_id=POD))
        sleeper.wait(5)
        client.call(messages.InitStop(pod_id=POD))
        assert client.call(messages.InitList()).inits == []
    assert not alive(started.pid)
    assert not mounts([instance.run_root])
    assert not Path(started.pid_namespace).exists()
    assert list((instance.run_root / "ns").iterdir()) == []
    for parent in Path("/sys/fs/cgroup").glob(f"*/{TEST_PARENT}"):
        parent.rmdir()


def orphan_in(namespace: str) -> None:
    subprocess.run(["nsenter", f"--pid={namespace}", "sh", "-c", "sleep 0.2 & "], check=True)


def sleeper_in(namespace: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["nsenter", f"--pid={namespace}", "sleep", "600"])


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_pod_init_ends_on_sigterm_and_is_forgotten(instance: Instance) -> None:
    with instance.client() as client:
        pid = client.call(messages.InitStart(pod_id=POD)).pid
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not client.call(messages.InitList()).inits[0].alive)
        assert client.call(messages.InitStart(pod_id=POD)).pid != pid
        client.call(messages.InitStop(pod_id=POD))


def test_a_second_instance_on_the_same_directories_is_refused(instance: Instance) -> None:
    second = subprocess.run(
        [sys.executable, "-m", instance.module, *instance.arguments()],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode == 1
    assert f"another instance runs on {instance.directory}/root (pid {instance.pid})" in second.stderr
    assert instance.served_by("storage")


def test_two_instances_run_side_by_side() -> None:
    with running() as one, running() as two:
        assert one.served_by("storage") != two.served_by("storage")
        assert not one.groups() & two.groups()


def test_sigterm_ends_everything_in_order_and_leaves_no_socket(instance: Instance) -> None:
    assert instance.served_by("image")
    pids = [row.pid for row in instance.workers() if row.pid]
    assert instance.stop() == 0
    assert not any(alive(pid) for pid in pids)
    left = [path for path in instance.run_root.rglob("*") if path.is_socket()]
    assert left == [instance.run_root / "ipc/log.sock"]
    ended = [line for line in instance.log().splitlines() if 'msg="worker ended"' in line]
    assert "kind=cri" in ended[0]


def test_sighup_reads_the_configuration_again_and_a_fault_changes_nothing(instance: Instance) -> None:
    instance.config.write_text(CONFIG + "[image]\nretires = 3\n")
    instance.signal(signal.SIGHUP)
    instance.await_log("the nearest valid key is image.retries")
    instance.config.write_text("grpc.max_requests = 9\n" + CONFIG)
    instance.signal(signal.SIGHUP)
    instance.await_log('msg="configuration reloaded"')
    assert 'msg="this key takes a restart" key=grpc.max_requests' in instance.log()
    assert instance.served_by("storage")


def test_a_worker_that_comes_up_during_a_reload_gets_the_new_settings(instance: Instance) -> None:
    instance.fault("storage", "slow-start")
    before = instance.worker("storage").pid
    os.kill(before, signal.SIGKILL)
    eventually(lambda: instance.worker("storage").pid not in (0, before))
    instance.config.write_text(CONFIG.replace("ping = 0.2", "ping = 0.2\nmount_source = 7.0"))
    instance.signal(signal.SIGHUP)
    instance.await_log("changed=timeouts.mount_source")
    instance.await_log('worker=storage msg="settings taken"')


def test_sigusr1_writes_the_state_into_the_log(instance: Instance) -> None:
    instance.signal(signal.SIGUSR1)
    instance.await_log("msg=state name=storage state=ready")


def test_only_the_table_callers_may_connect(instance: Instance) -> None:
    script = (
        "import os, socket, sys\n"
        "os.setresgid(*[int(sys.argv[1])] * 3); os.setgroups([]); os.setresuid(*[int(sys.argv[1])] * 3)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "print(s.connect_ex(sys.argv[2]))\n"
    )

    def connect(uid: int, name: str) -> int:
        path = f"{instance.run_root}/ipc/{name}.sock"
        command = ["/usr/bin/python3", "-c", script, str(uid), path]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert connect(64101, "supervisor") == 0
    assert connect(64102, "supervisor") == 13
    assert connect(4711, "supervisor") == 13
    assert connect(64101, "storage") == 13  # the fake table lets nobody


def test_host_info_tells_the_runtimes_and_what_this_host_lacks(instance: Instance) -> None:
    with instance.client() as client:
        info = client.call(messages.HostInfoGet())
    assert {runtime.name for runtime in info.runtimes} == {"crun", "runc"}
    assert [runtime.name for runtime in info.runtimes if runtime.default] == ["crun"]
    assert all(runtime.version for runtime in info.runtimes)
    assert info.cgroup_version in {1, 2}
    assert info.boot_id
    assert "CAP_SYS_ADMIN" in info.capabilities


def test_the_supervisor_is_small_has_one_thread_and_loads_no_network_library(instance: Instance) -> None:
    status = Path(f"/proc/{instance.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    assert int(fields["Threads"]) == 1
    assert int(fields["VmRSS"].split()[0]) < 28_000  # 3 MB of it is what storage, network, monitors share
    mapped = Path(f"/proc/{instance.pid}/maps").read_text()
    assert not [word for word in ("grpc", "_ssl", "libssl", "_asyncio", "libcrypto") if word in mapped]


def test_state_of_an_earlier_boot_is_forgotten() -> None:
    with Instance() as instance:
        (instance.run_root / "boot_id").write_text("another\n")
        (instance.run_root / "monitors/old").mkdir(parents=True)
        instance.start()
        with instance.client() as client:
            assert client.call(messages.MonitorList()).monitors == []


def test_the_watchdog_is_fed_while_the_loop_turns() -> None:
    with Instance() as instance:
        instance.environment["WATCHDOG_USEC"] = "400000"
        instance.start()
        for _ in range(3):
            instance.await_notice("WATCHDOG=1")
        instance.signal(signal.SIGSTOP)
        drained_by = time.monotonic() + 0.3
        while time.monotonic() < drained_by:
            instance.quiet_for(0.1)
        assert instance.quiet_for(0.8)
        instance.signal(signal.SIGCONT)


def test_a_daemon_has_a_pid_file_and_refuses_a_second_one(tmp_path: Path) -> None:
    with Instance(module="supervisor.cli.bulkhead") as instance:
        pid_file = tmp_path / "pid"
        command = [sys.executable, "-m", instance.module, "serve", *instance.arguments()]
        command += ["--daemon", "--pid-file", str(pid_file)]
        assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == 0
        pid = int(eventually(lambda: pid_file.exists() and pid_file.read_text()))
        try:
            eventually((instance.run_root / "bulkhead.sock").exists)
            second = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            assert second.returncode == 1
            assert f"(pid {pid})" in second.stderr
        finally:
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: not pid_file.exists())
        assert "supervisor ends" in (instance.run_root / "bulkhead.log").read_text()


def test_a_daemon_says_in_the_foreground_that_its_pid_file_cannot_be_made(tmp_path: Path) -> None:
    with Instance(module="supervisor.cli.bulkhead") as instance:
        command = [sys.executable, "-m", instance.module, "serve", *instance.arguments(), "--daemon"]
        for place in (tmp_path / "absent" / "pid", tmp_path):
            done = subprocess.run(
                [*command, "--pid-file", str(place)],
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 1
            assert done.stderr.startswith(f"bulkhead: {place}: a pid file cannot be made there")
